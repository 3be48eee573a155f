"""Requests made from the server's own OpenAPI description, sound and unsound: no 5xx, every error well-formed.

300 requests in CI, 2,000 with `--long`, shared by the operations.
"""

import asyncio
import importlib.util
import threading
from collections.abc import Iterator

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixd.api.openapi import description
from tests.budget import examples
from tests.functional.api_world import MODEL, api_world

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None,
    reason="schemathesis is not installed: pip install -e '.[fuzz]'",
)
REQUESTS = examples(300, 2000)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A listening API in a thread of its own."""
    bound: list[str] = []
    up, loop = threading.Event(), asyncio.new_event_loop()
    over = asyncio.Event()

    async def run() -> None:
        async with api_world() as world:
            bound.append(world.url)
            up.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), name="api")
    thread.start()
    assert up.wait(10)
    yield bound[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(10)
    loop.close()


def test_no_request_made_from_the_description_breaks_the_server(url: str) -> None:
    import schemathesis
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(description())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 10
    seen: dict[int, int] = {}
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    made = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]

    @given(st.one_of(made))
    @settings(max_examples=REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body and isinstance(case.body["model"], str):
            # Without this nearly every request ends at a model that does not exist.
            case.body["model"] = MODEL
        answer = case.call(base_url=url, timeout=30)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (case, answer.text)
        if answer.status_code >= 400:
            jsonschema.validate(answer.json(), ERROR)

    send()
    print(seen)
    assert seen.get(200, 0) > 10
    assert seen.get(400, 0) > 10
