"""ports.StatusBoard: STATE/controller.json and serve.json, what `run` and `serve` last saw, for `status`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_sched.adapters.json_files import write_json
from dstack_sched.errors import DstackError

CONTROLLER_BOARD = "controller.json"
SERVE_BOARD = "serve.json"
log = logging.getLogger("dstack.controller")


class FileStatusBoard:
    """Written whole, by rename. A board that cannot be written is no reason to stop: it is said once."""

    def __init__(self, state: Path, name: str = CONTROLLER_BOARD) -> None:
        self.path = state / name
        self._pid = os.getpid()
        self._start_ticks = _start_ticks(self._pid)
        self._complained = False

    def write(self, document: Mapping[str, Any]) -> None:
        about = {"pid": self._pid, "start_ticks": self._start_ticks}
        try:
            write_json(self.path, {**document, **about})
            self._complained = False
        except DstackError as error:
            if not self._complained:
                log.warning("%s; `dstackctl status` shows an old state until then", error)
            self._complained = True


def read_board(state: Path, name: str = CONTROLLER_BOARD) -> dict[str, Any] | None:
    """What was written there last, with "running": whether that very process is still there. None where
    there is no such file, or none that can be read."""
    try:
        document = json.loads((state / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("version") != 1:
        return None
    pid, ticks = document.get("pid"), document.get("start_ticks")
    running = isinstance(pid, int) and ticks is not None and _start_ticks(pid) == ticks
    return {**document, "running": running}


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names one process, whatever the wall
    clock does meanwhile. None where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
