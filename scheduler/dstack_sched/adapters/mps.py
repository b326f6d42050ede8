"""The MPS daemon of this host: an existing one is respected, else one of our own. GPU settings stay."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from dstack_backend.endpoint import runtime_dir
from dstack_sched.adapters.kept_process import KeptProcess
from dstack_sched.errors import InputError, MachineError

CONTROL = "nvidia-cuda-mps-control"
GPU_DEVICE = Path("/dev/nvidiactl")
DEFAULT_PIPE_DIR = Path("/tmp/nvidia-mps")  # noqa: S108 - where NVIDIA's own default is
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
START_TIMEOUT_S = 15.0
QUIT_TIMEOUT_S = 10.0


class MpsDaemon:
    """ports.MpsControl. Ours runs in the foreground under a keeper, in pipe and log directories of this user.

    A daemon that already answers, in $CUDA_MPS_PIPE_DIRECTORY, in NVIDIA's default place or in ours (another
    dstackctl on this host started it), is used and never stopped. Errors: MachineError, InputError.
    """

    def __init__(self, log_path: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.log_path = log_path
        self._environ = dict(environ)
        self._process: KeptProcess | None = None
        self._own_dir = runtime_dir(environ) / "mps"
        named = environ.get(PIPE_VARIABLE)
        self._usual_dirs = [Path(named) if named else DEFAULT_PIPE_DIR, self._own_dir]
        self._pipe_dir = self._usual_dirs[0]

    @property
    def name(self) -> str:
        return "MPS daemon"

    @property
    def owned(self) -> bool:
        """Whether the daemon in use was started by us."""
        return self._process is not None

    def available(self) -> bool:
        """A GPU and the control program are here."""
        return GPU_DEVICE.exists() and shutil.which(CONTROL, path=self._environ.get("PATH")) is not None

    def running(self) -> bool:
        """Whether a daemon answers: ours, or one in the usual places, which is then the one in use."""
        if not self.available():
            return False
        if self._process is None:
            answering = (each for each in self._usual_dirs if self._answers(each))
            self._pipe_dir = next(answering, self._own_dir)
        return self._answers(self._pipe_dir)

    def start(self) -> Mapping[str, str]:
        """Start it if need be; the environment that clients need. {} where there is no GPU."""
        if not self.available():
            return {}
        if self._process is None and self.running():
            return {PIPE_VARIABLE: str(self._pipe_dir)}
        if self._process is None or self._process.poll() is not None:
            self._start_own()
        return {PIPE_VARIABLE: str(self._pipe_dir), LOG_VARIABLE: str(self._pipe_dir / "log")}

    def _start_own(self) -> None:
        """In a fresh directory, always of the same name: clients of one that died find the new one there."""
        if self._process is not None:
            self._process.stop()
        self._pipe_dir = self._own_dir
        private_directory(self._own_dir.parent)
        shutil.rmtree(self._own_dir, ignore_errors=True)
        (self._own_dir / "log").mkdir(parents=True, mode=0o700)
        self._process = KeptProcess(
            [CONTROL, "-f"],
            log_path=self.log_path,
            env=self._client_environment(),
            grace_s=QUIT_TIMEOUT_S,
            remove=[self._pipe_dir],
        )
        until = time.monotonic() + START_TIMEOUT_S
        while not self.running():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise MachineError(
                    f"the MPS daemon ({CONTROL} -f) did not start; see {self.log_path} or use --no-mps"
                )
            time.sleep(0.05)

    def failure(self) -> str | None:
        """Why our daemon is down; None while it runs, or where it is not ours."""
        status = self._process.poll() if self._process is not None else None
        return None if status is None else f"ended with status {status}"

    def stop(self) -> None:
        """Stop our daemon, if it is ours: asked first, so that its server process ends in order."""
        if self._process is not None:
            self._ask(f"quit -t {QUIT_TIMEOUT_S:.0f}", self._pipe_dir, timeout_s=QUIT_TIMEOUT_S + 5.0)
            self._process.stop()
            self._process = None

    def _client_environment(self) -> dict[str, str]:
        return {
            **self._environ,
            PIPE_VARIABLE: str(self._pipe_dir),
            LOG_VARIABLE: str(self._pipe_dir / "log"),
        }

    def _answers(self, pipe_dir: Path) -> bool:
        return pipe_dir.is_dir() and self._ask("get_server_list", pipe_dir) is not None

    def _ask(self, command: str, pipe_dir: Path, timeout_s: float = 5.0) -> str | None:
        """The daemon's answer to one control command; None when none answers."""
        try:
            run = subprocess.run(
                [CONTROL],
                input=command + "\n",
                text=True,
                capture_output=True,
                timeout=timeout_s,
                env={**self._environ, PIPE_VARIABLE: str(pipe_dir)},
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout if run.returncode == 0 else None


def private_directory(path: Path) -> None:
    """Make it (0700), or check that it is ours alone: others must not plant sockets there."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{path}: must be a directory of yours that nobody else can write (chmod 700)")
