"""Memory: the coordinator never holds the model; a worker holds its layers, its KV and a stated constant; a restart
of a worker without a local copy fetches nothing again."""

from pathlib import Path

import psutil
import pytest
import torch
import transformers

from helixd.engine.memory import RUNTIME_BYTES
from tests.daemons import Daemon, add_tokenizer, completion, daemons

MIB = 1 << 20
SMALL_CHANGE = 64 * MIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 MiB of random bfloat16 weights in 8 layers."""
    path = tmp_path_factory.mktemp("memory") / "m"
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=2048, max_position_embeddings=2048, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(path)
    add_tokenizer(path)
    return path


def peak_bytes(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_nobody_holds_more_than_its_share(checkpoint: Path, tmp_path: Path) -> None:
    model_bytes = (checkpoint / "model.safetensors").stat().st_size
    assert model_bytes > 200 * MIB
    with daemons(tmp_path) as made:
        coordinator = made.coordinator(checkpoint, "--set", "planner.wait_for_nodes=2")
        made.worker("w1", "220MiB")
        made.worker("w2", "220MiB")
        made.wait_ready()
        completion(made, [1, 2, 3], 8).read()
        view = made.get("/cluster")
        held = {node["id"]: node["layers"] for node in view["nodes"]}
        assert all(held.values())
        print(f"coordinator: {peak_bytes(coordinator) / MIB:.0f} MiB at most, model {model_bytes / MIB:.0f} MiB")
        assert peak_bytes(coordinator) < model_bytes - SMALL_CHANGE
        for name, (start, end) in held.items():
            share = (end - start) * view["model"]["layer_bytes"]
            assert share < model_bytes
            resident = psutil.Process(made.all[name].process.pid).memory_info().rss
            print(f"{name}: {resident / MIB:.0f} MiB resident, {share / MIB:.0f} MiB of layers")
            assert resident < share + RUNTIME_BYTES["cpu"]
        made.wait_idle()
        cached = {file: file.stat().st_mtime_ns for file in (tmp_path / "w1" / "cache").rglob("*.safetensors")}
        assert len(cached) >= held["w1"][1] - held["w1"][0]
        assert not list((tmp_path / "w1" / "cache").rglob("*.partial"))
        made.all["w1"].kill()
        made.restart("w1")
        made.wait(lambda: made.get("/cluster")["epoch"] is not None, "a plan")
        made.wait_ready()
        assert {file: file.stat().st_mtime_ns for file in cached} == cached
        assert completion(made, [1, 2, 3], 8).read().done
