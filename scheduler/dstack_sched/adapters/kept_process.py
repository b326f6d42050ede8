"""Start a program under a keeper (keeper.py): it cannot outlive us, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstack_sched.errors import MachineError

KEEPER = Path(__file__).with_name("keeper.py")
KEEPER_SETTLE_S = 10.0


class KeptProcess:
    """One program in a session of its own, so that Ctrl-C on our terminal reaches us alone.

    `pid` is the program's own. `poll` and `wait` speak of the keeper, which ends with the program's status.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        grace_s: float = 10.0,
        childless_s: float | None = None,
        shm_prefix: str = "",
        remove: Sequence[Path] = (),
    ) -> None:
        self.log_path = log_path
        self._grace_s = grace_s
        self._remove = tuple(remove)
        spec = {
            "command": list(command),
            "log": str(log_path),
            "grace_s": grace_s,
            "childless_s": childless_s,
            "shm_prefix": shm_prefix,
            "remove": [str(each) for each in remove],
        }
        with log_path.open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        assert self._keeper.stdout is not None
        with self._keeper.stdout as stdout:
            line = stdout.readline()
        if not line:
            self.stop()
            raise MachineError(f"{command[0]} did not start: see {log_path}")
        self.pid = int(line)

    @property
    def keeper_pid(self) -> int:
        return self._keeper.pid

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._keeper.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end. Errors: subprocess.TimeoutExpired."""
        return self._keeper.wait(timeout_s)

    def stop(self) -> int:
        """Ask it to end, make it end, clean up after it; returns the exit status. Safe to call again."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        try:
            return self._keeper.wait(self._grace_s + KEEPER_SETTLE_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            return self._keeper.wait()
        finally:
            for each in self._remove:  # the keeper leaves them to us when the program ended by itself
                shutil.rmtree(each, ignore_errors=True)
