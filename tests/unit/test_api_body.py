import json

import pytest

from helixd.api.body import Fields, parse_object
from helixd.api.errors import ApiError


def refusal(raw: bytes, depth: int = 64) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_object(raw, depth)
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00x"}',
        b'{"a": 1} {}',
        b'{"a":' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"null",
        b'"text"',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_a_json_object_is_a_400(raw: bytes) -> None:
    error = refusal(raw)
    assert (error.status, error.code, error.param) == (400, "invalid_json", None)


def test_depth_is_allowed_up_to_its_limit() -> None:
    def nested(levels: int) -> bytes:
        # The object itself is the first level.
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert "a" in parse_object(nested(64), 64)
    assert refusal(nested(65)).code == "invalid_json"


def test_a_repeated_key_means_its_last_value() -> None:
    assert parse_object(b'{"a": 1, "a": 2}', 64) == {"a": 2}


def test_complaints_do_not_repeat_the_client() -> None:
    assert "sesame" not in refusal(b'{"sesame": sesame}').message
    with pytest.raises(ApiError) as caught:
        Fields({"n": "sesame"}).integer("n", 1, 8)
    assert "sesame" not in caught.value.message


@pytest.mark.parametrize("value", [True, "1", 1.5, [1], {}, 10**30, 0, 9])
def test_integers_are_integers_in_range(value: object) -> None:
    with pytest.raises(ApiError) as caught:
        Fields({"n": value}, "path.").integer("n", 1, 8)
    assert caught.value.param == "path.n"


def test_both_ends_of_a_range_belong_to_it() -> None:
    assert Fields({"n": 1}).integer("n", 1, 8) == 1
    assert Fields({"n": 8}).integer("n", 1, 8) == 8
    assert Fields({"t": 0}).number("t", 1.0, 0.0, 2.0) == 0.0
    assert Fields({"t": 2}).number("t", 1.0, 0.0, 2.0) == 2.0
    with pytest.raises(ApiError):
        Fields({"t": 0}).number("t", 1.0, 0.0, 1.0, above_low=True)
    with pytest.raises(ApiError):
        Fields({"t": 10**400}).number("t", 1.0, 0.0, 1.0)


@pytest.mark.parametrize("value", [True, "0.5", [], -0.1, 2.1])
def test_numbers_are_numbers_in_range(value: object) -> None:
    with pytest.raises(ApiError):
        Fields({"t": value}).number("t", 1.0, 0.0, 2.0)


def test_null_is_the_default() -> None:
    fields = Fields(json.loads('{"a": null}'))
    assert fields.integer("a", 1, 8) is None
    assert fields.number("a", 0.5, 0.0, 1.0) == 0.5
    assert fields.boolean("a", default=True) is True
    assert fields.string("a") is None
    assert fields.array("a") is None
    assert fields.object("a") is None
