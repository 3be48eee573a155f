"""Files that are not what they should be (safetensors headers, config.json, helixd.toml): advice, never a trace."""

import json
import tomllib
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.config.document import documented_defaults
from helixd.config.load import SCHEMA, load
from helixd.config.problems import ConfigErrors
from helixd.errors import ModelError
from helixd.model.config import parse_config
from helixd.model.safetensors_header import header_bytes, parse_header
from tests.budget import examples

SIZES = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 1.0, True, "3", None])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)

ENTRIES = JSON | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "NEW"]) | JSON,
        "shape": st.lists(SIZES, max_size=9) | JSON,
        "data_offsets": st.lists(SIZES, max_size=3) | JSON,
    }
)  # fmt: skip


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that is right, and its data's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for number in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        size = 4
        for length in shape:
            size *= length
        header[f"t{number}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


@given(sound_headers())
@settings(max_examples=examples(50, 500), deadline=None)
def test_a_sound_header_covers_its_file(made: tuple[dict[str, Any], int]) -> None:
    header, size = made
    text = json.dumps(header).encode()
    total = 8 + len(text) + size
    assert header_bytes(len(text).to_bytes(8, "little"), total, "x") == len(text)
    tensors = parse_header(text, "x", total, "x")
    assert sum(ref.nbytes for ref in tensors.values()) == size
    assert all(8 + len(text) <= ref.offset and ref.offset + ref.nbytes <= total for ref in tensors.values())


@given(
    sound_headers(),
    st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3),
    st.integers(0, 4000),
    st.binary(max_size=4),
    st.data(),
)
@settings(max_examples=examples(300, 10_000), deadline=None)
def test_a_bad_header_is_a_model_error_and_reads_never_leave_the_file(
    made: tuple[dict[str, Any], int], extra: dict[str, Any], size: int, noise: bytes, data: st.DataObject
) -> None:
    header, _ = made
    text = json.dumps({**header, **extra}).encode()
    cut = data.draw(st.integers(0, len(text)))
    for tried in (text, text[:cut] + noise + text[cut:], text[:cut], noise, b"[" * 5000):
        total = 8 + len(tried) + size
        try:
            tensors = parse_header(tried, "x", total, "x")
        except ModelError:
            continue
        for ref in tensors.values():
            assert 8 + len(tried) <= ref.offset <= ref.offset + ref.nbytes <= total


@given(st.binary(max_size=9), st.integers(0, 2**40))
def test_a_headers_length_fits_its_file(start: bytes, file_bytes: int) -> None:
    try:
        length = header_bytes(start, file_bytes, "x")
    except ModelError:
        return
    assert 8 + length <= file_bytes


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu", "head_dim": 16, "sliding_window": None,
    "layer_types": None, "num_experts": None, "rope_parameters": None,
}  # fmt: skip
SCALING = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "rope_theta",
                     "original_max_position_embeddings", "attention_factor", "mscale", "partial_rotary_factor"]),
    st.sampled_from(["yarn", "llama3", "dynamic", "linear", "default", 0, 1, 2.0, -1, 1e300, 512, float("nan")]) | JSON,
)  # fmt: skip
FAMILIES = ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"]


@given(st.sampled_from(FAMILIES), st.dictionaries(st.sampled_from(sorted(TINY)), JSON | SCALING | SIZES, max_size=4))
@settings(max_examples=examples(300, 10_000), deadline=None)
def test_any_config_json_is_a_decoder_or_a_model_error(family: str, changed: dict[str, Any]) -> None:
    try:
        config = parse_config({**TINY, "architectures": [family], **changed})
    except ModelError:
        return
    assert config.num_layers >= 1
    assert config.hidden_size >= 1


DEFAULTS = documented_defaults()
UNCOMMENTED = "\n".join(
    line[1:] if line.startswith("#") and "=" in line.split(" ")[1:2] else line for line in DEFAULTS.splitlines()
)
KEYS = sorted(".".join(path) for path in SCHEMA.keys)
TOML_VALUES = st.one_of(
    st.sampled_from([
        "true", "-1", "0", "1e400", "nan", "inf", "'10m'", "'4MiB'", "'-3s'", "''", "[]", "{}", "[[]]", "1979-05-27",
        "'0.0.0.0:1'", "'::1:2'", "'a:99999'", "'cpu'", "['cpu', 'cuda:0']", "9" * 30, "'~'", "'/'", r'"\u0000"',
    ]),
    st.integers().map(str), st.text(max_size=8).map(lambda text: json.dumps(text)),
)  # fmt: skip


def loads(tmp: Path, text: bytes) -> None:
    file = tmp / "helixd.toml"
    file.write_bytes(text)
    try:
        load((), {}, file)
    except ConfigErrors as error:
        problems = error.problems
    else:
        return
    assert problems
    assert all(problem.message for problem in problems)


def test_the_defaults_uncommented_are_a_file(tmp_path_factory: Any) -> None:
    tomllib.loads(UNCOMMENTED)


@given(st.lists(st.tuples(st.sampled_from(KEYS), TOML_VALUES), max_size=5))
@settings(max_examples=examples(150, 5000), deadline=None)
def test_any_value_of_any_key_is_taken_or_a_problem(tmp_path_factory: Any, chosen: list[tuple[str, str]]) -> None:
    text = "\n".join(f"{key} = {value}" for key, value in dict(chosen).items())
    loads(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"))


@given(
    st.integers(0, len(UNCOMMENTED)),
    st.integers(0, 30),
    st.binary(max_size=6) | st.sampled_from([b"[" * 5000, b"9" * 5000, b"'''", b"{a=" * 3000]),
)
@settings(max_examples=examples(150, 5000), deadline=None)
def test_a_damaged_file_is_a_list_of_problems(tmp_path_factory: Any, at: int, gone: int, noise: bytes) -> None:
    text = UNCOMMENTED.encode()
    loads(tmp_path_factory.getbasetemp(), text[:at] + noise + text[at + gone :])
    loads(tmp_path_factory.getbasetemp(), b"cluster.listen = " + noise)
