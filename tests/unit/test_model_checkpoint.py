import json
import shutil
import sys
from pathlib import Path

import pytest

from helixd.errors import ModelError
from helixd.files import served_name
from helixd.model.checkpoint import Checkpoint, parse_eos_ids, resolve_model
from helixd.model.config import parse_config
from helixd.model.names import layer_weights
from tests.unit.model_families import tiny_checkpoint

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "E": 2}, "merges": []},
}


@pytest.fixture
def model_dir(tmp_path):
    target = tmp_path / "tiny-llama"
    shutil.copytree(tiny_checkpoint("Llama"), target)
    (target / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": "E", "chat_template": "{{ eos_token }}"}))
    return target


def change(model_dir, name, **changes):
    path = model_dir / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v is not ...}))


def test_everything_a_coordinator_needs(model_dir):
    with Checkpoint.open(model_dir) as checkpoint:
        assert checkpoint.name == "tiny-llama"
        assert parse_config(json.loads(checkpoint.config_text)) == checkpoint.config
        assert checkpoint.tokenizer.decode([0, 1]) == "ab"
        assert checkpoint.chat_template is not None
        assert checkpoint.chat_template.render([]) == "E"
        assert len(checkpoint.fingerprint) == 32
        (spec,) = layer_weights(checkpoint.config, 0)["o"]
        assert len(checkpoint.index.read(spec.name).data) == 4 * 32 * 32


def test_tokenizer_and_template_are_loaded_only_when_asked_for(model_dir):
    (model_dir / "tokenizer.json").unlink()
    with Checkpoint.open(model_dir) as checkpoint, pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        _ = checkpoint.tokenizer


def test_eos_ids_in_order_of_authority(model_dir):
    def eos():
        with Checkpoint.open(model_dir) as checkpoint:
            return checkpoint.eos_ids

    change(model_dir, "generation_config.json", eos_token_id=[7, 9, 7])
    change(model_dir, "config.json", eos_token_id=5)
    assert eos() == (7, 9)
    change(model_dir, "generation_config.json", eos_token_id=None)
    assert eos() == (5,)
    change(model_dir, "config.json", eos_token_id=...)
    (model_dir / "generation_config.json").unlink()
    assert eos() == (2,)


@pytest.mark.parametrize("value", ["2", [1, "2"], True, -1, 1.5, {}])
def test_eos_ids_of_the_wrong_kind(value):
    with pytest.raises(ModelError, match="eos_token_id"):
        parse_eos_ids({"eos_token_id": value}, "generation_config.json")


def test_a_config_without_dtype_takes_that_of_the_weights(model_dir):
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import load_file, save_file

    halves = {name: tensor.astype(numpy.float16) for name, tensor in load_file(model_dir / "model.safetensors").items()}
    save_file(halves, model_dir / "model.safetensors")
    change(model_dir, "config.json", dtype=...)
    with Checkpoint.open(model_dir) as checkpoint:
        assert checkpoint.config.dtype == "float16"
        assert parse_config(json.loads(checkpoint.config_text)).dtype == "float16"


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(model_dir):
    change(model_dir, "config.json", num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"model\.layers\.3\.input_layernorm\.weight is missing"):
        Checkpoint.open(model_dir)


def test_a_booby_trapped_directory_runs_and_imports_nothing(model_dir, monkeypatch):
    trap = model_dir / "trap.txt"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "json", "jinja2"):
        (model_dir / f"{name}.py").write_text(f"open({str(trap)!r}, 'w').write('sprung')\n")
    (model_dir / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch trap.txt'\ntR.")
    auto_map = {
        "AutoConfig": "configuration_x.C",
        "AutoModelForCausalLM": "modeling_x.M",
        "AutoTokenizer": ["t.T", None],
    }
    change(model_dir, "config.json", auto_map=auto_map, custom_pipelines={"x": {"impl": "modeling_x.P"}})
    change(model_dir, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="tokenization_x.T")
    monkeypatch.chdir(model_dir)
    before = set(sys.modules)
    with Checkpoint.open(model_dir) as checkpoint:
        checkpoint.tokenizer.encode("ab")
        assert checkpoint.chat_template is not None
        assert checkpoint.eos_ids
    assert not trap.exists()
    assert not {name for name in set(sys.modules) - before if name.endswith("_x") or "transformers_modules" in name}


def test_served_names(tmp_path):
    snapshot = tmp_path / "models--meta-llama--Llama-3" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert served_name(snapshot) == "meta-llama/Llama-3"
    assert served_name(tmp_path) == tmp_path.name
    assert served_name(Path("/")) == "model"


def test_resolving_a_model(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(".") == tmp_path.resolve()
    for name in ("meta-llama/Llama-3.1-8B", str(tmp_path / "nope")):
        with pytest.raises(ModelError, match="nothing is downloaded"):
            resolve_model(name)
    packaged = Path(__file__).parents[2] / "helixd" / "demo"
    if not packaged.is_dir():
        pytest.skip("the demo model is not in this tree yet")
    assert resolve_model("demo") == packaged.resolve()
