"""Logs of the programs that run for months: one line an event, as text or as JSON, bounded in size.

JSON: {"time_s" (Unix), "level", "part" (controller, arbiter, serve), "message", ...}, then the fields that
the event has of its own (what, reason, model, ...: `log.info(text, extra=fields(model="m"))`), "error" with
the traceback of a defect. One format for all parts, so that one rule collects them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from dstack_sched.errors import DstackError, InputError

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
FILE_BYTES = 10 << 20
FILES_KEPT = 4  # beside the one that is written

OURS = logging.getLogger("dstack")
_active: list[logging.Handler] = []


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How to log. file None: to stderr. Errors: InputError for a word that is not known."""

    format: str = "text"
    level: str = "info"
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"--log-format {self.format}: {' or '.join(FORMATS)}")
        if self.level not in LEVELS:
            raise InputError(f"--log-level {self.level}: one of {', '.join(LEVELS)}")


class NewText:
    """What others append to a log: each call gives what came since the last one. A log that was shortened
    is read from its beginning; one that cannot be read says nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self()

    def __call__(self) -> str:
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            if file.seek(0, 2) < self._read_bytes:
                self._read_bytes = 0
            file.seek(self._read_bytes)
            text = file.read(FILE_BYTES)
            whole = text.rfind(b"\n") + 1
            self._read_bytes += whole
            return text[:whole].decode(errors="replace")
        return ""


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a log call: fields of the event, plain JSON types."""
    return {"fields": values}


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time_s": round(record.created, 3),
            "level": record.levelname.lower(),
            "part": self._part,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, separators=(",", ":"), default=str)


class Lines(logging.Formatter):
    """`2026-11-22 17:30:01 arbiter: message`, with the level where it is not info. Control characters that a
    name may bring are escaped, so that a record stays one line."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{at} {self._part}: {level}{_one_line(record.getMessage())}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


@contextlib.contextmanager
def logging_to(part: str, options: LogOptions) -> Iterator[None]:
    """Send the log where the options say while the block runs. A log that cannot be written (full disk) loses
    lines and stops nobody.

    The error that ends the block is the log's last line, in JSON or in a file; JSON on stderr stays JSON: the
    program ends there with the error's status. Errors: InputError where the file cannot be opened.
    """
    handler = _handler(options)
    handler.setFormatter((JsonLines if options.format == "json" else Lines)(part))
    handler.setLevel(options.level.upper())
    root, before, raising = logging.getLogger(), OURS.level, logging.raiseExceptions
    root.addHandler(handler)
    _active.append(handler)
    OURS.setLevel(options.level.upper())
    logging.raiseExceptions = False
    try:
        yield
    except DstackError as error:
        if options.format == "json" or options.file:
            OURS.error("%s", error)
        if options.format == "json" and options.file is None:
            raise SystemExit(error.exit_status) from error
        raise
    except Exception:
        OURS.critical("a defect ends this program", exc_info=True)
        raise
    finally:
        logging.raiseExceptions = raising
        OURS.setLevel(before)
        _active.remove(handler)
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def logging_active() -> bool:
    """Whether a block of `logging_to` runs: lines for people belong into the log then."""
    return bool(_active)


def _handler(options: LogOptions) -> logging.Handler:
    if options.file is None:
        return logging.StreamHandler(sys.stderr)
    try:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        return RotatingFileHandler(
            options.file, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise InputError(f"--log-file {options.file}: {error.strerror}; choose another file") from None


def bound(paths: Iterable[Path], limit_bytes: int = FILE_BYTES) -> None:
    """Keep logs that other programs append to within bounds: past the limit, what is there moves to NAME.1
    and the file starts again, under the same descriptor. Never fails; lines that come meanwhile may be lost.

    On a full disk the copy fails, and the old lines go: a bounded log matters more.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_size <= limit_bytes:
                continue
            with contextlib.suppress(OSError):
                shutil.copyfile(path, path.with_name(path.name + ".1"))
            with path.open("r+b") as file:
                file.truncate(0)


def _one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
