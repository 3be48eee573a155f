"""Whether the daemon lives, whether it can serve, which version it is, and what its cluster looks like."""

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from helixd import __version__
from helixd.api.answers import json_answer
from helixd.api.envelope import Json
from helixd.api.errors import ApiError
from helixd.api.state import STATE


async def healthz(request: web.Request) -> web.Response:
    """GET /healthz and /health: 200 while the event loop runs; asks nobody else."""
    return json_answer({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """GET /readyz: 200 when a complete pipeline exists and the daemon is not draining, else 503 with the reason.

    Needs no key, so with keys configured the details stay in /cluster.
    """
    state = request.app[STATE]
    readiness = state.service.readiness()
    body: Json = {"ready": readiness.ready, "model": state.service.model_name}
    if not state.options.key_digests:
        body["detail"] = dict(readiness.detail)
    if readiness.ready:
        return json_answer(body)
    error = ApiError(503, readiness.message, code=readiness.code)
    return json_answer({**body, **error.body()}, status=503, headers={"Retry-After": "1"})


async def version(request: web.Request) -> web.Response:
    """GET /version."""
    return json_answer({"version": __version__})


async def cluster(request: web.Request) -> web.Response:
    """GET /cluster: nodes, ranges, links, epoch, load, as the coordinator sees them."""
    return json_answer(request.app[STATE].service.cluster_view())


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics, for Prometheus."""
    body = request.app[STATE].metrics.exposition()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
