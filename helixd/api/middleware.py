"""What happens to every request before and after its handler: an id, an error's shape, CORS, the key.

Order, outermost first: `shape_errors` (all others may raise), `answer_preflight`, `require_key`.
"""

import logging
import re
import secrets
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from helixd import logs
from helixd.api.auth import client_of
from helixd.api.errors import ApiError, of_http, of_refused, where
from helixd.api.state import CLIENT, REQUEST_ID, STATE
from helixd.coordinator.generation import Refused

log = logging.getLogger("helixd.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PUBLIC: web.AppKey[frozenset[web.AbstractResource]] = web.AppKey("helixd.api.public", frozenset)

REQUEST_ID_HEADER = "x-request-id"
SERVER = "helixd"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_request_id() -> str:
    """An id for a request that brought none."""
    return f"req_{secrets.token_hex(12)}"


def request_id_of(request: web.BaseRequest) -> str:
    """The client's own request id if it is well formed, else a new one; the same each time it is asked for."""
    if REQUEST_ID not in request:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else new_request_id()
    return request[REQUEST_ID]


@web.middleware
async def shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every error OpenAI's shape, count it, and log the unexpected without a word of the request."""
    try:
        return await handler(request)
    except ApiError as error:
        answer = error
    except Refused as refused:
        answer = of_refused(refused)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        answer = of_http(error)
    except ConnectionError:
        raise
    except Exception as error:
        kind = type(error).__name__
        logs.event(log, logging.ERROR, "request_failed", request=request_id_of(request), error=kind, at=where(error))
        answer = ApiError(500, "The server failed to answer this request.", code="internal_error")
    request.app[STATE].metrics.rejected(answer.code or f"http_{answer.status}")
    return answer.response()


@web.middleware
async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a browser's CORS preflight, which carries no key."""
    if (
        request.method == "OPTIONS"
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        and allowed_origin(request)
    ):
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "Authorization, Content-Type")
        return web.Response(
            status=204,
            headers={
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: asked,
                hdrs.ACCESS_CONTROL_MAX_AGE: "600",
            },
        )
    return await handler(request)


@web.middleware
async def require_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let nobody through without a key, unless the matched resource is public or the API is open."""
    if request.match_info.route.resource not in request.app[PUBLIC]:
        request[CLIENT] = client_of(request.headers.get(hdrs.AUTHORIZATION), request.app[STATE].options.key_digests)
    return await handler(request)


def allowed_origin(request: web.Request) -> str | None:
    """The request's origin, if CORS is on for it."""
    origin = request.headers.get(hdrs.ORIGIN)
    origins = request.app[STATE].options.cors_origins
    return origin if origin is not None and (origin in origins or "*" in origins) else None


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Before any response's headers go out: the request's id, and CORS where it is on."""
    response.headers[REQUEST_ID_HEADER] = request_id_of(request)
    response.headers[hdrs.SERVER] = SERVER
    if request.app[STATE].options.cors_origins:
        response.headers[hdrs.VARY] = hdrs.ORIGIN
        if origin := allowed_origin(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = f"{REQUEST_ID_HEADER}, x-helixd-route, Retry-After"
