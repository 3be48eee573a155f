"""JSON answers of the plain kind."""

from collections.abc import Mapping

import msgspec
from aiohttp import web

from helixd.api.errors import JSON_TYPE


def json_answer(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`body` as a JSON response."""
    return web.Response(status=status, body=msgspec.json.encode(body), content_type=JSON_TYPE, headers=headers)
