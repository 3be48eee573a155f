"""Chat and completions requests field by field: what is honoured, refused, ignored; and both sides of each limit."""

from typing import Any

import pytest

from helixd.api.body import Fields
from helixd.api.chat_request import ChatCall, parse_chat, read_chat
from helixd.api.completion_request import CompletionCall, parse_completion, read_completion
from helixd.api.errors import ApiError
from helixd.api.fields import CHAT_FIELDS, COMPLETION_FIELDS, Field
from helixd.api.options import ApiOptions
from helixd.api.sampling_fields import Target

TARGET = Target("tiny", vocab_size=100, context_tokens=512)
OPTIONS = ApiOptions()
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatCall:
    return parse_chat({"model": "tiny", "messages": HI, **fields}, OPTIONS, TARGET)


def completion(**fields: Any) -> CompletionCall:
    return parse_completion({"model": "tiny", "prompt": "hi", **fields}, OPTIONS, TARGET)


def refused(call: Any, param: str, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param.split("[")[0].split(".")[0] in caught.value.message
    return caught.value


def test_defaults_are_openais() -> None:
    call = chat()
    sampling = call.common.sampling
    assert (call.max_tokens, call.common.n, call.common.stream) == (None, 1, False)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
    assert sampling.logprobs is None
    assert completion().max_tokens == 16


def test_null_means_default_for_every_field_but_the_required() -> None:
    plain = chat(seed=1)
    optional = {field.name: None for field in CHAT_FIELDS if not field.required}
    assert chat(**{**optional, "seed": 1}) == plain
    optional = {field.name: None for field in COMPLETION_FIELDS if not field.required}
    assert completion(**{**optional, "seed": 1}) == completion(seed=1)


@pytest.mark.parametrize(
    ("read", "table", "body"),
    [
        (read_chat, CHAT_FIELDS, {"messages": HI}),
        (read_completion, COMPLETION_FIELDS, {"prompt": "hi"}),
    ],
)
def test_the_parser_reads_what_the_table_calls_honoured_and_nothing_else(
    read: Any, table: tuple[Field, ...], body: dict[str, Any]
) -> None:
    body = {"model": "tiny", **body}
    fields = Fields(body)
    read(fields, body, OPTIONS, TARGET)
    assert fields.seen == {field.name for field in table if field.treatment == "honoured"}
    assert len({field.name for field in table}) == len(table)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        *[pytest.param(chat, field, id=f"chat-{field.name}") for field in CHAT_FIELDS],
        *[pytest.param(completion, field, id=f"completions-{field.name}") for field in COMPLETION_FIELDS],
    ],
)
def test_each_field_is_treated_as_its_table_says(call: Any, field: Field) -> None:
    # No field takes an object with an unknown member, except those that are ignored whole.
    odd = {"surprise": [True]}
    if field.treatment == "ignored":
        assert call(seed=1, **{field.name: odd}) == call(seed=1)
        return
    if field.name not in ("stream_options", "chat_template_kwargs"):
        error = refused(
            call, f"{field.name}.type" if field.name == "response_format" else field.name, **{field.name: odd}
        )
        assert (error.code == "unsupported_parameter") == (field.treatment == "refused")
    for neutral in field.neutral:
        assert call(seed=1, **{field.name: neutral}) == call(seed=1)


def test_false_is_not_zero_and_one_is_not_true() -> None:
    refused(chat, "min_tokens", min_tokens=False)
    refused(chat, "best_of", best_of=True)
    refused(chat, "n", n=True)
    refused(chat, "stream", stream=1)


def test_unknown_fields_are_ignored() -> None:
    assert chat(seed=1, frobnicate={"a": 1}) == chat(seed=1)


def test_the_model_must_be_the_served_one() -> None:
    refused(lambda **f: parse_chat({"messages": HI}, OPTIONS, TARGET), "model")
    with pytest.raises(ApiError) as caught:
        chat(model="other")
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_any_int64_is_a_seed_and_each_is_another(seed: int) -> None:
    assert chat(seed=seed).common.sampling.seed == seed % 2**64


def test_seeds_beyond_int64_are_refused() -> None:
    refused(chat, "seed", seed=2**63)
    refused(chat, "seed", seed=-(2**63) - 1)


def test_a_request_without_a_seed_gets_its_own() -> None:
    assert chat().common.sampling.seed != chat().common.sampling.seed


def test_max_tokens_has_two_names_that_must_agree() -> None:
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=6).max_tokens == 6
    assert chat(max_completion_tokens=6, max_tokens=6).max_tokens == 6
    refused(chat, "max_tokens", max_completion_tokens=6, max_tokens=5)
    refused(chat, "max_tokens", max_tokens=0)
    refused(chat, "max_completion_tokens", max_completion_tokens=0)
    assert completion(max_tokens=0).max_tokens == 0
    refused(completion, "max_tokens", max_tokens=-1)


def test_n_has_a_limit() -> None:
    assert chat(n=8).common.n == 8
    refused(chat, "n", n=9)
    refused(chat, "n", n=0)


def test_stop_is_up_to_four_strings_of_up_to_256_bytes() -> None:
    assert chat(stop="a").common.stop == ("a",)
    assert chat(stop=[]).common.stop == ()
    assert chat(stop=["a", "b", "c", "ä" * 128]).common.stop[3] == "ä" * 128
    for wrong in (["a"] * 5, "ä" * 129, "", ["a", ""], [1], {}, 3):
        refused(chat, "stop", stop=wrong)


