"""Every error the HTTP surface answers with, in OpenAI's four-field shape.

An `ApiError` is raised wherever a request turns out to be wrong and becomes a response in one place (`middleware`), or
an error event when the headers are gone already (`sse`). Messages name fields, types and numbers, never a
client's text.
"""

import math
from collections.abc import Mapping

import msgspec
from aiohttp import web

from helixd.coordinator.generation import Failed, Refused
from helixd.errors import HelixError

JSON_TYPE = "application/json"

_TYPES = {403: "permission_error", 429: "rate_limit_error"}

# A generation that failed after it was admitted: which HTTP status says so best.
_FAILED_STATUS = {"timeout": 504, "internal_error": 500, "rate_limit_exceeded": 429}


class ApiError(HelixError):
    """An answer that is not what the client hoped for: HTTP status, OpenAI's four fields, extra headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's error type, which follows from the status."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, object]:
        """`{"error": {...}}` with exactly the four fields."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """The error as an HTTP response."""
        return web.Response(
            status=self.status, body=msgspec.json.encode(self.body()), content_type=JSON_TYPE, headers=self.headers
        )


def bad_field(param: str, message: str) -> ApiError:
    """A 400 about the value of `param`; `message` goes on after the name ("must be ...")."""
    return ApiError(400, f"`{param}` {message}", param=param)


def unsupported_field(param: str, message: str) -> ApiError:
    """A 400 for a field, or a value of it, that means something this server does not do."""
    return ApiError(400, f"`{param}` {message}", param=param, code="unsupported_parameter")


def context_too_long(
    param: str, prompt_tokens: int, max_tokens: int | None, context_tokens: int, *, or_more: bool = False
) -> ApiError:
    """A 400 for a prompt that, with the output asked for, does not fit the context.

    `or_more`: not all of the prompt was counted.
    """
    wanted = "at least 1" if max_tokens is None else str(max_tokens)
    prompt = f"more than {prompt_tokens}" if or_more else str(prompt_tokens)
    return ApiError(
        400,
        f"This model's context holds {context_tokens} tokens; the request needs {prompt} for the prompt and "
        f"{wanted} for the completion. Shorten the prompt or ask for fewer tokens.",
        param=param,
        code="context_length_exceeded",
    )


def model_not_found(asked: str, served: str) -> ApiError:
    """A 404 for a model this server does not serve."""
    shown = asked if len(asked) <= 200 and asked.isprintable() else "asked for"
    return ApiError(
        404, f"The model `{shown}` does not exist here; `{served}` does.", param="model", code="model_not_found"
    )


def of_refused(refused: Refused) -> ApiError:
    """The coordinator's refusal as an HTTP error."""
    headers: dict[str, str] = {}
    if refused.retry_after_s is not None:
        # Retry-After is in whole seconds; rounding down would invite the client back too early.
        headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after_s)))
    if refused.permanent:
        headers["x-should-retry"] = "false"
    return ApiError(refused.status, refused.message, code=refused.code, param=refused.param, headers=headers)


def of_failed(failed: Failed) -> ApiError:
    """A generation's failure as an HTTP error; clients are told not to repeat what was retried here already."""
    status = _FAILED_STATUS.get(failed.code, 503)
    return ApiError(status, failed.message, code=failed.code, headers={"x-should-retry": "false"})


def of_http(error: web.HTTPException) -> ApiError:
    """aiohttp's own 404, 405, 413 and the like in our shape."""
    if error.status == 404:
        return ApiError(404, "There is nothing at this path; /openapi.json lists what there is.", code="unknown_url")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"This path does not take the method; it takes {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    if error.status == 413:
        return ApiError(413, "The request body is too large.", code="request_too_large")
    return ApiError(error.status, error.reason or "The request failed.")


def where(error: BaseException) -> str:
    """Where an unexpected error came from. Never its message: that may repeat what a client wrote."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno}:{code.co_name}")
        traceback = traceback.tb_next
    return " > ".join(frames[-8:]) or "unknown"
