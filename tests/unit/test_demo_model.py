"""The packaged demo model: whole, small, loadable as it lies, and a model of Python rather than of noise."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

import helixd

DEMO_DIR = Path(helixd.__file__).parent / "demo"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}

# Written for this test, so no corpus holds it.
SNIPPET = '''\
class Shelf:
    """A shelf that holds books in the order of their arrival."""

    def __init__(self, name, limit=None):
        self.name = name
        self.limit = limit
        self.books = []

    def add(self, book):
        if self.limit is not None and len(self.books) >= self.limit:
            raise ValueError("the shelf is full")
        self.books.append(book)
        return self

    def __len__(self):
        return len(self.books)

    def __repr__(self):
        return f"{self.__class__.__name__}({self.name!r}, {len(self)} books)"
'''


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DEMO_DIR, dtype=torch.float32).eval()


def nats_per_token(model: LlamaForCausalLM, ids: list[int]) -> float:
    row = torch.tensor([ids])
    with torch.inference_mode():
        return float(model(input_ids=row, labels=row).loss)


def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    row = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return tokenizer.decode(out[0].tolist())


def render(messages: list[dict[str, Any]]) -> str:
    text = AutoTokenizer.from_pretrained(DEMO_DIR).apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def test_the_package_holds_every_file_in_under_ten_megabytes() -> None:
    assert {path.name for path in DEMO_DIR.iterdir()} == FILES
    assert sum(path.stat().st_size for path in DEMO_DIR.iterdir()) < 10_000_000


def test_there_are_layers_enough_to_split_and_positions_enough_to_talk() -> None:
    config = json.loads((DEMO_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 12
    assert config["max_position_embeddings"] >= 1024


@pytest.mark.parametrize("text", [SNIPPET, "\tif x:\r\n\t\ty = 'ä€😀'\n\n\n", "", "    \n  x  \n", "\x00\x7f\\"])
def test_the_tokenizer_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.decode(encoding.ids) == text


def test_the_tokenizer_compresses_python(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(SNIPPET).ids) < len(SNIPPET) / 2.5


def test_python_it_never_saw_is_likelier_than_chance_by_far(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    loss = nats_per_token(model, tokenizer.encode(SNIPPET).ids)
    assert loss < 2.6 < math.log(model.config.vocab_size) / 2


def test_shuffled_python_is_less_likely(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SNIPPET).ids
    assert nats_per_token(model, ids[:1] + ids[:0:-1]) > nats_per_token(model, ids) + 2


@pytest.mark.parametrize("prompt", ["def ", "class Foo:\n    def __init__(self"])
def test_greedy_text_looks_like_python(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> None:
    new = greedy(model, tokenizer, prompt, 96)[len(prompt) :]
    assert ":\n    " in new
    assert any(word in new.split() for word in ("def", "return", "if", "class", "self"))
    assert len(set(new.split())) > 5, "a loop of a few words is not a program"


def test_samples_after_an_import_go_on_to_a_program(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    # Greedy decoding repeats `import os` without end; at the temperature that its README recommends it must not.
    # Bounds lie below what any of five seeds gave (5 to 8, and 3 to 5), since rounding differs between machines.
    prompt = "import os\n"
    rows = torch.tensor([tokenizer.encode(prompt).ids] * 8)
    torch.manual_seed(0)
    out = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        temperature=0.7,
        top_k=0,
        max_new_tokens=160,
        pad_token_id=0,
    )
    texts = [tokenizer.decode(row.tolist())[len(prompt) :] for row in out]
    assert sum(len(set(text.split())) > 10 for text in texts) >= 4
    assert sum("def " in text or "class " in text or "= " in text for text in texts) >= 2


def test_it_can_end_a_text(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    row = torch.tensor([tokenizer.encode(SNIPPET + "\n\nif __name__ == '__main__':\n    main()\n").ids])
    with torch.inference_mode():
        end = float(model(input_ids=row).logits[0, -1].softmax(-1)[0])
    assert end > 0.01


def test_the_chat_template_writes_a_program_that_awaits_its_code() -> None:
    assert render([{"role": "user", "content": "Read a file. "}]) == '<|endoftext|>"""Read a file."""\n'


def test_the_chat_template_takes_every_role() -> None:
    text = render(
        [
            {"role": "system", "content": "Two\nlines"},
            {"role": "developer", "content": "Third"},
            {"role": "user", "content": 'Say """hi"""'},
            {"role": "assistant", "content": "print('hi')"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "Again"},
        ]
    )
    assert text == (
        '<|endoftext|># Two\n# lines\n# Third\n"""Say \'\'\'hi\'\'\'"""\nprint(\'hi\')\n\n\n\n\n\n"""Again"""\n'
    )