def test_stop_token_ids_are_tokens() -> None:
    assert chat(stop_token_ids=[0, 99]).common.stop_token_ids == (0, 99)
    for wrong in ([100], [-1], ["1"], [True], 3, [1] * 65):
        refused(chat, "stop_token_ids", stop_token_ids=wrong)


def test_logit_bias_maps_token_ids_as_strings_to_numbers() -> None:
    assert chat(logit_bias={"3": -100, "1": 2.5}).common.sampling.logit_bias == ((1, 2.5), (3, -100.0))
    wide = Target("tiny", 1000, 512)
    full = {str(i): 1 for i in range(300)}
    body = {"model": "tiny", "messages": HI, "logit_bias": full}
    assert len(parse_chat(body, OPTIONS, wide).common.sampling.logit_bias) == 300
    body["logit_bias"] = {**full, "300": 1}
    refused(lambda **f: parse_chat(body, OPTIONS, wide), "logit_bias")
    for wrong in ({"100": 1}, {"-1": 1}, {"a": 1}, {"1_0": 1}, {"٣": 1}, {"1": 101}, {"1": True}, {"1": "x"}, [1]):
        refused(chat, "logit_bias", logit_bias=wrong)


def test_chat_logprobs_are_a_switch_and_a_count() -> None:
    assert chat(logprobs=True).common.sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).common.sampling.logprobs == 20
    assert chat(logprobs=False).common.sampling.logprobs is None
    refused(chat, "top_logprobs", logprobs=True, top_logprobs=21)
    refused(chat, "top_logprobs", top_logprobs=1)
    refused(chat, "logprobs", logprobs=1)


def test_completions_logprobs_are_a_count() -> None:
    assert completion(logprobs=0).common.sampling.logprobs == 0
    assert completion(logprobs=20).common.sampling.logprobs == 20
    refused(completion, "logprobs", logprobs=21)
    refused(completion, "logprobs", logprobs=True)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 2], [-0.1, 2.1, "1", True]),
        ("top_p", [0.001, 1], [0, 1.1, "1"]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [0.001, 10], [0, 10.1, -1]),
    ],
)
def test_sampling_numbers_have_bounds(name: str, good: list[float], bad: list[object]) -> None:
    for value in good:
        assert getattr(chat(**{name: value}).common.sampling, name) == value
    for wrong in bad:
        refused(chat, name, **{name: wrong})


def test_top_k_is_off_at_zero_and_minus_one() -> None:
    assert [chat(top_k=k).common.sampling.top_k for k in (-1, 0, 5, 100_000)] == [0, 0, 5, 100]
    refused(chat, "top_k", top_k=-2)


def test_stream_options_belong_to_a_stream() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).common.include_usage
    assert not chat(stream=True, stream_options={}).common.include_usage
    refused(chat, "stream_options", stream_options={"include_usage": True})
    refused(chat, "stream_options.include_usage", stream=True, stream_options={"include_usage": 1})
    refused(chat, "stream_options.include_obfuscation", stream=True, stream_options={"include_obfuscation": True})


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_only_text_is_a_response_format(kind: str) -> None:
    assert chat(seed=1, response_format={"type": "text"}) == chat(seed=1)
    assert refused(chat, "response_format", response_format={"type": kind}).code == "unsupported_parameter"
    refused(chat, "response_format.type", response_format={"type": "yaml"})


def test_what_asks_for_abilities_that_are_not_there_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    refused(chat, "tools", tools=[tool])
    refused(chat, "tool_choice", tool_choice="required")
    refused(chat, "functions", functions=[{"name": "f"}])
    refused(chat, "modalities", modalities=["text", "audio"])
    refused(chat, "reasoning_effort", reasoning_effort="high")
    refused(chat, "verbosity", verbosity="low")
    refused(chat, "web_search_options", web_search_options={})
    refused(completion, "suffix", suffix="after")


def test_template_scalars_are_an_allow_list() -> None:
    assert chat(chat_template_kwargs={"enable_thinking": False}).scalars == {"enable_thinking": False}
    refused(chat, "chat_template_kwargs", chat_template_kwargs={"messages": "x"})
    refused(chat, "chat_template_kwargs.enable_thinking", chat_template_kwargs={"enable_thinking": [1]})
    refused(chat, "chat_template", chat_template="{{ 1 }}")


def test_best_of_is_taken_only_where_it_changes_nothing() -> None:
    assert completion(n=2, best_of=2).common.n == 2
    assert refused(completion, "best_of", n=2, best_of=3).code == "unsupported_parameter"


def test_prompts_come_in_four_forms() -> None:
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[1, 2]).prompts == ((1, 2),)
    assert completion(prompt=[[1], [2, 3]]).prompts == ((1,), (2, 3))
    assert len(completion(prompt=["a"] * 128).prompts) == 128
    wrong: list[object] = [[], [[]], [1, "a"], ["a", 1], [[1], "a"], [100], [[100]], [1.5], [None], {}, 3, ["a"] * 129]
    for prompt in [*wrong, None, [True], [1, True], [-1]]:
        refused(completion, "prompt", prompt=prompt)
