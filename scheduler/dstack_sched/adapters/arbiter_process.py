"""The arbiter as a child of ours: started where none answers, kept in sight, stopped with us."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.kept_process import KeptProcess
from dstack_sched.adapters.logs import LogOptions
from dstack_sched.errors import MachineError

START_TIMEOUT_S = 20.0


class ArbiterProcess:
    """The arbiter of this host. There is one a host: where one answers already, it is used and never stopped.

    Errors: MachineError when it does not start.
    """

    name = "arbiter"

    def __init__(
        self,
        socket: Path,
        log_path: Path,
        *,
        policy: str = "dstack",
        capacity: float = 100.0,
        log: LogOptions | None = None,
    ) -> None:
        """log: format and level of the lines in log_path."""
        self.socket = socket
        self.log_path = log_path
        self._arguments = ["--policy", policy, "--capacity", f"{capacity:g}", "--socket", str(socket)]
        if log is not None:
            self._arguments += ["--log-format", log.format, "--log-level", log.level]
        self._process: KeptProcess | None = None

    @property
    def pid(self) -> int | None:
        """Our arbiter's process id; None where the one in use is not ours."""
        return self._process.pid if self._process is not None else None

    def answers(self) -> bool:
        """Whether an arbiter answers at the socket."""
        client = SocketArbiterClient(self.socket)
        try:
            client.request("status")
        except MachineError:
            return False
        finally:
            client.close()
        return True

    def start(self) -> None:
        """Start it, unless one answers already; returns once it answers."""
        self.stop()
        if self.answers():
            return
        self._process = KeptProcess(
            [sys.executable, "-m", "dstack_sched", "arbiter", *self._arguments],
            log_path=self.log_path,
            grace_s=5.0,
        )
        until = time.monotonic() + START_TIMEOUT_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise MachineError(f"the arbiter did not start: {last_line(self.log_path)}")
            time.sleep(0.05)

    def failure(self) -> str | None:
        """Why it is down; None while it runs. Another's arbiter is asked, ours is watched."""
        if self._process is None:
            return None if self.answers() else "answers no more"
        status = self._process.poll()
        return None if status is None else f"ended with status {status}"

    def stop(self) -> None:
        """Stop ours; safe to repeat."""
        if self._process is not None:
            self._process.stop()
            self._process = None


def last_line(log_path: Path) -> str:
    """The last line of a short log, of a JSON one its message; or where to look."""
    try:
        lines = log_path.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    if not lines:
        return f"see {log_path}"
    try:
        return str(json.loads(lines[-1])["message"])
    except (ValueError, TypeError, KeyError):
        return lines[-1]
