"""The kinds of value a setting can have: how each is read from TOML, from plain text, and written back.

A kind's `parse` gets a TOML value and the directory relative paths start from, and raises ValueError with advice.
Environment variables and `--set` carry text: `toml_text` kinds read it as a TOML value first ("8", "true", "[1, 2]").
"""

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from helixd.config.address import Address
from helixd.config.units import format_duration, format_size, parse_duration_s, parse_size_bytes
from helixd.layers import LayerRange

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """`label` names the kind for people. `unit_suffix` is the unit in the attribute's name, absent from the key's."""

    label: str
    parse: Callable[[object, Path], T]
    render: Callable[[T], object]
    unit_suffix: str = ""
    toml_text: bool = False

    def parse_text(self, text: str, base: Path) -> T:
        """Read text from the environment or the command line. Raises ValueError."""
        value: object = text
        if self.toml_text:
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError as error:
                if text.lstrip().startswith("["):
                    raise ValueError(f'{text!r} is not a list as TOML writes it, as in ["a", "b"]') from error
                value = text
        return self.parse(value, base)


def to_toml(value: object) -> str:
    """A TOML literal of a rendered value: str, bool, int, float or a list of them."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a string in quotes")
    return value


def _path(value: object, base: Path) -> Path:
    text = _string(value)
    if not text:
        return Path()
    if "\0" in text:
        raise ValueError(f"{text!r} cannot be a path: it has a null character")
    try:
        expanded = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r}: {error}") from error
    return base / expanded


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError('expected a list of strings, as in ["a", "b"]')
    return tuple(value)


def name(most_bytes: int) -> Kind[str]:
    """A string that people read and daemons send one another; it may be empty."""

    def parse(value: object, _base: Path) -> str:
        text = _string(value)
        if (text and not text.isprintable()) or len(text.encode()) > most_bytes:
            raise ValueError(f"{text[:80]!r} must be printable, and at most {most_bytes} bytes")
        return text

    return Kind("string", parse, lambda value: value)


def choice(*options: str) -> Kind[str]:
    """One of a few words."""
    listed = ", ".join(f'"{option}"' for option in options)

    def parse(value: object, _base: Path) -> str:
        if value not in options:
            raise ValueError(f"expected one of {listed}, not {value!r}")
        return str(value)

    return Kind(f"one of {listed}", parse, lambda value: value)


def integer(low: int, high: int = 2**31 - 1) -> Kind[int]:
    """A whole number, `low <= n <= high`."""

    def parse(value: object, _base: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number, not {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range; expected {low} to {high}")
        return value

    return Kind(f"whole number, at least {low}", parse, lambda value: value, toml_text=True)


def number(low: float, high: float) -> Kind[float]:
    """A number, `low <= x <= high`."""

    def parse(value: object, _base: Path) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"expected a number, not {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range; expected {low:g} to {high:g}")
        return float(value)

    return Kind(f"number from {low:g} to {high:g}", parse, lambda value: value, toml_text=True)


def duration(*, zero: bool = False) -> Kind[float]:
    """Seconds; more than 0 unless `zero`."""

    def parse(value: object, _base: Path) -> float:
        seconds = parse_duration_s(value)
        if seconds == 0 and not zero:
            raise ValueError("must be more than 0")
        return seconds

    return Kind("duration", parse, format_duration, unit_suffix="_s")


def size(low_bytes: int, high_bytes: int = 2**62) -> Kind[int]:
    """Bytes, `low_bytes <= n <= high_bytes`."""

    def parse(value: object, _base: Path) -> int:
        size_bytes = parse_size_bytes(value)
        if not low_bytes <= size_bytes <= high_bytes:
            raise ValueError(f"{value!r} is out of range; {format_size(low_bytes)} to {format_size(high_bytes)}")
        return size_bytes

    return Kind("size", parse, format_size, unit_suffix="_bytes")


def _boolean(value: object, _base: Path) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, not {value!r}")
    return value


def _memory(value: object, base: Path) -> int | None:
    return None if value == "auto" else size(4096).parse(value, base)


def _memory_text(size_bytes: int | None) -> str:
    return "auto" if size_bytes is None else format_size(size_bytes)


def _optional_integer(value: object, base: Path) -> int | None:
    return integer(1).parse(value, base)


def _address(value: object, base: Path) -> Address:
    text = _string(value)
    return Address.of(text) if text else UNSET_ADDRESS


def _address_text(address: Address | None) -> str:
    return "" if address in (None, UNSET_ADDRESS) else str(address)


def _optional_address(value: object, base: Path) -> Address | None:
    address = _address(value, base)
    if address == UNSET_ADDRESS:
        return None
    if address.port == 0:
        raise ValueError(f'"{address}": others cannot connect to port 0; name the real port')
    return address


def _optional_path(value: object, base: Path) -> Path | None:
    path = _path(value, base)
    return None if path == Path() else path


def _model(value: object, base: Path) -> str:
    return _string(value) if value in ("", DEMO_MODEL) else str(_path(value, base))


def _devices(value: object, _base: Path) -> tuple[str, ...]:
    devices = _strings(value)
    if devices == ("auto",):
        return ()
    if not devices or "auto" in devices:
        raise ValueError('expected "auto" or a list of torch devices, as in ["cpu"] or ["cuda:0", "cuda:1"]')
    return devices


def _layer_range(value: object, _base: Path) -> LayerRange | None:
    if isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value):
        return LayerRange(value[0], value[1])
    raise ValueError("expected [start, end): two whole numbers, as in [0, 12]")


DEMO_MODEL = "demo"
UNSET_ADDRESS = Address("", 0)
UNSET_PATH = Path()

TEXT: Kind[str] = Kind("string", lambda value, _base: _string(value), lambda value: value)
BOOLEAN: Kind[bool] = Kind("true or false", _boolean, lambda value: value, toml_text=True)
STRINGS: Kind[tuple[str, ...]] = Kind("list of strings", lambda value, _base: _strings(value), list, toml_text=True)
PATH: Kind[Path] = Kind("path", _path, lambda path: "" if path == UNSET_PATH else str(path))
OPTIONAL_PATH: Kind[Path | None] = Kind("path", _optional_path, lambda path: "" if path is None else str(path))
ADDRESS: Kind[Address] = Kind("host:port", _address, _address_text)
OPTIONAL_ADDRESS: Kind[Address | None] = Kind(
    "host:port", _optional_address, lambda address: "" if address is None else str(address)
)
MODEL: Kind[str] = Kind("directory", _model, lambda value: value)
MEMORY: Kind[int | None] = Kind(
    "size", _memory, lambda value: "auto" if value is None else format_size(value), "_bytes"
)
DEVICES: Kind[tuple[str, ...]] = Kind("list of strings", _devices, lambda value: list(value) or "auto", toml_text=True)
OPTIONAL_INTEGER: Kind[int | None] = Kind(
    "whole number, at least 1", _optional_integer, lambda value: value, toml_text=True
)
LAYER_RANGE: Kind[LayerRange | None] = Kind(
    "[start, end)", _layer_range, lambda value: None if value is None else list(value.to_pair()), toml_text=True
)
