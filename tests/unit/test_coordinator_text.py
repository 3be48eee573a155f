"""A choice's text: what is streamed joins to what would have been sent at once, and the end is where it should be."""

from hypothesis import given
from hypothesis import strategies as st

from helixd.coordinator.text import ChoiceText

END = 99


class Letters:
    """Ids are letters; id 50 is the first half of a two-token character."""

    def __init__(self) -> None:
        self._half = False

    def feed(self, token_id: int) -> str:
        if token_id == 50:
            self._half = True
            return ""
        mark, self._half = ("é" if self._half else ""), False
        return mark + chr(97 + token_id)

    def flush(self) -> str:
        return "\ufffd" if self._half else ""


def run(ids: list[int], max_tokens: int, stops: tuple[str, ...] = ()) -> tuple[str, str | None, list[int]]:
    text = ChoiceText(0, max_tokens, (END,), stops, Letters())
    out, sent = "", []
    for token in ids:
        delta = text.accept(token, None)
        if delta is not None:
            out += delta.text
            sent += [each.id for each in delta.tokens]
        if text.finished is not None:
            break
    return out, text.finished, sent


def test_length_and_end_token() -> None:
    assert run([0, 1, 2, 3], 3) == ("abc", "length", [0, 1, 2])
    assert run([0, END, 2], 9) == ("a", "stop", [0, END])


def test_a_character_in_two_tokens_waits_and_a_torn_one_is_marked() -> None:
    assert run([0, 50, 1], 9) == ("aéb", None, [0, 50, 1])
    assert run([0, 50], 2) == ("a\ufffd", "length", [0, 50])


def test_a_stop_string_ends_the_text_before_it() -> None:
    assert run([0, 1, 2, 3], 9, ("bc",)) == ("a", "stop", [0, 1, 2])
    assert run([0, 1], 2, ("bc",)) == ("ab", "length", [0, 1])


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30), st.lists(st.text("abcde", min_size=1, max_size=3), max_size=3)
)
def test_streamed_text_is_the_text_up_to_the_first_stop(ids: list[int], stops: list[str]) -> None:
    whole = "".join(chr(97 + token) for token in ids)
    out, finished, _ = run(ids, len(ids), tuple(stops))
    ends = [at for at in range(len(whole) + 1) if any(whole[:at].endswith(stop) for stop in stops)]
    if ends:
        assert finished == "stop"
        longest = max(len(stop) for stop in stops if whole[: ends[0]].endswith(stop))
        assert out == whole[: ends[0] - longest]
    else:
        assert (out, finished) == (whole, "length")
