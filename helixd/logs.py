"""Logging: one event per line on standard error, key=value for people or JSON for machines.

An event has a name and fields; `event` writes one. What other packages log becomes an event called `log` with a
message. Repeats are held back and counted. No prompt, generated text, key or secret may ever be a field.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

_FIELDS = "helixd_fields"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))
REPEAT_INTERVAL_S = 60.0
REPEAT_BURST = 5
REPEAT_TABLE = 1024


def event(
    logger: logging.Logger, level: int, name: str, /, *, exc_info: bool | BaseException = False, **fields: object
) -> None:
    """Log the event `name` (snake_case) with its fields; values are str, numbers, bool, None or lists of them.

    `exc_info` (True: the exception being handled) adds the traceback.
    """
    logger.log(level, name, exc_info=exc_info, extra={_FIELDS: fields}, stacklevel=2)


def setup(
    level: str, style: str, *, stream: TextIO | None = None, environ: Mapping[str, str] | None = None
) -> logging.Handler:
    """Send every log record to `stream` (standard error), as `log.level` and `log.format` say. Replaces handlers."""
    stream = sys.stderr if stream is None else stream
    as_json = style == "json" or (style == "auto" and not stream.isatty())
    formatter = JsonFormatter() if as_json else TextFormatter()
    formatter.journal = is_journal(stream, os.environ if environ is None else environ)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # Every request has its own event; aiohttp's access log would also print query strings.
    logging.getLogger("aiohttp.access").disabled = True
    return handler


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the journal's: $JOURNAL_STREAM may be inherited by a process that writes elsewhere."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class EventFormatter(logging.Formatter):
    """What both styles share: the facts of a record, and the journal's priority prefix."""

    journal = False

    def facts(self, record: logging.LogRecord) -> dict[str, object]:
        """Time, level, event name, logger and fields, in the order they are printed."""
        fields: Mapping[str, object] | None = getattr(record, _FIELDS, None)
        ours = record.name.split(".")[0] == "helixd"
        facts: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.msg if fields is not None else "log",
            "logger": record.name,
        }
        if fields is None:
            facts["message"] = record.getMessage() if ours or not _holds_input(record) else _cause(record)
        facts |= {f"field_{name}" if name in facts else name: value for name, value in (fields or {}).items()}
        if repeats := getattr(record, "helixd_repeats", 0):
            facts["repeats_held_back"] = repeats
        return facts

    def trace(self, record: logging.LogRecord) -> str:
        """The exception's traceback, empty without one or where it would quote what a client sent."""
        if not record.exc_info or record.exc_info[0] is None or _holds_input(record):
            return ""
        return "".join(traceback.format_exception(*record.exc_info)).rstrip()

    def prefixed(self, record: logging.LogRecord, text: str) -> str:
        """`text` with the journal's priority on every line, if the stream is the journal's."""
        if not self.journal:
            return text
        priority = next(value for floor, value in _PRIORITIES if record.levelno >= floor)
        return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


class JsonFormatter(EventFormatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        facts = self.facts(record)
        if trace := self.trace(record):
            facts["traceback"] = trace
        return self.prefixed(record, json.dumps(facts, ensure_ascii=False, default=str))


class TextFormatter(EventFormatter):
    """`time level event key=value ...`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        facts = self.facts(record)
        head = f"{facts.pop('ts')} {str(facts.pop('level')).upper():<7} {_text(facts.pop('event'))}"
        facts.pop("logger")
        line = " ".join([head, *(f"{name}={_text(value)}" for name, value in facts.items())])
        trace = self.trace(record)
        return self.prefixed(record, f"{line}\n{trace}" if trace else line)


@dataclass(slots=True)
class _Repeats:
    since_s: float
    passed: int = 0
    held_back: int = 0


class RepeatFilter(logging.Filter):
    """Lets `burst` equal records through per `interval_s`; the next one that passes says how many were held back.

    Records are equal if logger, level, event and all fields but numbers are: "tried 7 times" repeats "tried 6 times",
    while events of different requests or peers are not repeats of one another.
    """

    def __init__(
        self,
        burst: int = REPEAT_BURST,
        interval_s: float = REPEAT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._burst = burst
        self._interval_s = interval_s
        self._clock = clock
        self._seen: OrderedDict[object, _Repeats] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed."""
        fields: Mapping[str, object] = getattr(record, _FIELDS, None) or {}
        words = tuple((name, str(value)) for name, value in fields.items() if not isinstance(value, (int, float)))
        key = (record.name, record.levelno, str(record.msg), str(record.args) if not fields else words)
        now_s = self._clock()
        seen = self._seen.pop(key, None)
        if seen is None or now_s - seen.since_s >= self._interval_s:
            if seen is not None and seen.held_back:
                record.helixd_repeats = seen.held_back
            seen = _Repeats(now_s)
        self._seen[key] = seen
        if len(self._seen) > REPEAT_TABLE:
            self._seen.popitem(last=False)
        seen.passed += 1
        if seen.passed > self._burst:
            seen.held_back += 1
            return False
        return True


def _holds_input(record: logging.LogRecord) -> bool:
    """Whether the record may quote bytes a client sent: aiohttp's parser errors do, Authorization headers included."""
    error = record.exc_info[0] if record.exc_info else None
    return error is not None and error.__module__.startswith("aiohttp.http")


def _cause(record: logging.LogRecord) -> str:
    error = record.exc_info[0] if record.exc_info else None
    return f"bad HTTP from a client ({error.__name__})" if error else "bad HTTP from a client"


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    plain = text and text.isprintable() and not any(character in text for character in ' "=')
    return text if plain or not isinstance(value, str) else json.dumps(text, ensure_ascii=False)
