"""docs/limits.md has the numbers that hold."""

import re
from pathlib import Path

from helixd.api.options import ApiOptions, Limits
from helixd.config.load import SCHEMA
from helixd.config.units import parse_size_bytes
from helixd.model import sandbox
from helixd.model.chat import MAX_OUTPUT_CHARS
from helixd.wire import frames
from helixd.wire.handshake import MAX_MESSAGE_BYTES
from helixd.wire.options import WireOptions
from helixd.wire.outbox import HARD_BYTES
from helixd.worker.inbox import EARLY_BYTES, PARKED_BYTES

DOCS = (Path(__file__).parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("`"): (cells[1], cells[2].strip("`"))
    for cells in re.findall(r"^\| (.*?) \| (.*?) \|(?: (.*?))? \| .*\|$", DOCS, re.MULTILINE)
}


def numbers(row: str) -> list[int]:
    text = ROWS[row][0]
    if text.endswith("iB"):
        return [parse_size_bytes(text)]
    return [int(number) for number in re.findall(r"\d+", text)]


def test_fixed_limits() -> None:
    options, limits, wire = ApiOptions(), Limits(), WireOptions()
    assert {row: numbers(row) for row in ROWS if ROWS[row][1] == "" and numbers(row)} == {
        "Time for the body to arrive": [options.body_timeout_s],
        "Header line": [options.header_line_bytes],
        "Header lines": [options.header_lines],
        "JSON depth": [limits.json_depth],
        "messages": [limits.messages],
        "Prompts": [limits.prompts],
        "stop": [limits.stop],
        "A string to stop at": [limits.stop_bytes],
        "stop_token_ids": [limits.stop_token_ids],
        "logit_bias": [limits.logit_bias],
        "top_logprobs": [limits.top_logprobs],
        "Rendered chat": [MAX_OUTPUT_CHARS],
        "Steps of a chat template": [sandbox.MAX_STEPS],
        "Seconds of a chat template": [sandbox.MAX_SECONDS],
        "A value or number in a chat template": [sandbox.MAX_LENGTH, sandbox.MAX_BITS],
        "Rendering and tokenising, waiting for one of 2 threads included": [options.text_timeout_s],
        "Time for the first request's headers": [options.headers_timeout_s],
        "Chunks waiting for a slow reader": [options.output_chunks],
        "Time for a TLS handshake": [options.headers_timeout_s],
        "Bytes before it has proven who it is": [wire.preauth_bytes],
        "Time until then": [wire.auth_timeout_s],
        "Peers that have not yet proven who they are": [wire.max_pending],
        "Hello": [MAX_MESSAGE_BYTES],
        "Body of a frame": [wire.max_body_bytes],
        "Payload of a frame": [wire.max_frame_bytes],
        "Rows of all neighbours that came before their sequence was opened": [EARLY_BYTES],
        "Rows of all neighbours that came before their turn": [PARKED_BYTES],
        "What waits to be sent to a peer": [HARD_BYTES],
        "Entries of a list, of a map, bytes of a string in a frame": [
            frames.MAX_LIST_ENTRIES, frames.MAX_MAP_ENTRIES, frames.MAX_STR_BYTES,
        ],
    }  # fmt: skip
    assert (options.text_threads, limits.template_bytes) == (2, MAX_OUTPUT_CHARS)


def test_settings_and_their_defaults() -> None:
    listed = {setting: numbers(row) for row, (_, setting) in ROWS.items() if setting and setting != "Setting"}
    for name, shown in listed.items():
        spec = SCHEMA.keys[tuple(name.split("."))]
        assert shown in ([spec.default], []), name
    for path in SCHEMA.keys:
        if path[:2] == ("api", "limits") and path[-1] != "keep_alive":
            assert ".".join(path) in listed
