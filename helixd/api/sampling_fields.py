"""The fields chat and completions share: how tokens are drawn, when a choice ends, how the answer is sent.

Pure. Decides ranges and defaults; knows neither prompts nor tokenisers. `logprobs` differs between the two endpoints,
so each endpoint reads its own and hands the count in.
"""

import secrets
from dataclasses import dataclass

from helixd.api.body import Fields
from helixd.api.errors import bad_field, model_not_found, unsupported_field
from helixd.api.options import Limits
from helixd.sampling import SamplingParams

INT64_LOW, INT64_HIGH = -(2**63), 2**63 - 1
# More than any context; only a bound that keeps the number a number.
MAX_TOKENS_BOUND = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is checked against: the served model's name, vocabulary and context."""

    model_name: str
    vocab_size: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class CommonFields:
    """The shared fields of a request. `seed` is None where the client gave none."""

    n: int
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    sampling: SamplingParams
    seeded: bool


def read_common(fields: Fields, limits: Limits, target: Target, logprobs: int | None) -> CommonFields:
    """Read and check the shared fields. Raises a 400 naming the field, or a 404 for an unknown model."""
    check_model(fields, target)
    stream = fields.boolean("stream")
    seed = fields.integer("seed", INT64_LOW, INT64_HIGH)
    top_k = fields.integer("top_k", -1, MAX_TOKENS_BOUND) or 0
    sampling = SamplingParams(
        seed=draw_seed() if seed is None else seed % 2**64,
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above_low=True),
        top_k=min(max(top_k, 0), target.vocab_size),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.0, 10.0, above_low=True),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(fields, limits, target.vocab_size),
        logprobs=logprobs,
    )
    _check_response_format(fields)
    return CommonFields(
        n=fields.integer("n", 1, limits.n) or 1,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        stop=_stop(fields, limits),
        stop_token_ids=_stop_token_ids(fields, limits, target.vocab_size),
        ignore_eos=fields.boolean("ignore_eos"),
        sampling=sampling,
        seeded=seed is not None,
    )


def draw_seed() -> int:
    """A seed nobody can guess, for a request that brings none."""
    return secrets.randbits(64)


def check_model(fields: Fields, target: Target, *, required: bool = True) -> None:
    """Raise unless `model` names the served model."""
    model = fields.string("model")
    if model is None:
        if required:
            raise bad_field("model", f"is required; this server serves `{target.model_name}`")
    elif model != target.model_name:
        raise model_not_found(model, target.model_name)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_field("stream_options", "is only allowed together with `stream`: true")
    inner = Fields(options, "stream_options.")
    if inner.boolean("include_obfuscation"):
        raise unsupported_field("stream_options.include_obfuscation", "is not supported by this server; leave it out")
    return inner.boolean("include_usage")


def _stop(fields: Fields, limits: Limits) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_field("stop", "must be a string or an array of strings")
    if len(stops) > limits.stop:
        raise bad_field("stop", f"must hold at most {limits.stop} strings, not {len(stops)}")
    if not all(0 < len(stop.encode()) <= limits.stop_bytes for stop in stops):
        raise bad_field("stop", f"must hold strings of 1 to {limits.stop_bytes} bytes")
    return tuple(stops)


def _stop_token_ids(fields: Fields, limits: Limits, vocab_size: int) -> tuple[int, ...]:
    ids = fields.array("stop_token_ids") or []
    if len(ids) > limits.stop_token_ids:
        raise bad_field("stop_token_ids", f"must hold at most {limits.stop_token_ids} ids, not {len(ids)}")
    return check_token_ids("stop_token_ids", ids, vocab_size)


def check_token_ids(param: str, ids: list[object], vocab_size: int) -> tuple[int, ...]:
    """The ids, each checked to be a token of the model."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise bad_field(param, "must hold integers (token ids)")
        if not 0 <= token < vocab_size:
            raise bad_field(param, f"must hold token ids between 0 and {vocab_size - 1}")
    return tuple(ids)  # type: ignore[arg-type]


def _logit_bias(fields: Fields, limits: Limits, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = fields.object("logit_bias") or {}
    if len(given) > limits.logit_bias:
        raise bad_field("logit_bias", f"must hold at most {limits.logit_bias} tokens, not {len(given)}")
    biases: dict[int, float] = {}
    for key, value in given.items():
        # int() would also take "1_0", " 1" and other scripts' digits.
        if not (key.isascii() and key.isdigit() and len(key) <= 10) or int(key) >= vocab_size:
            raise bad_field("logit_bias", f"must have token ids between 0 and {vocab_size - 1} as keys")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise bad_field("logit_bias", "must have numbers between -100 and 100 as values")
        biases[int(key)] = float(value)
    return tuple(sorted(biases.items()))


def _check_response_format(fields: Fields) -> None:
    given = fields.object("response_format")
    if given is None:
        return
    kind = given.get("type")
    if kind in ("json_object", "json_schema"):
        raise unsupported_field("response_format", f"of type {kind} is not supported by this server; only text is")
    if kind != "text":
        raise bad_field("response_format.type", 'must be "text"')
