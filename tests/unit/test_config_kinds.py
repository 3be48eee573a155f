"""How single values are read and written back: durations, sizes, addresses, lists, ranges."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixd.config import kinds
from helixd.config.address import Address
from helixd.config.units import format_duration, format_size, parse_duration_s, parse_size_bytes
from helixd.layers import LayerRange

BASE = Path("/base")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30s", 30.0), ("500ms", 0.5), ("250us", 0.00025), ("2m", 120.0), ("2min", 120.0), ("1.5h", 5400.0), ("7", 7.0),
     (7, 7.0), (0.25, 0.25), (" 3 s ", 3.0)],
)  # fmt: skip
def test_a_duration_is_read(written: object, seconds: float) -> None:
    assert parse_duration_s(written) == pytest.approx(seconds)


@pytest.mark.parametrize("written", ["", "s", "5 parsecs", "-1s", "1s2", -1, True, None, [], float("nan"), "٣s"])
def test_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration|unknown unit"):
        parse_duration_s(written)


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("4MiB", 4 * 2**20), ("1.5GiB", 3 * 2**29), ("2kB", 2000), ("10B", 10), ("4096", 4096), (4096, 4096),
     ("1TiB", 2**40), ("0.1KiB", 102)],
)  # fmt: skip
def test_a_size_is_read(written: object, size_bytes: int) -> None:
    assert parse_size_bytes(written) == size_bytes


@pytest.mark.parametrize("written", ["4M", "4mib", "lots", "1e3B", -1, False, float("inf")])
def test_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"size|unknown unit"):
        parse_size_bytes(written)


@given(st.integers(0, 2**50))
def test_a_size_reads_back_as_written(size_bytes: int) -> None:
    assert parse_size_bytes(format_size(size_bytes)) == size_bytes


@given(st.integers(0, 10**9).map(lambda n: n / 1000))
def test_a_duration_reads_back_as_written(seconds: float) -> None:
    assert parse_duration_s(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [("127.0.0.1:8080", "127.0.0.1", 8080, True), ("127.9.9.9:0", "127.9.9.9", 0, True), ("[::1]:1", "::1", 1, True),
     ("localhost:65535", "localhost", 65535, True), ("0.0.0.0:80", "0.0.0.0", 80, False),
     ("[::]:80", "::", 80, False), ("gpu1.lan:7070", "gpu1.lan", 7070, False), ("10.0.0.1:1", "10.0.0.1", 1, False)],
)  # fmt: skip
def test_an_address_is_read_and_written(text: str, host: str, port: int, loopback: bool) -> None:
    address = Address.of(text)
    assert (address.host, address.port, address.loopback, str(address)) == (host, port, loopback, text)


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:65536", "host:-1", "host:x", "::1:80", "a b:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"port|host|IPv6"):
        Address.of(text)


@pytest.mark.parametrize("host", ["foo..bar", ".lan", "x" * 64, "a." + "x" * 64 + ".lan"])
def test_a_host_that_no_resolver_would_take_is_refused(host: str) -> None:
    """Resolving it is no OSError but a UnicodeError, from deep inside."""
    with pytest.raises(ValueError, match="host"):
        Address.of(f"{host}:80")
    for fine in ("x" * 63, "my_host.lan.", "b\u00fccher.example"):
        assert Address.of(f"{fine}:80").host == fine


def test_a_name_is_printable_and_short_enough_to_be_sent() -> None:
    kind = kinds.name(8)
    for fine in ("", "gpu 1", "\u00e4" * 4, "x" * 8):
        assert kind.parse(fine, BASE) == fine
    for wrong in ("x" * 9, "\u00e4" * 5, "a\nb", "\x1b[0m", 3):
        with pytest.raises(ValueError, match=r"printable|string"):
            kind.parse(wrong, BASE)


def test_an_address_others_connect_to_has_a_port() -> None:
    assert kinds.OPTIONAL_ADDRESS.parse("", BASE) is None
    assert kinds.OPTIONAL_ADDRESS.parse("a:1", BASE) == Address("a", 1)
    with pytest.raises(ValueError, match="port 0"):
        kinds.OPTIONAL_ADDRESS.parse("a:0", BASE)


def test_both_sides_of_every_bound() -> None:
    whole = kinds.integer(1, 8)
    assert (whole.parse(1, BASE), whole.parse(8, BASE)) == (1, 8)
    for wrong in (0, 9, 2.0, True, "4"):
        with pytest.raises(ValueError, match=r"whole number|range"):
            whole.parse(wrong, BASE)
    share = kinds.number(0.5, 1)
    assert (share.parse(0.5, BASE), share.parse(1, BASE)) == (0.5, 1.0)
    for wrong in (0.49, 1.01, float("nan"), True):
        with pytest.raises(ValueError, match=r"number|range"):
            share.parse(wrong, BASE)
    size = kinds.size(1024, 2048)
    assert (size.parse("1KiB", BASE), size.parse("2KiB", BASE)) == (1024, 2048)
    for wrong in (1023, 2049):
        with pytest.raises(ValueError, match="range"):
            size.parse(wrong, BASE)
    with pytest.raises(ValueError, match="more than 0"):
        kinds.duration().parse(0, BASE)
    assert kinds.duration(zero=True).parse(0, BASE) == 0.0


def test_text_is_read_as_toml_where_the_kind_is_no_string() -> None:
    assert kinds.integer(0).parse_text("8", BASE) == 8
    assert kinds.BOOLEAN.parse_text("true", BASE) is True
    assert kinds.LAYER_RANGE.parse_text("[0, 4]", BASE) == LayerRange(0, 4)
    assert kinds.TEXT.parse_text("8", BASE) == "8"
    for kind, text in ((kinds.integer(0), "eight"), (kinds.BOOLEAN, "yes"), (kinds.BOOLEAN, "1")):
        with pytest.raises(ValueError, match="expected"):
            kind.parse_text(text, BASE)


@pytest.mark.parametrize("text", ['["https://a"', "[a]", '["a" "b"]'])
def test_text_that_begins_a_list_and_is_none_is_refused(text: str) -> None:
    """Taken as words, it would be an origin that no browser has."""
    with pytest.raises(ValueError, match="not a list"):
        kinds.STRINGS.parse_text(text, BASE)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("auto", ()),
        ("cpu", ("cpu",)),
        ("cuda:0,cuda:1", ("cuda:0", "cuda:1")),
        ('["cuda:0", "cpu"]', ("cuda:0", "cpu")),
    ],
)
def test_devices_are_a_list_or_auto(text: str, devices: tuple[str, ...]) -> None:
    assert kinds.DEVICES.parse_text(text, BASE) == devices


@pytest.mark.parametrize("wrong", [[], ["auto", "cpu"], [1], "", 3, [""]])
def test_what_is_no_device_list_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        kinds.DEVICES.parse(wrong, BASE)


def test_paths_start_from_the_base_unless_absolute() -> None:
    assert kinds.PATH.parse("a/b", BASE) == Path("/base/a/b")
    assert kinds.PATH.parse("/a", BASE) == Path("/a")
    assert kinds.PATH.parse("~/a", BASE) == Path.home() / "a"
    assert kinds.OPTIONAL_PATH.parse("", BASE) is None
    assert kinds.MODEL.parse("demo", BASE) == "demo"
    assert kinds.MODEL.parse("./demo", BASE) == "/base/demo"


@pytest.mark.parametrize("wrong", [[1], [1, 2, 3], ["a", "b"], [2, 2], [-1, 2], "0-4", [False, True]])
def test_what_is_no_layer_range_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"expected|must satisfy"):
        kinds.LAYER_RANGE.parse(wrong, BASE)


@pytest.mark.parametrize("kind", [kinds.PATH, kinds.OPTIONAL_PATH, kinds.MODEL])
def test_no_system_has_a_path_with_a_null_character(kind: kinds.Kind[object]) -> None:
    with pytest.raises(ValueError, match="null character"):
        kind.parse("keys\0.txt", BASE)
