"""Reading parsed data (JSON or TOML) key by key, so that every complaint names the key it is about."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from helixd.errors import HelixError
from helixd.layers import LayerRange

_MOST = 1e30
_MOST_WHOLE = 10**9


class ClusterFileError(HelixError):
    """The data is not a cluster; `key` is the path of the offending key, such as `nodes[3].type`."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


class Table:
    """A mapping and where it stands, so that every complaint can name its key."""

    def __init__(self, data: object, path: str) -> None:
        if not isinstance(data, Mapping):
            raise ClusterFileError(path or "top level", f"must be a table, is {kind_of(data)}")
        self._data = data
        self._path = path

    def key(self, name: str) -> str:
        """The full path of a key of this table."""
        return f"{self._path}.{name}" if self._path else name

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raise ClusterFileError about a key of this table."""
        raise ClusterFileError(self.key(name), problem)

    def keys(self) -> list[str]:
        """The keys there are."""
        return [str(name) for name in self._data]

    def get(self, name: str) -> object:
        """The value of a key that must be there."""
        if name not in self._data:
            self.fail(name, "is missing")
        return self._data[name]

    def has(self, name: str) -> bool:
        """Whether the key is there with a value; null is no value."""
        return self._data.get(name) is not None

    def table(self, name: str, *, optional: bool = False) -> "Table":
        """The table under a key; an empty one if it may be absent and is."""
        if optional and not self.has(name):
            return Table({}, self.key(name))
        return Table(self.get(name), self.key(name))

    def items(self, name: str) -> Sequence[object]:
        """The list under a key."""
        value = self.get(name)
        if not isinstance(value, list | tuple):
            self.fail(name, f"must be a list, is {kind_of(value)}")
        return value

    def tables(self, name: str) -> list["Table"]:
        """The list of tables under a key."""
        return [Table(item, f"{self.key(name)}[{i}]") for i, item in enumerate(self.items(name))]

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string that is not empty."""
        if default is not None and not self.has(name):
            return default
        value = self.get(name)
        if not isinstance(value, str) or not value:
            self.fail(name, f"must be a non-empty string, is {kind_of(value)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.get(name) if self.has(name) else False
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, is {kind_of(value)}")
        return value

    def number(self, name: str, *, least: float = 0.0, above: bool = False, default: float | None = None) -> float:
        """A finite number of at least `least` (above it if `above`)."""
        if default is not None and not self.has(name):
            return default
        return number_of(self.get(name), self.key(name), least=least, above=above)

    def number_or_none(self, name: str) -> float | None:
        """A number of at least 0, if the key is there."""
        return self.number(name) if self.has(name) else None

    def whole(self, name: str, *, least: int = 0) -> int:
        """A whole number of at least `least`."""
        return whole_of(self.get(name), self.key(name), least=least)

    def whole_or_none(self, name: str, *, least: int = 0) -> int | None:
        """A whole number, if the key is there."""
        return self.whole(name, least=least) if self.has(name) else None

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers of at least 0."""
        return tuple(number_of(item, f"{self.key(name)}[{i}]") for i, item in enumerate(self.items(name)))

    def points(self, name: str) -> tuple[tuple[float, float], ...]:
        """Layer times, [tokens in the batch, seconds], rising; empty if the key is not there."""
        if not self.has(name):
            return ()
        points: list[tuple[float, float]] = []
        for i, item in enumerate(self.items(name)):
            key = f"{self.key(name)}[{i}]"
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise ClusterFileError(key, "must be [tokens in the batch, seconds for one layer]")
            point = (number_of(item[0], key), number_of(item[1], key))
            if points and point[0] <= points[-1][0]:
                raise ClusterFileError(key, "batch sizes must rise from point to point")
            points.append(point)
        return tuple(points)

    def range(self, name: str, num_layers: int) -> LayerRange | None:
        """A range of the model's layers, if the key is there."""
        if not self.has(name):
            return None
        pair = self.items(name)
        if len(pair) != 2:
            self.fail(name, "must be [start, end)")
        start, end = (whole_of(value, self.key(name)) for value in pair)
        if not start < end <= num_layers:
            self.fail(name, f"[{start}, {end}) is not a range of the model's {num_layers} layers")
        return LayerRange(start, end)


def number_of(value: object, key: str, *, least: float = 0.0, above: bool = False) -> float:
    """`value` as a number of at least `least` that sums and products can be made of. Raises ClusterFileError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClusterFileError(key, f"must be a number, is {kind_of(value)}")
    if value > _MOST:
        raise ClusterFileError(key, f"must be at most {_MOST:g}, is {_shown(value)}")
    # Written so that NaN is refused too.
    if not (least < value if above else least <= value):
        raise ClusterFileError(key, f"must be {'above' if above else 'at least'} {least:g}, is {_shown(value)}")
    return float(value)


def whole_of(value: object, key: str, *, least: int = 0) -> int:
    """`value` as a whole number of at least `least`. Raises ClusterFileError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ClusterFileError(key, f"must be a whole number, is {kind_of(value)}")
    if not least <= value <= _MOST_WHOLE:
        bound = f"at least {least}" if value < least else f"at most {_MOST_WHOLE}"
        raise ClusterFileError(key, f"must be {bound}, is {_shown(value)}")
    return value


def kind_of(value: object) -> str:
    """What a value is, for complaints."""
    names = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "a table"}
    return names.get(type(value), f"{value!r}")


def _shown(value: float) -> str:
    return str(value)[:24]
