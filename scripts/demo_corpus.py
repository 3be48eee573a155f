"""The demo model's text: which files of the standard library it learns from, and their tokens.

Decides what is read (sorted `*.py` of one directory, without tests and generated tables), which files are held out for
the validation loss (by a hash of their relative path, so that the choice depends on nothing else), and the byte-level
BPE tokenizer. Every file is one document and ends with `END_OF_TEXT`, which also begins it. Knows no model.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# Tests repeat themselves, the rest are tables or text that a program wrote: a small model would spend itself on them.
_EXCLUDED_DIRS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
)
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "__phello__")
_HELD_OUT_ONE_IN = 32

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: its path relative to the corpus root, and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept for the validation loss and never trained on."""
        return hashlib.sha256(self.name.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Documents as one row of token ids, with the number of UTF-8 bytes that they stand for."""

    ids: Tokens
    text_bytes: int


def default_corpus_dir() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(root: Path) -> list[Document]:
    """All documents below `root`, sorted by name; files that are not UTF-8 or almost empty are left out.

    Raises SystemExit if there are none.
    """
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _EXCLUDED_DIRS.intersection(parts) or any(part.startswith(_EXCLUDED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 200:
            documents.append(Document("/".join(parts), text.replace("\r\n", "\n")))
    if not documents:
        raise SystemExit(f"no Python source below {root}: give --corpus a directory that has some")
    return documents


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """The documents to train on and the held-out ones."""
    train = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    if not train or not held_out:
        raise SystemExit(f"{len(documents)} files are too few to hold one in {_HELD_OUT_ONE_IN} of them out")
    return train, held_out


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` ids that begins every text with `END_OF_TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    return tokenizer


def encode(documents: list[Document], tokenizer: Tokenizer) -> TokenStream:
    """The documents one after the other, `END_OF_TEXT` before each and after the last."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(_texts(documents))):
        ids.extend(encoding.ids)
    ids.append(END_OF_TEXT_ID)
    return TokenStream(np.array(ids, dtype=np.uint16), sum(len(text.encode()) for text in _texts(documents)))


def _texts(documents: list[Document]) -> Iterator[str]:
    return (document.text for document in documents)
