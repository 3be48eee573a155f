"""A request body: bytes to a JSON object, and typed reads of its fields.

Strict JSON only: no NaN or Infinity, no invalid UTF-8, no lone surrogates, bounded depth. A null field counts as
absent. Every complaint is a 400 that names the field and what was expected, and never repeats what the client wrote.
"""

import math
from typing import Any

import msgspec

from helixd.api.errors import ApiError, bad_field

_NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    return _NAMES.get(type(value), "something else")


def parse_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `raw`. Raises a 400 `invalid_json`; the depth counts objects and arrays."""
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise _invalid(f"is nested deeper than {max_depth} levels") from None
    except UnicodeDecodeError:
        raise _invalid("is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        # msgspec's messages give a position and a reason, not the text itself.
        raise _invalid(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(f"must be a JSON object, not {kind_of(value)}")
    _check_depth(value, max_depth)
    return value


def _invalid(what: str) -> ApiError:
    return ApiError(400, f"The request body {what}.", code="invalid_json")


def _check_depth(value: object, max_depth: int) -> None:
    level: list[object] = [value]
    for _ in range(max_depth):
        inner: list[object] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner.extend(child for child in children if isinstance(child, dict | list))
        if not inner:
            return
        level = inner
    raise _invalid(f"is nested deeper than {max_depth} levels")


class Fields:
    """Typed reads of one JSON object. `seen` collects what was asked for, so that a test can compare it with a table.

    `path` prefixes the names in complaints (`messages[3].`).
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self.seen: set[str] = set()

    def name(self, name: str) -> str:
        """The field's full name, as complaints give it."""
        return self._path + name

    def raw(self, name: str) -> Any:
        """The value as it is; None when absent."""
        self.seen.add(name)
        return self._values.get(name)

    def wrong(self, name: str, expected: str) -> ApiError:
        """The 400 for a field of the wrong type."""
        return bad_field(self.name(name), f"must be {expected}, not {kind_of(self._values.get(name))}")

    def boolean(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "a boolean")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in `[low, high]`; None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if not low <= value <= high:
            raise bad_field(self.name(name), f"must be between {low} and {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float, *, above_low: bool = False) -> float:
        """A number in `[low, high]`, or in `(low, high]` with `above_low`."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if above_low and low < value <= high:
            return float(value)
        if above_low or not low <= value <= high or not math.isfinite(value):
            bounds = f"above {low:g} and at most {high:g}" if above_low else f"between {low:g} and {high:g}"
            raise bad_field(self.name(name), f"must be {bounds}")
        return float(value)

    def string(self, name: str) -> str | None:
        """A string; None when absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def array(self, name: str) -> list[Any] | None:
        """An array; None when absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "an array")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """An object; None when absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value
