import json
import math
import os
import struct

import pytest

from helixd.errors import ModelError
from helixd.layers import LayerRange
from helixd.model.config import parse_config
from helixd.model.index import SafetensorsIndex, fingerprint
from helixd.model.safetensors_header import MAX_HEADER_BYTES
from helixd.model.sizes import check_tensors, required_tensors
from helixd.model.weights import RawTensor, WeightSource

SHARDED = "model.safetensors.index.json"
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def shard(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(model_dir, header, data=b"", **options):
    (model_dir / "model.safetensors").write_bytes(shard(header, data, **options))
    return model_dir


def write_shards(model_dir, weight_map, shards):
    (model_dir / SHARDED).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for name, content in shards.items():
        (model_dir / name).write_bytes(content)
    return model_dir


def two_tensors(first=(0, 16), second=(16, 20), dtype="F32"):
    return {
        "a": {"dtype": dtype, "shape": [2, 2], "data_offsets": list(first)},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": list(second)},
    }


def test_reads_what_was_written(tmp_path):
    data = bytes(range(20))
    write(tmp_path, {"__metadata__": {"format": "pt"}, **two_tensors()}, data)
    with SafetensorsIndex.open(tmp_path) as index:
        source: WeightSource = index
        assert source.read("a") == RawTensor("float32", (2, 2), bytearray(data[:16]))
        assert source.read("b") == RawTensor("bfloat16", (2,), bytearray(data[16:]))
        assert "a" in source
        assert "__metadata__" not in source
        assert index.read_range("b", 1, 2) == data[17:19]
        assert index.read_range("b", 4, 0) == b""
        for offset, length in ((-1, 2), (3, 2), (0, -1), (5, 0)):
            with pytest.raises(ModelError, match="'b' has 4 bytes"):
                index.read_range("b", offset, length)
        with pytest.raises(ModelError, match=r"no tensor 'model\.norm'"):
            index.read("model.norm")
    with pytest.raises(ModelError, match="closed"):
        index.read("a")
    index.close()


def test_reads_what_the_safetensors_library_writes(tmp_path):
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    tensors = {f"t{i}": numpy.arange(i * 3, dtype=numpy.float16).reshape(3, i) for i in range(5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    with SafetensorsIndex.open(tmp_path) as index:
        for name, tensor in tensors.items():
            assert index.read(name) == RawTensor("float16", tensor.shape, bytearray(tensor.tobytes()))


def test_a_sharded_checkpoint(tmp_path):
    one, two = shard({"a": ENTRY}, b"x" * 16), shard({"b": ENTRY, "c": {**ENTRY, "data_offsets": [16, 32]}}, b"y" * 32)
    write_shards(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"}, {"m-1.safetensors": one})
    with pytest.raises(ModelError, match=r"m-2\.safetensors is missing"):
        SafetensorsIndex.open(tmp_path)
    (tmp_path / "m-2.safetensors").write_bytes(two)
    with SafetensorsIndex.open(tmp_path) as index:
        assert index.read("b").data == b"y" * 16
        assert "c" not in index
        assert index.shard_bytes == {"m-1.safetensors": len(one), "m-2.safetensors": len(two)}


def test_a_tensor_that_its_shard_does_not_have(tmp_path):
    write_shards(tmp_path, {"z": "m.safetensors"}, {"m.safetensors": shard({"a": ENTRY}, b"x" * 16)})
    with pytest.raises(ModelError, match=r"m\.safetensors has no tensor 'z'"):
        SafetensorsIndex.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/etc/m.safetensors", "a/m.safetensors", "m.bin", "", "..", "m\n"]
)
def test_shard_names_are_plain(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "m.safetensors").write_bytes(shard({"a": ENTRY}, b"x" * 16))
    write_shards(inner, {"a": name}, {})
    with pytest.raises(ModelError, match="shard name"):
        SafetensorsIndex.open(inner)


def test_links_lead_inside_the_directory_or_its_cache_entry(tmp_path):
    good = shard({"a": ENTRY}, b"x" * 16)
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "123").write_bytes(good)
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    SafetensorsIndex.open(snapshot).close()

    (tmp_path / "outside").write_bytes(good)
    for target in (tmp_path / "outside", entry / ".." / "outside"):
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(target)
        with pytest.raises(ModelError, match="outside the model directory"):
            SafetensorsIndex.open(snapshot)


def test_a_fifo_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        SafetensorsIndex.open(tmp_path)


def test_neither_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="only safetensors"):
        SafetensorsIndex.open(tmp_path)
    (tmp_path / SHARDED).write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        SafetensorsIndex.open(tmp_path)


BROKEN = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "header beyond the file": (shard(b"{}", length=3), "states a header of 3 bytes"),
    "huge header": (shard(b"{}", length=MAX_HEADER_BYTES + 1), f"header of {MAX_HEADER_BYTES + 1}"),
    "absurd header": (shard(b"{}", length=2**64 - 1), "states a header"),
    "not json": (shard(b"{nope"), "not valid JSON"),
    "not utf-8": (shard(b'{"\xff": 1}'), "not valid JSON"),
    "too deep": (shard(b"[" * 200_000), "not valid JSON"),
    "not an object": (shard([]), "not a JSON object"),
    "a name twice": (shard(b'{"a": {}, "a": {}}'), "a name occurs twice"),
    "entry is no object": (shard({"a": 3}), "'a': the entry is not an object"),
    "no dtype": (shard({"a": {**ENTRY, "dtype": 1}}, b"x" * 16), "'a': no dtype"),
    "negative dimension": (shard({"a": {**ENTRY, "shape": [-2, -2]}}, b"x" * 16), "'a': bad shape"),
    "boolean dimension": (shard({"a": {**ENTRY, "shape": [True, 4]}}, b"x" * 16), "'a': bad shape"),
    "nine dimensions": (shard({"a": {**ENTRY, "shape": [1] * 8 + [4]}}, b"x" * 16), "'a': bad shape"),
    "overflowing dimension": (shard({"a": {**ENTRY, "shape": [2**63, 4]}}, b"x" * 16), "'a': bad shape"),
    "one offset": (shard({"a": {**ENTRY, "data_offsets": [0]}}, b"x" * 16), "bad data_offsets"),
    "backwards": (shard({"a": {**ENTRY, "data_offsets": [16, 0]}}, b"x" * 16), "end before they begin"),
    "shape and size differ": (shard({"a": {**ENTRY, "shape": [2, 3]}}, b"x" * 16), "16 bytes of data for shape [2, 3]"),
    "flipped dtype": (shard({"a": {**ENTRY, "dtype": "BF16"}}, b"x" * 16), "of BF16"),
    "overlap": (shard(two_tensors((0, 16), (12, 16)), b"x" * 16), "'b' overlaps the one before it"),
    "same place": (shard(two_tensors((0, 16), (0, 4)), b"x" * 16), "overlaps the one before it"),
    "gap": (shard(two_tensors((0, 16), (17, 21)), b"x" * 21), "'b' leaves a gap"),
    "truncated": (shard(two_tensors(), b"x" * 19), "truncated: tensor 'b'"),
    "left over": (shard(two_tensors(), b"x" * 21), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_and_named(tmp_path, case):
    content, says = BROKEN[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as error:
        SafetensorsIndex.open(tmp_path)
    assert says in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_the_largest_header_is_accepted_by_its_length(tmp_path):
    """One byte above the limit is refused as a length; at the limit the file's own size decides."""
    write(tmp_path, b"{}", length=MAX_HEADER_BYTES)
    with pytest.raises(ModelError, match=f"header of {MAX_HEADER_BYTES} bytes, the file has 10"):
        SafetensorsIndex.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(8 + MAX_HEADER_BYTES)
    with pytest.raises(ModelError, match="not valid JSON"):
        SafetensorsIndex.open(tmp_path)


def test_a_failed_open_leaves_no_file_open(tmp_path):
    write_shards(
        tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, {"a.safetensors": shard({"a": ENTRY}, b"x" * 16)}
    )
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ModelError):
        SafetensorsIndex.open(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_dtype_that_is_not_computed_with_may_lie_there_unread(tmp_path):
    write(tmp_path, {**two_tensors((0, 4), (4, 8), "I8")}, b"x" * 8)
    with SafetensorsIndex.open(tmp_path) as index:
        assert index.read("b").data == b"xxxx"
        with pytest.raises(ModelError, match="'a' is I8"):
            index.read("a")


def test_a_file_cut_short_while_in_use_is_an_error_not_a_crash(tmp_path):
    write(tmp_path, two_tensors(), b"x" * 20)
    with SafetensorsIndex.open(tmp_path) as index:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(len(shard(two_tensors())) + 18)
        assert index.read("a").data == b"x" * 16
        with pytest.raises(ModelError, match="cut short while in use: tensor 'b'"):
            index.read("b")


def test_a_file_replaced_by_renaming_is_still_the_one_that_was_checked(tmp_path):
    write(tmp_path, two_tensors(), b"x" * 20)
    with SafetensorsIndex.open(tmp_path) as index:
        (tmp_path / "new").write_bytes(b"")
        (tmp_path / "new").rename(tmp_path / "model.safetensors")
        assert index.read("a").data == b"x" * 16


def small_config():
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 16,
        }
    )


def write_model(model_dir, changes=None, skip=()):
    header, end = {}, 0
    for name, spec in required_tensors(small_config()).items():
        if name in skip:
            continue
        shape = (changes or {}).get(name, spec.shape)
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return write(model_dir, header, bytes(end))


def test_missing_and_misshapen_tensors_are_all_named(tmp_path):
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    write_model(tmp_path, {down: (8, 9)}, skip=(norm,))
    with SafetensorsIndex.open(tmp_path) as index:
        with pytest.raises(ModelError) as error:
            check_tensors(index.tensors, small_config())
        assert f"{norm} is missing" in str(error.value)
        assert f"{down} has shape [8, 9], expected [8, 8]" in str(error.value)
        check_tensors(index.tensors, small_config(), LayerRange(0, 1), with_head=False)
        with pytest.raises(ModelError, match="down_proj"):
            check_tensors(index.tensors, small_config(), LayerRange(1, 2), with_head=False)


def test_many_problems_are_counted(tmp_path):
    write(tmp_path, {}, b"")
    with SafetensorsIndex.open(tmp_path) as index, pytest.raises(ModelError, match="and 11 more"):
        check_tensors(index.tensors, small_config())


def test_the_fingerprint_follows_config_tokenizer_and_tensor_table(tmp_path):
    def make(name, config="{}", tokenizer="{}", header=None, data=b"x" * 20):
        model_dir = tmp_path / name
        model_dir.mkdir()
        (model_dir / "config.json").write_text(config)
        (model_dir / "tokenizer.json").write_text(tokenizer)
        write(model_dir, header or two_tensors(), data)
        with SafetensorsIndex.open(model_dir) as index:
            return fingerprint(model_dir, index)

    base = make("base")
    assert len(base) == 32
    assert make("copy") == base
    renamed = dict(zip(("a", "c"), two_tensors().values(), strict=True))
    others = [
        make("config", config="{ }"),
        make("tokenizer", tokenizer="{ }"),
        make("name", header=renamed),
        make("dtype", header={**two_tensors(), "b": {"dtype": "F16", "shape": [2], "data_offsets": [16, 20]}}),
        make("shape", header={**two_tensors(), "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [16, 20]}}),
        make("size", header={"__metadata__": {"x": "y"}, **two_tensors()}),
    ]
    assert len({base, *others}) == 7
