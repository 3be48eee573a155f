"""Any JSON as a request: it is understood or a 400 (a 404 for another model) in OpenAI's form, never anything else."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.api.body import parse_object
from helixd.api.chat_request import parse_chat
from helixd.api.completion_request import parse_completion
from helixd.api.errors import ApiError
from helixd.api.fields import CHAT_FIELDS, COMPLETION_FIELDS
from helixd.api.options import ApiOptions
from helixd.api.sampling_fields import Target
from tests.budget import examples

TARGET = Target("tiny", vocab_size=100, context_tokens=512)
OPTIONS = ApiOptions()
NAMES = sorted({field.name for field in (*CHAT_FIELDS, *COMPLETION_FIELDS)})
MESSAGE_NAMES = ["role", "content", "name", "tool_calls", "tool_call_id", "function", "type", "text", "id", "arguments"]
WORDS = [
    "user",
    "assistant",
    "system",
    "tool",
    "text",
    "function",
    "tiny",
    "json_object",
    "auto",
    "none",
    "",
    "7",
    "-1",
]

NUMBERS = (
    st.integers(-3, 40) | st.integers() | st.floats(allow_nan=False) | st.sampled_from([2**63, -(2**63) - 1, 1e308])
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS) | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(MESSAGE_NAMES + NAMES), inner, max_size=5)
    ),
    max_leaves=12,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(WORDS[:4]), "content": st.text(max_size=5) | VALUES}), max_size=3
)
OTHERS = [name for name in NAMES if name not in ("model", "messages", "prompt")]
BODIES = st.tuples(
    st.fixed_dictionaries(
        {"model": st.just("tiny") | VALUES},
        optional={"messages": MESSAGES | VALUES, "prompt": st.text(max_size=5) | VALUES},
    ),
    st.dictionaries(st.sampled_from(OTHERS), VALUES, max_size=4),
).map(lambda parts: parts[0] | parts[1])


def understood(read: Any, body: dict[str, Any]) -> bool:
    try:
        read(body, OPTIONS, TARGET)
    except ApiError as error:
        refusal = error
    else:
        return True
    assert refusal.status in (400, 404)
    answer = refusal.body()["error"]
    assert isinstance(answer, dict)
    assert set(answer) == {"message", "type", "param", "code"}
    assert isinstance(answer["message"], str)
    json.dumps(answer)
    return False


@given(BODIES)
@settings(max_examples=examples(200, 5000), deadline=None)
def test_a_body_of_any_values_is_understood_or_a_400(body: dict[str, Any]) -> None:
    understood(parse_chat, body)
    understood(parse_completion, body)


@given(st.sampled_from(NAMES), VALUES)
@settings(max_examples=examples(300, 5000), deadline=None)
def test_any_value_in_one_field_of_a_good_body(name: str, value: Any) -> None:
    hello = [{"role": "user", "content": "hi"}]
    assert understood(parse_chat, {"model": "tiny", "messages": hello})
    understood(parse_chat, {"model": "tiny", "messages": hello, name: value})
    understood(parse_completion, {"model": "tiny", "prompt": "hi", name: value})


TEXTS = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
NEARLY = st.sampled_from([
    b"NaN", b"Infinity", b"-0", b"1e400", b"9" * 400, b'"\\ud800"', b'{"a":1,"a":2}', b"[" * 3000, b'{"a":' * 3000,
])  # fmt: skip


@given(TEXTS | NEARLY | BODIES.map(lambda body: json.dumps(body).encode()), st.data())
@settings(max_examples=examples(200, 5000), deadline=None)
def test_bytes_are_an_object_or_a_400(raw: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(raw)))
    mutated = raw[:cut] + data.draw(st.binary(max_size=3)) + raw[cut + data.draw(st.integers(0, 3)) :]
    for text in (raw, mutated, b'{"x":' + raw + b"}"):
        try:
            body = parse_object(text, 64)
        except ApiError as error:
            assert error.status == 400  # noqa: PT017
        else:
            assert isinstance(body, dict)
            understood(parse_chat, body)
