from typing import Any

import pytest

from helixd.api.body import Fields
from helixd.api.errors import ApiError
from helixd.api.messages import Message, read_messages
from helixd.api.options import Limits


def read(*messages: Any) -> list[Message]:
    return read_messages(Fields({"messages": list(messages)}), Limits())


def refused(param: str, *messages: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*messages)
    assert (caught.value.status, caught.value.param) == (400, param)
    return caught.value


def test_every_role_is_taken_and_developer_is_system() -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "system", "developer", "assistant")]
    assert [message["role"] for message in read(*messages)] == ["user", "system", "system", "assistant"]
    assert read({"role": "tool", "content": "x", "tool_call_id": "c"}) == [
        {"role": "tool", "content": "x", "tool_call_id": "c"}
    ]


@pytest.mark.parametrize("role", ["function", "User", "", None, 1, ["user"]])
def test_other_roles_are_refused(role: object) -> None:
    refused("messages[0].role", {"role": role, "content": "x"})


@pytest.mark.parametrize("messages", [None, [], "hi", {"role": "user"}])
def test_messages_are_an_array_with_something_in_it(messages: object) -> None:
    with pytest.raises(ApiError) as caught:
        read_messages(Fields({"messages": messages}), Limits())
    assert caught.value.param == "messages"


def test_the_number_of_messages_is_limited() -> None:
    hi = {"role": "user", "content": "hi"}
    assert len(read(*[hi] * 1024)) == 1024
    refused("messages", *[hi] * 1025)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"role": "user", "content": parts})[0]["content"] == "a\nb"
    assert read({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})[0]["content"] == "no"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_parts_that_are_not_text_are_refused_by_name(kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://example.com"}}
    error = refused("messages[1].content[0]", {"role": "user", "content": "x"}, {"role": "user", "content": [part]})
    assert error.code == "unsupported_parameter"
    assert kind in error.message


def test_malformed_content_is_named() -> None:
    refused("messages[0]", "hi")
    refused("messages[0].content", {"role": "user"})
    refused("messages[0].content", {"role": "user", "content": None})
    refused("messages[0].content", {"role": "user", "content": 3})
    refused("messages[0].content", {"role": "user", "content": []})
    refused("messages[0].content[0]", {"role": "user", "content": ["x"]})
    refused("messages[0].content[0].type", {"role": "user", "content": [{"type": "poem"}]})
    refused("messages[0].content[0].type", {"role": "user", "content": [{"type": "refusal", "refusal": "no"}]})
    refused("messages[0].content[0].text", {"role": "user", "content": [{"type": "text", "text": 3}]})
    refused("messages[0].name", {"role": "user", "content": "x", "name": 3})
    refused("messages[0].audio", {"role": "assistant", "content": "x", "audio": {"id": "a"}})


def test_an_assistant_may_have_called_tools_instead_of_speaking() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    [message] = read({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message["content"] is None
    assert message["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    refused("messages[0].content", {"role": "assistant", "content": None})
    refused("messages[0].tool_calls", {"role": "user", "content": "x", "tool_calls": [call]})


@pytest.mark.parametrize(
    ("param", "call"),
    [
        ("messages[0].tool_calls[0]", "x"),
        ("messages[0].tool_calls[0].type", {"id": "c", "type": "custom"}),
        ("messages[0].tool_calls[0]", {"id": "c", "type": "function"}),
        ("messages[0].tool_calls[0]", {"type": "function", "function": {"name": "f", "arguments": "{}"}}),
        *[
            (
                "messages[0].tool_calls[0].function.arguments",
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}},
            )
            for arguments in ("{", "[1]", "[" * 100_000)
        ],
    ],
)
def test_malformed_tool_calls_are_named(param: str, call: object) -> None:
    refused(param, {"role": "assistant", "content": None, "tool_calls": [call]})


def test_a_tool_says_which_call_it_answers() -> None:
    refused("messages[0].tool_call_id", {"role": "tool", "content": "x"})
