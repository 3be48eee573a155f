"""The `messages` of a chat request: checked, and flattened to what a chat template takes.

Pure. Content parts of type text are joined with a newline; `developer` becomes `system`, which is what templates know.
An assistant's earlier tool calls are passed on with their arguments as an object, as templates expect them.
"""

from typing import Any

import msgspec

from helixd.api.body import Fields
from helixd.api.errors import bad_field, unsupported_field
from helixd.api.options import Limits

Message = dict[str, object]

_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(fields: Fields, limits: Limits) -> list[Message]:
    """The messages for a template. Raises a 400 naming the message and its field."""
    given = fields.array("messages")
    if not given:
        raise bad_field("messages", "must be an array of at least one message")
    if len(given) > limits.messages:
        raise bad_field("messages", f"must hold at most {limits.messages} messages, not {len(given)}")
    return [_read_message(item, index) for index, item in enumerate(given)]


def _read_message(item: Any, index: int) -> Message:
    if not isinstance(item, dict):
        raise bad_field(f"messages[{index}]", "must be an object")
    fields = Fields(item, f"messages[{index}].")
    role = fields.string("role")
    if role not in _ROLES:
        raise bad_field(fields.name("role"), f"must be one of {', '.join(_ROLES)}")
    for name in ("audio", "function_call"):
        if fields.raw(name) is not None:
            raise unsupported_field(fields.name(name), "is not supported by this server; leave it out")
    message: Message = {"role": "system" if role == "developer" else role}
    calls = _read_tool_calls(fields, role)
    message["content"] = _read_content(fields, role, content_required=not calls)
    if calls:
        message["tool_calls"] = calls
    if (name_of_speaker := fields.string("name")) is not None:
        message["name"] = name_of_speaker
    if role == "tool":
        call_id = fields.string("tool_call_id")
        if call_id is None:
            raise bad_field(fields.name("tool_call_id"), "is required in a message of role tool")
        message["tool_call_id"] = call_id
    return message


def _read_content(fields: Fields, role: str, *, content_required: bool) -> str | None:
    content = fields.raw("content")
    if content is None:
        refusal = fields.string("refusal") if role == "assistant" else None
        if refusal is None and content_required:
            raise bad_field(fields.name("content"), "must be a string or an array of text parts, not null")
        return refusal
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_field(fields.name("content"), "must be a string or an array of at least one text part")
    return "\n".join(_read_part(part, f"{fields.name('content')}[{index}]", role) for index, part in enumerate(content))


def _read_part(part: Any, path: str, role: str) -> str:
    if not isinstance(part, dict):
        raise bad_field(path, "must be an object")
    kind = part.get("type")
    if kind not in ("text", "refusal") or (kind == "refusal" and role != "assistant"):
        if kind in ("image_url", "input_audio", "file", "video_url", "audio_url"):
            raise unsupported_field(path, f"is of type {kind}, which this server does not read; only text is")
        raise bad_field(f"{path}.type", 'must be "text"')
    text = part.get(kind)
    if not isinstance(text, str):
        raise bad_field(f"{path}.{kind}", "must be a string")
    return text


def _read_tool_calls(fields: Fields, role: str) -> list[dict[str, object]]:
    given = fields.array("tool_calls")
    if not given:
        return []
    if role != "assistant":
        raise bad_field(fields.name("tool_calls"), "is only allowed in a message of role assistant")
    return [_read_tool_call(call, f"{fields.name('tool_calls')}[{index}].") for index, call in enumerate(given)]


def _read_tool_call(call: Any, path: str) -> dict[str, object]:
    if not isinstance(call, dict):
        raise bad_field(path[:-1], "must be an object")
    fields = Fields(call, path)
    if fields.string("type") != "function":
        raise unsupported_field(fields.name("type"), 'must be "function"')
    function = Fields(fields.object("function") or {}, f"{path}function.")
    call_id, name, arguments = fields.string("id"), function.string("name"), function.string("arguments")
    if call_id is None or name is None or arguments is None:
        raise bad_field(path[:-1], "must have an `id`, and a `function` with a `name` and `arguments`")
    try:
        decoded = msgspec.json.decode(arguments) if arguments else {}
    except (msgspec.DecodeError, RecursionError):
        raise bad_field(function.name("arguments"), "must be a JSON object in a string") from None
    if not isinstance(decoded, dict):
        raise bad_field(function.name("arguments"), "must be a JSON object in a string")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": decoded}}
