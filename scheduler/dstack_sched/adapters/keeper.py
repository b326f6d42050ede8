"""A keeper runs one program and leaves nothing of it behind, however the end comes.

    python keeper.py '{"command": [...], "log": PATH, "grace_s": 15, "childless_s": null, "shm_prefix": "...",
                       "remove": [PATH]}'

The parent holds the other end of the keeper's stdin. When it closes (the parent stopped us, or died, even
by kill -9) the program is asked to end (SIGTERM), then made to: after grace_s, or childless_s after the
last of the children that it had then ended, where that is sooner. (A Triton whose stubs are gone has no
work left, yet may wait for models that it has lost count of: decisions/0100.) Whatever it started is killed
too: the keeper is the subreaper of its descendants, so orphaned stub processes become its children. Then
the shared memory with our prefix and the listed directories are removed; when the program ends by itself
the directories are left to the parent, which may want to read the log. The keeper's own death by kill -9
sends the program SIGTERM (parent-death signal). Standard library only and run by path, so that it starts
fast and depends on nothing.

stdout: one line, the program's process id. Exit status: the program's, 128 + signal when a signal ended it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SHM = Path("/dev/shm")  # noqa: S108
LOOK_S = 0.2  # how often an ending program's children are looked for
SETTLE_S = 5.0  # how long killed descendants may take to be reaped


class Keeper:
    """One program, its descendants, and what they leave on disk."""

    def __init__(
        self,
        command: list[str],
        log: str,
        grace_s: float,
        childless_s: float | None,
        shm_prefix: str,
        remove: list[str],
    ) -> None:
        self.command = command
        self.log = log
        self.grace_s = grace_s
        self.childless_s = childless_s
        self.shm_prefix = shm_prefix
        self.remove = remove
        self.status: int | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)

    def run(self) -> int:
        """Start the program, wait for its end or for the parent's, clean up; returns the exit status."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        asked = True
        try:
            pid = self._start()
            print(pid, flush=True)  # noqa: T201
            self._wait(pid, wake_read, until=None)
            asked = self.status is None
            if asked:
                self._ask_to_end(pid, wake_read)
        finally:
            self._kill_descendants()
            self._clean(directories=asked)
        return self.status if self.status is not None else 128 + signal.SIGKILL

    def _start(self) -> int:
        keeper = os.getpid()

        def die_with_keeper() -> None:
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != keeper:  # it died between fork and prctl
                os._exit(1)

        with open(self.log, "ab") as log:  # noqa: PTH123
            return subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_keeper
            ).pid

    def _ask_to_end(self, pid: int, wake_read: int) -> None:
        until = time.monotonic() + self.grace_s
        watched = self.childless_s is not None and bool(children_of(pid))
        os.kill(pid, signal.SIGTERM)
        while self.status is None and time.monotonic() < until:
            if watched and not children_of(pid):
                watched = False
                until = min(until, time.monotonic() + (self.childless_s or 0.0))
            self._wait(pid, wake_read, until=min(until, time.monotonic() + LOOK_S) if watched else until)

    def _wait(self, pid: int, wake_read: int, until: float | None) -> None:
        """Until the program ends, or the time is up; with `until` None also until we are asked to stop."""
        asked = [wake_read] if until is not None else [wake_read, sys.stdin.fileno()]
        while True:
            self._reap(pid)
            left = None if until is None else until - time.monotonic()
            if self.status is not None or (left is not None and left <= 0):
                return
            ready, _, _ = select.select(asked, [], [], left)
            if wake_read in ready and set(os.read(wake_read, 64)) - {signal.SIGCHLD} and until is None:
                self._reap(pid)
                return
            if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 64):
                return

    def _reap(self, pid: int) -> None:
        while True:
            try:
                ended, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if ended == 0:
                return
            if ended == pid:
                code = os.waitstatus_to_exitcode(raw)
                self.status = code if code >= 0 else 128 - code

    def _kill_descendants(self) -> None:
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            for child in children_of(os.getpid()):
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.01)

    def _clean(self, *, directories: bool) -> None:
        if self.shm_prefix:
            for path in SHM.glob(f"{self.shm_prefix}*"):
                path.unlink(missing_ok=True)
        for name in self.remove if directories else ():
            shutil.rmtree(name, ignore_errors=True)


def children_of(parent: int) -> list[int]:
    """Direct children that live, from /proc. The name field may hold spaces and brackets: read behind the
    last one."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                children.append(int(entry.name))
    return children


if __name__ == "__main__":
    sys.exit(Keeper(**json.loads(sys.argv[1])).run())
