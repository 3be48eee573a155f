"""Typed access to the keys of a `config.json`: every wrong type or value is a ModelError that names key and value.

Knows nothing about models. A key that is absent takes the family's default; an explicit null stays null, as in
transformers, where both occur and mean different things.
"""

import math
from collections.abc import Mapping

from helixd.errors import ModelError


class Fields:
    """Read-only view of a JSON object over a table of defaults. `where` is how errors call the object."""

    def __init__(self, data: Mapping[str, object], defaults: Mapping[str, object], where: str = "config.json") -> None:
        self._data = {**defaults, **data}
        self._where = where

    def raw(self, key: str) -> object:
        """The value as it stands; None where there is none."""
        return self._data.get(key)

    def refuse(self, key: str, supported: str) -> ModelError:
        """The error for a value that is understood but not supported."""
        return ModelError(f"{self._where}: {key} = {self.raw(key)!r} is not supported; supported: {supported}")

    def integer(self, key: str, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """A required integer within [minimum, maximum]."""
        value = self.optional_integer(key, minimum, maximum)
        if value is None:
            raise ModelError(f"{self._where}: {key} is missing")
        return value

    def optional_integer(self, key: str, minimum: int = 1, maximum: int = 2**31 - 1) -> int | None:
        """An integer within [minimum, maximum], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ModelError(f"{self._where}: {key} = {value!r} must be an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str) -> float:
        """A required finite number above zero."""
        value = self.optional_number(key)
        if value is None:
            raise ModelError(f"{self._where}: {key} is missing")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number above zero, or None."""
        value = self.raw(key)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise ModelError(f"{self._where}: {key} = {value!r} must be a finite number above 0")
        return number

    def flag(self, key: str) -> bool:
        """A boolean; absent or null is false."""
        value = self.raw(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}: {key} = {value!r} must be true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string, or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{self._where}: {key} = {value!r} must be a string")
        return value

    def mapping(self, key: str) -> dict[str, object]:
        """A JSON object; absent or null is empty."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ModelError(f"{self._where}: {key} = {value!r} must be an object")
        return {str(name): item for name, item in value.items()}

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers >= 0; absent or null is empty."""
        value = self.raw(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise ModelError(f"{self._where}: {key} = {value!r} must be a list of integers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise ModelError(f"{self._where}: {key} holds {item!r} where an integer >= 0 belongs")
        return tuple(value)
