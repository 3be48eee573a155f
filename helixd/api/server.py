"""The application and its listening socket.

`create_app` binds the routes to a coordinator's `Service` and a model's `TextTools`; `serve` listens until left.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from ssl import SSLContext

from aiohttp import web
from prometheus_client import CollectorRegistry

from helixd import logs
from helixd.api import generate, health, models, tokenize
from helixd.api.connection import Connection
from helixd.api.metrics import ApiMetrics
from helixd.api.middleware import PUBLIC, Handler, add_headers, answer_preflight, require_key, shape_errors
from helixd.api.openapi import openapi
from helixd.api.options import ApiOptions
from helixd.api.request_body import continue_later
from helixd.api.state import STATE, ApiState, InFlight
from helixd.api.text import TextThreads, TextTools
from helixd.coordinator.generation import Service

log = logging.getLogger("helixd.api")

PUBLIC_PATHS = ("/healthz", "/readyz", "/health")


@dataclass(frozen=True, slots=True)
class Bound:
    """Where the API listens."""

    host: str
    port: int
    encrypted: bool = False

    @property
    def url(self) -> str:
        """`http://host:port` (or https), with an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.encrypted else 'http'}://{host}:{self.port}"


def create_app(
    service: Service, text: TextTools, options: ApiOptions, registry: CollectorRegistry | None = None
) -> web.Application:
    """The application. `registry`: where other rooms' figures are; /metrics shows all of it."""
    app = web.Application(
        middlewares=[shape_errors, answer_preflight, require_key],
    )
    app[STATE] = ApiState(
        service=service,
        text=text,
        options=options,
        metrics=ApiMetrics(registry or CollectorRegistry(), service.model_name, vllm_names=options.vllm_metric_names),
        threads=TextThreads(options.text_threads, options.text_timeout_s),
        in_flight=InFlight(options.per_key_in_flight),
        created=int(datetime.now(UTC).timestamp()),
    )
    app.on_response_prepare.append(add_headers)
    app.on_cleanup.append(_close_threads)
    public = [app.router.add_resource(path) for path in PUBLIC_PATHS]
    for resource, handler in zip(public, (health.healthz, health.readyz, health.healthz), strict=True):
        _add_get(resource, handler)
    app[PUBLIC] = frozenset(public)
    for path, get in (
        ("/version", health.version),
        ("/cluster", health.cluster),
        ("/metrics", health.metrics),
        ("/openapi.json", openapi),
        ("/v1/models", models.list_models),
        ("/v1/models/{id:.+}", models.get_model),
    ):
        _add_get(app.router.add_resource(path), get)
    for path, post in (
        ("/v1/chat/completions", generate.chat_completions),
        ("/v1/completions", generate.completions),
        ("/tokenize", tokenize.tokenize),
        ("/detokenize", tokenize.detokenize),
    ):
        app.router.add_resource(path).add_route("POST", post, expect_handler=continue_later)
    return app


def _add_get(resource: web.Resource, handler: Handler) -> None:
    for method in ("GET", "HEAD"):
        resource.add_route(method, handler)


async def _close_threads(app: web.Application) -> None:
    app[STATE].threads.close()


@asynccontextmanager
async def serve(
    app: web.Application, host: str, port: int, *, ssl_context: SSLContext | None = None
) -> AsyncIterator[Bound]:
    """Listen on `host` and `port` (0: any free one) until left; then let requests end for a moment, and cancel them.

    Raises OSError when the address cannot be bound.
    """
    options = app[STATE].options
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=options.shutdown_timeout_s)
    await runner.setup()
    try:
        server = runner.server
        if server is None:
            raise RuntimeError("aiohttp's runner has no server after its setup")
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: Connection(server, app[STATE].options, loop),
            host,
            port,
            ssl=ssl_context,
            ssl_handshake_timeout=None if ssl_context is None else options.headers_timeout_s,
            backlog=256,
            reuse_address=True,
        )
        try:
            name = listener.sockets[0].getsockname()
            yield Bound(name[0], name[1], ssl_context is not None)
        finally:
            listener.close()
    finally:
        await runner.cleanup()
        await _cancelled(app[STATE])


async def _cancelled(state: ApiState) -> None:
    # aiohttp cancels the handlers it gives up on, but does not wait for what their cancelling has to do.
    try:
        async with asyncio.timeout(state.options.shutdown_timeout_s):
            await state.in_flight.empty()
    except TimeoutError:
        logs.event(log, logging.WARNING, "requests_left", limit_s=state.options.shutdown_timeout_s)
