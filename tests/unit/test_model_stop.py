from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.model.stop import StopMatcher
from tests.budget import examples

ALPHABET = "ab\né"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)


def whole(text, stops):
    """The definition, one character at a time: cut before the longest stop that the first completion completes."""
    for end in range(1, len(text) + 1):
        completed = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(completed)], True
    return text, False


def streamed(pieces, stops):
    matcher = StopMatcher(stops)
    sent, stopped = [], False
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        sent.append(text)
    return "".join([*sent, matcher.flush()]), stopped


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=examples(50, 1000), deadline=None)
def test_all_chunkings_of_a_text_give_the_same(text, stops):
    wanted = whole(text, stops)
    for count in range(len(text) + 1):
        for cuts in combinations(range(len(text) + 1), count):
            pieces = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
            assert streamed(pieces, stops) == wanted


@given(st.lists(st.text(ALPHABET, max_size=6), max_size=12), STOPS)
@settings(max_examples=examples(200, 20_000), deadline=None)
def test_every_chunking_gives_what_the_whole_text_gives(pieces, stops):
    assert streamed(pieces, stops) == whole("".join(pieces), stops)


@given(st.lists(st.text(ALPHABET, max_size=6), max_size=12), STOPS)
@settings(max_examples=examples(100, 20_000), deadline=None)
def test_only_what_a_stop_may_continue_is_held_back(pieces, stops):
    matcher = StopMatcher(stops)
    seen = sent = ""
    for piece in pieces:
        seen += piece
        text, stopped = matcher.feed(piece)
        sent += text
        if stopped:
            break
        held = seen[len(sent) :]
        assert sent + held == seen
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@given(st.text(max_size=20), st.text(min_size=1, max_size=5), st.text(max_size=5))
def test_with_one_stop_the_text_ends_at_its_first_occurrence(before, stop, after):
    text = before + stop + after
    assert streamed(list(text), [stop]) == (text[: text.index(stop)], True)


def test_a_stop_cut_over_pieces_is_never_sent():
    matcher = StopMatcher(("\n\nHuman:", "END"))
    assert matcher.feed("Hi\n") == ("Hi", False)
    assert matcher.feed("\nHum") == ("", False)
    assert matcher.feed("ble E") == ("\n\nHumble ", False)
    assert matcher.feed("ND and more") == ("", True)
    assert matcher.stopped
    assert matcher.feed("more") == ("", True)
    assert matcher.flush() == ""


def test_flush_gives_back_a_stop_that_never_came():
    matcher = StopMatcher(("END",))
    assert matcher.feed("EN") == ("", False)
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_the_stop_completed_first_wins_and_of_those_the_longest():
    assert streamed(["abcd"], ["abcd", "bc"]) == ("a", True)
    assert streamed(["abc"], ["abc", "c"]) == ("", True)


def test_no_stops_pass_everything_and_empty_ones_are_refused():
    assert StopMatcher(()).feed("text") == ("text", False)
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("a", ""))


def test_long_texts_of_near_misses_are_never_kept():
    matcher = StopMatcher(("a" * 256 + "b",))
    for _ in range(300):
        matcher.feed("a" * 10)
    assert len(matcher.flush()) == 256
