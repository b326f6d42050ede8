"""The MPS daemon of this host: an existing one is respected, else one of our own. GPU settings stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from dstack_sched.adapters.kept_process import KeptProcess
from dstack_sched.errors import MachineError

CONTROL = "nvidia-cuda-mps-control"
GPU_DEVICE = Path("/dev/nvidiactl")
DEFAULT_PIPE_DIR = Path("/tmp/nvidia-mps")  # noqa: S108 - where NVIDIA's own default is
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
START_TIMEOUT_S = 15.0
QUIT_TIMEOUT_S = 10.0


class MpsDaemon:
    """ports.MpsControl. Ours runs in the foreground under a keeper, in private pipe and log directories.

    Where $CUDA_MPS_PIPE_DIRECTORY (or NVIDIA's default) already has a daemon that answers, that one is used
    and never stopped. Errors: MachineError.
    """

    def __init__(self, log_path: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.log_path = log_path
        self._environ = dict(environ)
        self._process: KeptProcess | None = None
        self._pipe_dir = Path(environ.get(PIPE_VARIABLE, DEFAULT_PIPE_DIR))

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
        """Whether a daemon answers in the pipe directory in use."""
        return self.available() and self._ask("get_server_list") is not None

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
        if self._process is None:
            self._pipe_dir = Path(tempfile.mkdtemp(prefix="dstack-mps-"))
        else:  # it died: a new one in a fresh directory of the same name, which its clients know
            self._process.stop()
            self._pipe_dir.mkdir(mode=0o700)
        (self._pipe_dir / "log").mkdir()
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
            self._ask(f"quit -t {QUIT_TIMEOUT_S:.0f}", timeout_s=QUIT_TIMEOUT_S + 5.0)
            self._process.stop()
            self._process = None

    def _client_environment(self) -> dict[str, str]:
        return {
            **self._environ,
            PIPE_VARIABLE: str(self._pipe_dir),
            LOG_VARIABLE: str(self._pipe_dir / "log"),
        }

    def _ask(self, command: str, timeout_s: float = 5.0) -> str | None:
        """The daemon's answer to one control command; None when none answers."""
        try:
            run = subprocess.run(
                [CONTROL],
                input=command + "\n",
                text=True,
                capture_output=True,
                timeout=timeout_s,
                env=self._client_environment(),
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout if run.returncode == 0 else None
