"""Reading a request's body off the socket: what is refused before a byte of it is read, and how long it may take."""

import asyncio

from aiohttp import StreamReader, hdrs, web

from helixd.api.errors import JSON_TYPE, ApiError
from helixd.api.options import ApiOptions


async def continue_later(request: web.Request) -> web.Response | None:
    """aiohttp's hook for `Expect`: say nothing yet, so that a refusal comes before the body is sent."""
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        return None
    return ApiError(417, "Expect: 100-continue is the only expectation this server knows.").response()


async def read_body(request: web.Request, options: ApiOptions) -> bytes:
    """The whole body. Raises 415 (encoding, media type), 413 (size), 408 (time), 400 (broken off)."""
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
    if encoding != "identity":
        raise _unsupported_media("Compressed request bodies are not accepted; send plain JSON.")
    if request.content_type != JSON_TYPE:
        raise _unsupported_media(f"The request must have Content-Type: {JSON_TYPE}.")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise _unsupported_media("The request body must be UTF-8.")
    if request.content_length is not None and request.content_length > options.body_bytes:
        raise too_large(options.body_bytes)
    if hdrs.EXPECT in request.headers:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The interim response is not part of the answer's size; aiohttp takes any output for a started answer.
        request.writer.output_size = 0
    try:
        async with asyncio.timeout(options.body_timeout_s):
            return await _read_up_to(request.content, options.body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"The request body did not arrive within {options.body_timeout_s:g} s.", code="timeout"
        ) from None
    except web.RequestPayloadError:
        raise ApiError(400, "The request body broke off or is not framed as its headers say.") from None


async def _read_up_to(content: StreamReader, limit_bytes: int) -> bytes:
    # aiohttp's own limit is fixed when the application is made.
    body = bytearray()
    while chunk := await content.readany():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large(limit_bytes)
    return bytes(body)


def too_large(limit_bytes: int) -> ApiError:
    """The 413."""
    return ApiError(413, f"The request body must not exceed {limit_bytes} bytes.", code="request_too_large")


def _unsupported_media(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")
