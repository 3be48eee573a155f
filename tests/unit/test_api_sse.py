"""A client that is gone is never an error of ours, whichever write finds out."""

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from helixd.api.sse import ClientGone, SseWriter


def gone(*_: object) -> None:
    raise ConnectionResetError("Cannot write to closing transport")


async def test_a_client_that_leaves_before_the_headers_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.StreamResponse, "prepare", gone)
    with pytest.raises(ClientGone):
        await SseWriter(make_mocked_request("POST", "/v1/completions"), 1.0).open({"x-helixd-route": "a"})


async def test_a_client_that_leaves_later_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.StreamResponse, "write", gone)
    writer = SseWriter(make_mocked_request("POST", "/v1/completions"), 1.0)
    await writer.open({})
    await writer.write(b"")
    with pytest.raises(ClientGone):
        await writer.write(b"data: 1\n\n")
    assert not writer.slow
