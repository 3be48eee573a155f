from pathlib import Path

import pytest

from helixd.api.auth import client_of, digest_of, load_keys
from helixd.api.errors import ApiError
from helixd.api.state import InFlight
from helixd.errors import ConfigError

KEYS = frozenset({digest_of("first"), digest_of("second")})


@pytest.mark.parametrize("header", ["Bearer first", "bearer second", "BEARER  first "])
def test_a_known_key_is_its_digest(header: str) -> None:
    assert client_of(header, KEYS) == digest_of(header.split()[1]).hex()


@pytest.mark.parametrize(
    "header", [None, "", "first", "Basic first", "Bearer", "Bearer ", "Bearer third", "Bearer firs"]
)
def test_anything_else_is_a_401(header: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        client_of(header, KEYS)
    error = caught.value
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.headers == {"WWW-Authenticate": "Bearer"}
    assert "firs" not in error.message


def test_without_keys_everybody_is_let_in() -> None:
    assert client_of(None, frozenset()) == ""
    assert client_of("Bearer EMPTY", frozenset()) == ""


def test_a_key_file_has_one_key_per_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n  second  \n")
    path.chmod(0o600)
    assert load_keys(path) == KEYS
    # As some editors begin a file; the first key would be one that nobody can send.
    path.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert load_keys(path) == KEYS


@pytest.mark.parametrize(("text", "mode"), [("first\n", 0o640), ("first\n", 0o604), ("# none\n\n", 0o600)])
def test_a_key_file_that_others_read_or_that_is_empty_is_an_error(tmp_path: Path, text: str, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="keys"):
        load_keys(path)


def test_a_missing_or_binary_key_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_keys(tmp_path / "none")
    path = tmp_path / "keys"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        load_keys(path)


def test_a_key_has_so_many_places_and_an_open_api_has_no_such_limit() -> None:
    in_flight = InFlight(1)
    with in_flight.slot("k"):
        with pytest.raises(ApiError) as caught, in_flight.slot("k"):
            pass
        with in_flight.slot("other"), in_flight.slot(""), in_flight.slot(""):
            pass
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    with in_flight.slot("k"):
        pass
