"""The model that the network's faults are tried with, and what it answers: a module says PROMPTS and NEW (tokens)."""

from pathlib import Path

import pytest

from tests.daemons import add_tokenizer, byte_tokenizer
from tests.families import VOCAB, exact_checkpoint, reference_tokens


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose greedy answers to PROMPTS have no ties."""
    path = tmp_path_factory.mktemp("model") / "m"
    exact_checkpoint("llama2", path, request.module.PROMPTS, request.module.NEW, 1)
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def texts(request: pytest.FixtureRequest, checkpoint: Path) -> list[str]:
    """What `transformers` answers to PROMPTS."""
    tokenizer, new = byte_tokenizer(VOCAB), request.module.NEW
    return [str(tokenizer.decode(reference_tokens(checkpoint, prompt, new))) for prompt in request.module.PROMPTS]
