"""Log lines: both styles, the journal's prefix, repeats, and what must never be printed."""

import io
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from helixd import logs

logger = logging.getLogger("helixd.test")


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("aiohttp.access").disabled = False


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_json_is_one_object_per_line(stream: io.StringIO) -> None:
    logs.setup("info", "json", stream=stream)
    logs.event(logger, logging.WARNING, "peer_lost", peer="a", rtt_s=0.5, layers=[0, 4], reason='two\nlines "quoted"')
    logs.event(logger, logging.DEBUG, "hidden")
    (line,) = stream.getvalue().splitlines()
    facts = json.loads(line)
    moment = datetime.fromisoformat(facts.pop("ts"))
    assert moment.utcoffset() == timedelta(0)
    assert facts == {
        "level": "warning", "event": "peer_lost", "logger": "helixd.test", "peer": "a", "rtt_s": 0.5, "layers": [0, 4],
        "reason": 'two\nlines "quoted"',
    }  # fmt: skip


def test_text_is_one_readable_line(stream: io.StringIO) -> None:
    logs.setup("info", "text", stream=stream)
    logs.event(logger, logging.INFO, "joined", peer="a", where="[0, 4)", ok=True, note="", none=None, path="x=y", n=3)
    logs.event(logger, logging.INFO, "joined", text="a\nforged line")
    first, second = stream.getvalue().splitlines()
    assert first.split(" ", 2)[1] == "INFO"
    assert first.endswith('joined peer=a where="[0, 4)" ok=true note="" none=null path="x=y" n=3')
    assert second.endswith(r'text="a\nforged line"')


def test_auto_is_json_unless_a_person_reads(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(logs.setup("info", "auto", stream=stream).formatter, logs.JsonFormatter)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert isinstance(logs.setup("info", "auto", stream=stream).formatter, logs.TextFormatter)


def test_fields_cannot_forge_an_events_facts(stream: io.StringIO) -> None:
    logs.setup("info", "json", stream=stream)
    logs.event(logger, logging.INFO, "real", level="debug", ts="never", event="other")
    facts = json.loads(stream.getvalue())
    assert (facts["event"], facts["level"]) == ("real", "info")
    assert (facts["field_ts"], facts["field_level"], facts["field_event"]) == ("never", "debug", "other")


def test_other_packages_logs_are_events_too(stream: io.StringIO) -> None:
    logs.setup("info", "json", stream=stream)
    logging.getLogger("asyncio").warning("took %d s", 3)
    facts = json.loads(stream.getvalue())
    assert (facts["event"], facts["logger"], facts["message"]) == ("log", "asyncio", "took 3 s")


def test_a_traceback_stays_with_its_event(stream: io.StringIO) -> None:
    for style in ("json", "text"):
        stream.truncate(0)
        stream.seek(0)
        logs.setup("info", style, stream=stream)
        try:
            raise ValueError("the cause")
        except ValueError:
            logs.event(logger, logging.ERROR, "broke", exc_info=True)
        printed = stream.getvalue()
        assert "the cause" in printed
        if style == "json":
            assert "Traceback" in json.loads(printed)["traceback"]
        else:
            assert printed.splitlines()[1] == "Traceback (most recent call last):"


def test_the_journal_gets_priorities_on_its_own_stream_only(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as file:
        status = os.fstat(file.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        logs.setup("debug", "text", stream=file, environ=environ)
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
            logs.event(logger, level, "e")
        try:
            raise ValueError
        except ValueError:
            logs.event(logger, logging.ERROR, "broke", exc_info=True)
        file.seek(0)
        lines = file.read().splitlines()
        assert [line[:3] for line in lines[:5]] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
        assert all(line.startswith("<3>") for line in lines[5:])
        assert not logs.is_journal(file, {"JOURNAL_STREAM": "1:2"})
        assert not logs.is_journal(file, {})
    assert not logs.is_journal(io.StringIO(), environ)


def _record(name: str, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("helixd", logging.INFO, "", 0, name, None, None)
    record.helixd_fields = fields
    return record


def test_repeats_are_held_back_and_counted() -> None:
    now_s = 0.0
    repeats = logs.RepeatFilter(burst=2, interval_s=10.0, clock=lambda: now_s)
    passed = [repeats.filter(_record("join_failed", peer="a", tries=count)) for count in range(5)]
    assert passed == [True, True, False, False, False]
    assert repeats.filter(_record("join_failed", peer="b"))
    assert repeats.filter(_record("joined", peer="a"))

    now_s = 9.99
    assert not repeats.filter(_record("join_failed", peer="a"))
    now_s = 10.0
    again = _record("join_failed", peer="a")
    assert repeats.filter(again)
    assert again.__dict__["helixd_repeats"] == 4
    now_s = 20.0
    later = _record("join_failed", peer="a")
    assert repeats.filter(later)
    assert "helixd_repeats" not in later.__dict__


def test_requests_are_not_repeats_of_one_another() -> None:
    repeats = logs.RepeatFilter(burst=1, interval_s=10.0, clock=lambda: 0.0)
    assert all(repeats.filter(_record("request_finished", request_id=f"r{number}")) for number in range(100))


def test_the_table_of_repeats_is_bounded() -> None:
    repeats = logs.RepeatFilter(burst=1, interval_s=1e9, clock=lambda: 0.0)
    for number in range(logs.REPEAT_TABLE + 1):
        repeats.filter(_record("e", id=str(number)))
    assert repeats.filter(_record("e", id="0"))
    assert not repeats.filter(_record("e", id=str(logs.REPEAT_TABLE)))


def test_held_back_repeats_are_reported_in_the_line(stream: io.StringIO) -> None:
    formatter = logs.JsonFormatter()
    record = _record("e", peer="a")
    record.helixd_repeats = 7
    assert json.loads(formatter.format(record))["repeats_held_back"] == 7


def test_what_aiohttps_parser_quotes_is_not_printed(stream: io.StringIO) -> None:
    http_exceptions = pytest.importorskip("aiohttp.http_exceptions", reason="aiohttp is not installed")
    logs.setup("info", "json", stream=stream)
    secret = "Bearer canary-7f3a"
    try:
        raise http_exceptions.BadHttpMessage(f"bad header {secret}")
    except http_exceptions.BadHttpMessage:
        logging.getLogger("aiohttp.server").exception("Error handling request %s", secret)
    printed = stream.getvalue()
    assert "canary" not in printed
    assert json.loads(printed)["message"] == "bad HTTP from a client (BadHttpMessage)"


def test_the_access_log_is_off(stream: io.StringIO) -> None:
    logs.setup("debug", "json", stream=stream)
    logging.getLogger("aiohttp.access").info("GET /v1/models?key=canary")
    assert stream.getvalue() == ""
