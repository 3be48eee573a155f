"""Durations and sizes as text: "30s", "500ms", "4MiB", "1.5GiB". A bare number is seconds, or bytes."""

import math
import re

DURATION_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
SIZE_UNITS_BYTES = {
    "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_duration_s(value: object) -> float:
    """Seconds. Raises ValueError saying how to write one."""
    return _quantity(value, DURATION_UNITS_S, "s", 'a duration such as "30s", "500ms" or a number of seconds')


def parse_size_bytes(value: object) -> int:
    """Bytes, rounded to a whole one. Raises ValueError saying how to write one."""
    return round(_quantity(value, SIZE_UNITS_BYTES, "B", 'a size such as "4MiB", "1.5GiB" or a number of bytes'))


def format_duration(seconds: float) -> str:
    """Text that reads back as the same duration, where a person would write it so."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:.12g}ms"
    return f"{seconds:.12g}s"


def format_size(size_bytes: int) -> str:
    """Text that reads back as the same size, in the largest binary unit that keeps it exact."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        count = size_bytes / SIZE_UNITS_BYTES[unit]
        text = f"{count:.3f}".rstrip("0").rstrip(".")
        if count >= 1 and float(text) * SIZE_UNITS_BYTES[unit] == size_bytes:
            return text + unit
    return f"{size_bytes}B"


def _quantity(value: object, units: dict[str, float] | dict[str, int], default_unit: str, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected {expected}")
    if isinstance(value, (int, float)):
        amount = float(value)
    else:
        match = _QUANTITY.fullmatch(value)
        if match is None:
            raise ValueError(f"expected {expected}, not {value!r}")
        number, unit = match.groups()
        if (unit or default_unit) not in units:
            raise ValueError(f"{value!r}: unknown unit {unit!r}; known are {', '.join(units)}")
        amount = float(number) * units[unit or default_unit]
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"expected {expected}, not {value!r}")
    return amount
