"""/openapi.json: this server's surface as an OpenAPI 3.1 description.

Paths and answers are kept by hand; request fields come from the same tables as the parser. A test compares the paths
with the routes.
"""

from aiohttp import web

from helixd import __version__
from helixd.api.answers import json_answer
from helixd.api.fields import CHAT_FIELDS, COMPLETION_FIELDS, DETOKENIZE_FIELDS, TOKENIZE_FIELDS, request_schema

Schema = dict[str, object]

_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_OBJECT: Schema = {"type": "object"}
_NULLABLE_STRING: Schema = {"type": ["string", "null"]}
_TOKENS: Schema = {"type": "array", "items": _INTEGER}


def _record(**properties: Schema) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: Schema, media_type: str = "application/json") -> Schema:
    return {"description": description, "content": {media_type: {"schema": schema}}}


_ERRORS: Schema = {"default": {"$ref": "#/components/responses/Error"}}


def _get(summary: str, schema: Schema, media_type: str = "application/json") -> Schema:
    return {"get": {"summary": summary, "responses": {"200": _answer("OK", schema, media_type), **_ERRORS}}}


def _post(summary: str, body: str, answer: Schema, *, stream: bool = False) -> Schema:
    ok = _answer("OK", answer)
    if stream:
        media = ok["content"]
        ok["content"] = {**(media if isinstance(media, dict) else {}), "text/event-stream": {"schema": _STRING}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
            "responses": {"200": ok, **_ERRORS},
        }
    }


_USAGE = _record(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_FINISH: Schema = {"enum": ["stop", "length"]}
_LOGPROBS: Schema = {"type": ["object", "null"]}


def _completion(kind: str, choice: Schema) -> Schema:
    return _record(
        id=_STRING,
        object={"const": kind},
        created=_INTEGER,
        model=_STRING,
        system_fingerprint=_STRING,
        choices={"type": "array", "items": choice},
        usage=_USAGE,
    )


_SCHEMAS: Schema = {
    "Error": _record(error=_record(message=_STRING, type=_STRING, param=_NULLABLE_STRING, code=_NULLABLE_STRING)),
    "ChatRequest": request_schema(CHAT_FIELDS),
    "CompletionRequest": request_schema(COMPLETION_FIELDS),
    "ChatCompletion": _completion(
        "chat.completion",
        _record(
            index=_INTEGER,
            message=_record(role={"const": "assistant"}, content=_STRING, refusal={"type": "null"}),
            logprobs=_LOGPROBS,
            finish_reason=_FINISH,
        ),
    ),
    "Completion": _completion(
        "text_completion", _record(index=_INTEGER, text=_STRING, logprobs=_LOGPROBS, finish_reason=_FINISH)
    ),
    "Model": _record(id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING),
    "ModelList": _record(object={"const": "list"}, data={"type": "array", "items": _ref("Model")}),
    "TokenizeRequest": request_schema(TOKENIZE_FIELDS),
    "Tokens": _record(
        count=_INTEGER,
        max_model_len=_INTEGER,
        tokens=_TOKENS,
        token_strs={"type": ["array", "null"], "items": _STRING},
    ),
    "DetokenizeRequest": request_schema(DETOKENIZE_FIELDS),
    "Prompt": _record(prompt=_STRING),
}


def _model_path() -> Schema:
    path = _get("One model", _ref("Model"))
    path["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": _STRING}]
    return path


def _public(path: Schema) -> Schema:
    get = path["get"]
    return {"get": {**(get if isinstance(get, dict) else {}), "security": []}}


def description() -> Schema:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "helixd", "version": __version__},
        "security": [{"bearer": []}],
        "paths": {
            "/v1/chat/completions": _post("Answer a conversation", "ChatRequest", _ref("ChatCompletion"), stream=True),
            "/v1/completions": _post("Continue a text", "CompletionRequest", _ref("Completion"), stream=True),
            "/v1/models": _get("The models that can be used now", _ref("ModelList")),
            "/v1/models/{id}": _model_path(),
            "/tokenize": _post("Text or messages to token ids", "TokenizeRequest", _ref("Tokens")),
            "/detokenize": _post("Token ids to text", "DetokenizeRequest", _ref("Prompt")),
            "/healthz": _public(_get("Whether the daemon lives", _record(status=_STRING))),
            "/health": _public(_get("The same as /healthz", _record(status=_STRING))),
            "/readyz": _public(
                _get("Whether requests can be served", {**_record(ready={"type": "boolean"}, model=_STRING)})
            ),
            "/version": _get("The daemon's version", _record(version=_STRING)),
            "/cluster": _get("Nodes, layer ranges, links, epoch, load", _OBJECT),
            "/metrics": _get("Figures for Prometheus", _STRING, "text/plain"),
            "/openapi.json": _get("This description", _OBJECT),
        },
        "components": {
            "schemas": _SCHEMAS,
            "responses": {"Error": _answer("An error", _ref("Error"))},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    return json_answer(description())
