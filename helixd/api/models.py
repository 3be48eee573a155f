"""/v1/models: the served model, once it can be served."""

from aiohttp import web

from helixd.api.answers import json_answer
from helixd.api.envelope import Json
from helixd.api.errors import ApiError, model_not_found
from helixd.api.state import STATE, ApiState


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models: empty while no complete pipeline exists."""
    state = request.app[STATE]
    models = [_model(state)] if state.service.readiness().ready else []
    return json_answer({"object": "list", "data": models})


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}; ids may hold slashes."""
    state = request.app[STATE]
    asked = request.match_info["id"]
    if asked != state.service.model_name:
        raise model_not_found(asked, state.service.model_name)
    readiness = state.service.readiness()
    if not readiness.ready:
        raise ApiError(503, readiness.message, code=readiness.code, headers={"Retry-After": "1"})
    return json_answer(_model(state))


def _model(state: ApiState) -> Json:
    return {"id": state.service.model_name, "object": "model", "created": state.created, "owned_by": "helixd"}
