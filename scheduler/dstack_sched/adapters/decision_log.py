"""ports.DecisionLog: what the controller decided and why, one JSON object a line, bounded in size."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("dstack.decisions")

FILE_NAME = "decisions.jsonl"
MAX_BYTES = 4 * 1024 * 1024


class FileDecisionLog:
    """STATE/decisions.jsonl; past MAX_BYTES it becomes decisions.jsonl.1 and a new one begins.

    tell: told each decision as a line for people, with its fields. What cannot be written (a full disk, say)
    is lost and counted in `lost`, and the first loss of a row is said: nobody who decides must stop because
    of his diary.
    """

    def __init__(self, state: Path, tell: Callable[..., None] = lambda line, **fields: None) -> None:
        self.path = state / FILE_NAME
        self._tell = tell
        self.lost = 0
        self._complained = False

    def append(self, entry: dict[str, Any]) -> None:
        """One write, so that a second process that logs here mixes lines, not parts of lines."""
        about = {key: value for key, value in entry.items() if key != "time_s"}
        self._tell(f"{entry.get('what')}: {entry.get('reason')}", **about)
        line = (json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n").encode()
        try:
            if self.path.exists() and self.path.stat().st_size + len(line) > MAX_BYTES:
                self.path.replace(self.path.with_name(FILE_NAME + ".1"))
            self._write(line)
            self._complained = False
        except OSError as error:
            self.lost += 1
            if not self._complained:
                log.warning("%s: decisions are not kept: %s", self.path, error.strerror)
                self._complained = True

    def _write(self, line: bytes) -> None:
        """All of it or nothing: half a line on a full disk would spoil the next one."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest entries, oldest first. A line cut short by a crash is passed over."""
        lines: deque[str] = deque(maxlen=count)
        for path in (self.path.with_name(FILE_NAME + ".1"), self.path):
            if path.exists():
                with path.open(encoding="utf-8", errors="replace") as file:
                    lines.extend(file)
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries
