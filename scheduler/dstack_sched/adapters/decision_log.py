"""ports.DecisionLog: what the controller decided and why, one JSON object a line, bounded in size."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from dstack_sched.errors import InputError

FILE_NAME = "decisions.jsonl"
MAX_BYTES = 4 * 1024 * 1024


class FileDecisionLog:
    """STATE/decisions.jsonl; past MAX_BYTES it becomes decisions.jsonl.1 and a new one begins."""

    def __init__(self, state: Path) -> None:
        self.path = state / FILE_NAME

    def append(self, entry: dict[str, Any]) -> None:
        """Errors: InputError where the state directory cannot be written."""
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            if self.path.exists() and self.path.stat().st_size + len(line) > MAX_BYTES:
                self.path.replace(self.path.with_name(FILE_NAME + ".1"))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; choose another with --state DIR") from error

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
