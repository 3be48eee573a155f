"""The API as HTTP sees it: errors in shape on every path, keys, limits, ids, CORS, what does not get into logs."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from helixd.api.auth import digest_of
from helixd.api.openapi import description
from helixd.api.options import ApiOptions
from helixd.api.server import create_app, serve
from helixd.api.text import TextTools
from helixd.logs import TextFormatter
from tests.functional.api_world import MODEL, ByteTokenizer, FakeService, LineTemplate, World, api_world, say, until
from tests.openai_shapes import validate_error

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def error_of(response: aiohttp.ClientResponse, status: int, code: str | None) -> dict[str, Any]:
    body = await response.json(content_type="application/json")
    validate_error(body)
    assert (response.status, body["error"]["code"]) == (status, code)
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Everything logged, fields and tracebacks included."""
    return "\n".join([caplog.text, *map(TextFormatter().format, caplog.records)])


async def raw_exchange(world: World, data: bytes) -> bytes:
    """What the server answers to `data` until it closes."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(world.bound.host, world.bound.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        return answer


async def first_line(world: World, data: str) -> str:
    """The status line the server answers to `data`."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(world.bound.host, world.bound.port)
        writer.write(data.encode())
        line = await reader.readline()
        writer.close()
        return line.decode()


async def test_paths_and_methods_that_do_not_exist(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:
        for path in ("/", "/v1/embeddings", "/v1/responses", "/v1/chat/completions/", "/healthz/x", "/v1/models/"):
            async with session.get(world.url + path) as response:
                await error_of(response, 404, "unknown_url")
        async with session.get(world.url + CHAT) as response:
            await error_of(response, 405, "method_not_allowed")
            assert response.headers["Allow"] == "POST"
        async with session.delete(world.url + "/healthz") as response:
            await error_of(response, 405, "method_not_allowed")
            assert response.headers["Allow"] == "GET, HEAD"


async def test_what_can_be_got_can_be_asked_for_without_its_body(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:
        for path in ("/healthz", "/readyz", "/v1/models", f"/v1/models/{MODEL}", "/metrics"):
            async with session.get(world.url + path) as whole, session.head(world.url + path) as response:
                assert response.status == whole.status == 200
                assert response.headers["Content-Type"] == whole.headers["Content-Type"]
                assert await response.read() == b""


async def test_bodies_that_are_not_json_objects(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:
        for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
            for data in (b"", b"{", b"[]", b'{"model": NaN}', b'{"model": "\xff"}', b'{"a":' * 5000):
                async with session.post(
                    world.url + path, data=data, headers={"Content-Type": "application/json"}
                ) as response:
                    await error_of(response, 400, "invalid_json")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/json", "Content-Encoding": "deflate"},
    ],
)
async def test_media_that_is_not_taken(session: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    async with api_world() as world, session.post(world.url + CHAT, data=b"x" * 1000, headers=headers) as response:
        await error_of(response, 415, "unsupported_media_type")


async def test_a_body_is_taken_up_to_its_limit(session: aiohttp.ClientSession) -> None:
    async with api_world(options=ApiOptions(body_bytes=1000)) as world:
        body = json.dumps(HI).encode()
        headers = {"Content-Type": "application/json"}
        async with session.post(world.url + CHAT, data=body.ljust(1000), headers=headers) as response:
            assert response.status == 200
        async with session.post(world.url + CHAT, data=body.ljust(1001), headers=headers) as response:
            await error_of(response, 413, "request_too_large")

        async def pieces(size: int) -> AsyncIterator[bytes]:
            yield body
            yield b" " * (size - len(body))

        async with session.post(world.url + CHAT, data=pieces(1000), headers=headers) as response:
            assert response.status == 200
        async with session.post(world.url + CHAT, data=pieces(1001), headers=headers) as response:
            await error_of(response, 413, "request_too_large")


async def test_a_client_that_asks_first_is_refused_before_it_sends(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:
        async with session.post(world.url + CHAT, json=HI, expect100=True) as response:
            assert response.status == 200
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        assert (await first_line(world, f"{head}Content-Length: 99999999\r\n\r\n")).startswith("HTTP/1.1 413 ")
        async with session.post(world.url + CHAT, json=HI, headers={"Expect": "miracles"}) as response:
            await error_of(response, 417, None)


async def test_a_body_that_does_not_come_is_a_timeout() -> None:
    async with api_world(options=ApiOptions(body_timeout_s=0.05)) as world:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        assert (await first_line(world, f"{head}Content-Length: 50\r\n\r\n{{")).startswith("HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nbroken header\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nAuthorization: Bearer sesame" + b"e" * 9000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(200)) + b"\r\n",
    ],
)
async def test_what_is_not_http_gets_an_error_in_shape_and_no_log_of_it(
    caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.set_level(logging.DEBUG)
    async with api_world() as world:
        head, _, body = (await raw_exchange(world, data)).partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
        assert b"x-request-id" in head.lower()
        assert b"server: helixd" in head.lower()
        assert b"aiohttp" not in head
        validate_error(json.loads(body))
    for secret in ("sesame", "garbage", "aaaa"):
        assert secret not in logged(caplog)


async def test_headers_that_do_not_come_close_the_connection() -> None:
    async with api_world(options=ApiOptions(headers_timeout_s=0.05)) as world:
        assert await raw_exchange(world, b"GET /healthz HTTP/1.1\r\nHost: x\r\n") == b""


async def test_one_connection_too_many_is_turned_away(session: aiohttp.ClientSession) -> None:
    async with api_world(options=ApiOptions(connections=1)) as world:
        async with session.get(world.url + "/healthz") as response:
            assert response.status == 200
        head, _, body = (await raw_exchange(world, b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        validate_error(json.loads(body))
        async with session.get(world.url + "/healthz") as response:
            assert response.status == 200


def test_the_daemons_own_event_loop_serves_as_well() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        async with api_world(options=ApiOptions(connections=1)) as world, aiohttp.ClientSession() as session:
            async with session.post(world.url + CHAT, json={**HI, "stream": True}) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            assert (await raw_exchange(world, b"")).startswith(b"HTTP/1.1 503 ")
        async with api_world() as world:
            assert (await raw_exchange(world, b"garbage\r\n\r\n")).startswith(b"HTTP/1.0 400 ")

    uvloop.run(scenario())


KEYED = ApiOptions(key_digests=frozenset({digest_of("sesame")}))


def paths_and_methods() -> list[tuple[str, str]]:
    """Of every route; HEAD goes with GET and is left out."""
    app = create_app(FakeService(), TextTools(ByteTokenizer(), LineTemplate()), ApiOptions())
    routes = [(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None]
    heads = {path for method, path in routes if method == "HEAD"}
    assert heads == {path for method, path in routes if method == "GET"}
    return [(method, path) for method, path in routes if method != "HEAD"]


async def test_every_route_but_health_wants_a_key(session: aiohttp.ClientSession) -> None:
    public = {"/healthz", "/health", "/readyz"}
    async with api_world(options=KEYED) as world:
        walked = paths_and_methods()
        assert public < {path for _, path in walked}
        for method, path in [*walked, ("GET", "/nowhere"), ("OPTIONS", CHAT), ("POST", "/healthz")]:
            async with session.request(method, world.url + path.replace("{id}", MODEL)) as response:
                if path in public and method == "GET":
                    assert response.status == 200, path
                else:
                    await error_of(response, 401, "invalid_api_key")
                    assert response.headers["WWW-Authenticate"] == "Bearer"
        async with session.head(world.url + "/v1/models") as response:
            assert response.status == 401
        key = {"Authorization": "bearer sesame"}
        async with session.get(world.url + "/v1/models", headers=key) as response:
            assert response.status == 200
        async with session.get(world.url + "/nowhere", headers=key) as response:
            await error_of(response, 404, "unknown_url")
        async with session.get(world.url + "/v1/models", headers={**key, "Host": "healthz"}) as response:
            assert response.status == 200
        async with session.get(world.url + "//healthz/../v1/models") as response:
            assert response.status in (401, 404)


async def test_the_openapi_description_has_exactly_the_routes(session: aiohttp.ClientSession) -> None:
    async with api_world() as world, session.get(world.url + "/openapi.json") as response:
        document = await response.json()
    assert document == json.loads(json.dumps(description()))
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item} - {
        ("PARAMETERS", "/v1/models/{id}")
    }
    assert described == set(paths_and_methods())


async def test_a_key_may_have_so_many_requests_in_flight(session: aiohttp.ClientSession) -> None:
    service = FakeService(hold=asyncio.Event())
    options = ApiOptions(key_digests=KEYED.key_digests | {digest_of("other")}, per_key_in_flight=1)
    async with api_world(service, options) as world:

        async def ask(key: str) -> int:
            async with session.post(world.url + CHAT, json=HI, headers={"Authorization": f"Bearer {key}"}) as response:
                return response.status

        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask("sesame"), name="first")
            await until(lambda: service.requests)
            headers = {"Authorization": "Bearer sesame"}
            async with session.post(world.url + CHAT, json=HI, headers=headers) as response:
                await error_of(response, 429, "rate_limit_exceeded")
                assert response.headers["Retry-After"] == "1"
            other = group.create_task(ask("other"), name="other")
            await until(lambda: len(service.requests) == 2)
            assert service.hold is not None
            service.hold.set()
        assert (first.result(), other.result()) == (200, 200)
        assert await ask("sesame") == 200
        assert service.requests[0].client == digest_of("sesame").hex()


@pytest.mark.parametrize(
    ("given", "kept"), [("mine-1._A", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("", False)]
)
async def test_request_ids_are_kept_if_well_formed(session: aiohttp.ClientSession, given: str, kept: bool) -> None:
    async with api_world() as world:
        for path, method in (("/healthz", "GET"), ("/nowhere", "GET"), (CHAT, "POST")):
            async with session.request(method, world.url + path, headers={"x-request-id": given}) as response:
                assert (response.headers["x-request-id"] == given) == kept
                assert 1 <= len(response.headers["x-request-id"]) <= 64


async def test_browsers_are_let_in_only_where_said(session: aiohttp.ClientSession) -> None:
    origin = {"Origin": "https://ui.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with api_world() as world:
        async with session.options(world.url + CHAT, headers=preflight) as response:
            await error_of(response, 405, "method_not_allowed")
        async with session.post(world.url + CHAT, json=HI, headers=origin) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
    options = ApiOptions(key_digests=KEYED.key_digests, cors_origins=("https://ui.example",))
    async with api_world(options=options) as world:
        async with session.options(world.url + CHAT, headers=preflight) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://ui.example"
            assert response.headers["Access-Control-Allow-Headers"] == "authorization"
        key = {"Authorization": "Bearer sesame"}
        async with session.post(world.url + CHAT, json={**HI, "stream": True}, headers=origin | key) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://ui.example"
            assert response.headers["Vary"] == "Origin"
        async with session.options(world.url + CHAT, headers={**preflight, "Origin": "https://evil"}) as response:
            assert response.status == 401
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_health_version_cluster(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:
        for path in ("/healthz", "/health"):
            async with session.get(world.url + path) as response:
                assert await response.json() == {"status": "ok"}
        async with session.get(world.url + "/readyz") as response:
            assert (response.status, await response.json()) == (
                200,
                {"ready": True, "model": MODEL, "detail": {"nodes": 2}},
            )
        world.service.ready = False
        async with session.get(world.url + "/readyz") as response:
            body = await response.json()
            assert (response.status, body["ready"], response.headers["Retry-After"]) == (503, False, "1")
            validate_error({"error": body["error"]})
            assert "38.2 GiB" in body["error"]["message"]
        async with session.get(world.url + "/healthz") as response:
            assert response.status == 200
        async with session.get(world.url + "/version") as response:
            assert set(await response.json()) == {"version"}
        async with session.get(world.url + "/cluster") as response:
            assert (await response.json())["epoch"] == 3


async def test_readiness_keeps_its_details_from_strangers(session: aiohttp.ClientSession) -> None:
    async with api_world(options=KEYED) as world, session.get(world.url + "/readyz") as response:
        assert await response.json() == {"ready": True, "model": MODEL}


async def test_text_to_ids_and_back(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:

        async def post(path: str, **body: Any) -> Any:
            async with session.post(world.url + path, json=body) as response:
                return await response.json()

        answer = await post("/tokenize", model=MODEL, prompt="hé", return_token_strs=True)
        assert answer == {
            "count": 3,
            "max_model_len": 512,
            "tokens": [104, 195, 169],
            "token_strs": ["h", "\\xc3", "\\xa9"],
        }
        assert await post("/detokenize", tokens=answer["tokens"]) == {"prompt": "hé"}
        chat = await post("/tokenize", messages=HI["messages"])
        assert bytes(chat["tokens"]) == b"user: hi\nassistant:"
        assert chat["token_strs"] is None
        chat = await post("/tokenize", messages=HI["messages"], add_generation_prompt=False)
        assert bytes(chat["tokens"]) == b"user: hi\n"
        await post("/tokenize", messages=HI["messages"], chat_template_kwargs={"enable_thinking": False})
        assert world.template.seen[-1][1] == {"enable_thinking": False}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "x", "messages": HI["messages"]}, "prompt"),
            ("/tokenize", {"prompt": 3}, "prompt"),
            ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
            ("/tokenize", {"messages": HI["messages"], "tools": [{"type": "function"}]}, "tools"),
            ("/tokenize", {"messages": HI["messages"], "chat_template_kwargs": {"os": 1}}, "chat_template_kwargs"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [256]}, "tokens"),
            ("/detokenize", {"tokens": [True]}, "tokens"),
        ):
            answer = await post(path, **body)
            validate_error(answer)
            assert answer["error"]["param"] == param


async def test_figures_are_counted_under_both_names(session: aiohttp.ClientSession) -> None:
    async with api_world() as world:
        async with session.post(world.url + CHAT, json={**HI, "n": 2, "frobnicate": 1}) as response:
            assert response.status == 200
        async with session.post(world.url + CHAT, json={**HI, "n": 99}) as response:
            assert response.status == 400
        async with session.get(world.url + "/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            lines = (await response.text()).splitlines()
    for prefix in ("helixd_", "vllm:"):
        assert f'{prefix}prompt_tokens_total{{model_name="{MODEL}"}} 19.0' in lines
        assert f'{prefix}generation_tokens_total{{model_name="{MODEL}"}} 10.0' in lines
        assert f'{prefix}request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 2.0' in lines
        assert f'{prefix}time_to_first_token_seconds_count{{model_name="{MODEL}"}} 1.0' in lines
        assert f'{prefix}inter_token_latency_seconds_count{{model_name="{MODEL}"}} 8.0' in lines
        assert f'{prefix}e2e_request_latency_seconds_count{{model_name="{MODEL}"}} 1.0' in lines
        assert f'{prefix}num_requests_running{{model_name="{MODEL}"}} 0.0' in lines
    assert 'helixd_admission_rejections_total{reason="http_400"} 1.0' in lines
    assert "helixd_unknown_request_fields_total 1.0" in lines
    async with (
        api_world(options=ApiOptions(vllm_metric_names=False)) as world,
        session.get(world.url + "/metrics") as response,
    ):
        assert "vllm:" not in await response.text()


async def test_a_request_is_one_log_line_without_its_text(
    session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def breaks(request: Any) -> AsyncIterator[Any]:
        if request.n < 0:
            yield
        raise LookupError(f"cannot do {bytes(request.prompt)!r}")

    async with api_world(FakeService(say("xyzzy"))) as world:
        body = {**HI, "messages": [{"role": "user", "content": "sesame"}], "user": "sesame", "stop": "sesame"}
        headers = {"Authorization": "Bearer sesame", "x-request-id": "r-1"}
        for stream in (False, True):
            async with session.post(
                f"{world.url}{CHAT}?key=sesame", json={**body, "stream": stream}, headers=headers
            ) as response:
                await response.read()
        lines = [record for record in caplog.records if record.msg == "request"]
        assert len(lines) == 2
        facts = lines[0].helixd_fields  # type: ignore[attr-defined]
        assert (facts["request"], facts["outcome"], facts["finish"]) == ("r-1", "ok", ["stop"])
        assert (facts["prompt_tokens"], facts["completion_tokens"]) == (23, 5)
        assert facts["route"] == ["a[0,4)", "b[4,8)"]
        async with session.post(world.url + CHAT, data=b'{"sesame', headers={"Content-Type": "application/json"}):
            pass
        world.service.script = breaks
        async with session.post(world.url + CHAT, json=body) as response:
            await error_of(response, 500, "internal_error")
            assert "sesame" not in await response.text()
    assert "error=LookupError" in logged(caplog)
    assert "xyzzy" not in logged(caplog)
    assert "sesame" not in logged(caplog)


async def test_text_work_that_takes_too_long_is_refused(session: aiohttp.ClientSession) -> None:
    release = threading.Event()

    class Stuck(LineTemplate):
        def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **scalars: Any) -> str:
            release.wait(10)
            return "late"

    app = create_app(FakeService(), TextTools(ByteTokenizer(), Stuck()), ApiOptions(text_timeout_s=0.05))
    async with serve(app, "127.0.0.1", 0) as bound:
        async with session.post(bound.url + CHAT, json=HI) as response:
            await error_of(response, 504, "timeout")
        async with session.get(bound.url + "/healthz") as response:
            assert response.status == 200
        release.set()


async def test_a_model_without_a_template_takes_completions_only(session: aiohttp.ClientSession) -> None:
    app = create_app(FakeService(), TextTools(ByteTokenizer(), None), ApiOptions())
    async with serve(app, "127.0.0.1", 0) as bound:
        async with session.post(bound.url + CHAT, json=HI) as response:
            await error_of(response, 400, "no_template")
        async with session.post(bound.url + "/v1/completions", json={"model": MODEL, "prompt": "x"}) as response:
            assert response.status == 200
        async with session.post(bound.url + "/v1/completions", json={"model": MODEL, "prompt": ""}) as response:
            assert (await error_of(response, 400, None))["param"] == "prompt"
