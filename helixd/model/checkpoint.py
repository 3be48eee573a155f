"""Everything a coordinator needs of a checkpoint on disk, opened once.

Gathers the config, the tensor index, the tokenizer, the chat template, the end-of-sequence ids and the fingerprint.
Reads no weights itself and runs nothing from the directory: Python files and `auto_map` there are never looked at.
Opening is blocking file work: call it off the event loop.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Self

from helixd.errors import ModelError
from helixd.files import served_name
from helixd.model.chat import ChatTemplate
from helixd.model.config import parse_config
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig
from helixd.model.files import parse_json_object, read_bytes, read_json_object
from helixd.model.index import SafetensorsIndex, fingerprint
from helixd.model.names import embedding_weights
from helixd.model.sizes import check_tensors
from helixd.model.tokenizer import Tokenizer

DEMO = "demo"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `close` it (or use it in `with`) to close its files.

    `config_text` is what a worker is sent: JSON that `parse_config` turns into `config`. `name` is the name it is
    served under unless the operator gives another.
    """

    model_dir: Path
    name: str
    config_text: str
    config: DecoderConfig
    index: SafetensorsIndex
    fingerprint: str

    @classmethod
    def open(cls, model_dir: Path) -> Self:
        """Reads the config and every shard's header, and checks that all tensors are there.

        Raises ModelError naming what is missing, damaged or unsupported.
        """
        text = read_bytes(model_dir, "config.json")
        if text is None:
            raise ModelError(f"{model_dir} has no config.json; give the directory of a Hugging Face checkpoint")
        data = parse_json_object(text, str(model_dir / "config.json"))
        config = parse_config(data)
        index = SafetensorsIndex.open(model_dir)
        try:
            if data.get("dtype") is None and data.get("torch_dtype") is None:
                data["dtype"] = _stored_dtype(config, index)
                config = parse_config(data)
            check_tensors(index.tensors, config)
            return cls(
                model_dir, served_name(model_dir), json.dumps(data), config, index, fingerprint(model_dir, index)
            )
        except BaseException:
            index.close()
            raise

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use, which takes a second for large vocabularies. Raises ModelError."""
        return Tokenizer.load(self.model_dir)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """None where the checkpoint has none. Raises ModelError for one that cannot be compiled."""
        return ChatTemplate.load(self.model_dir, self.tokenizer.special_tokens)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: of `generation_config.json`, else of `config.json`, else the tokenizer's own."""
        for name in ("generation_config.json", "config.json"):
            ids = parse_eos_ids(read_json_object(self.model_dir, name) or {}, name)
            if ids:
                return ids
        return self.tokenizer.eos_ids

    def close(self) -> None:
        """Closes the weight files."""
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve_model(model: str) -> Path:
    """The directory that `--model` means: the packaged one for `demo`, else a path. Raises ModelError for none."""
    path = Path(str(files("helixd") / "demo")) if model == DEMO else Path(model).expanduser()
    if not path.is_dir():
        raise ModelError(
            f"{model!r} is not a directory; give the path of a downloaded Hugging Face checkpoint, "
            f"or {DEMO!r} for the packaged demo model (nothing is downloaded)"
        )
    return path.resolve()


def parse_eos_ids(data: dict[str, object], where: str) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: an integer, a list of them, or nothing. Raises ModelError for anything else."""
    value = data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(item) is not int or item < 0 for item in ids):
        raise ModelError(f"{where}: eos_token_id = {value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _stored_dtype(config: DecoderConfig, index: SafetensorsIndex) -> str:
    """The embedding's dtype, for a config that states none."""
    (spec,) = embedding_weights(config)["embedding"]
    ref = index.tensors.get(spec.name)
    return ref.dtype if ref is not None and ref.dtype in DTYPE_BYTES else config.dtype
