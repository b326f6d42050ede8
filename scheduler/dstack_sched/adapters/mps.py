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
from dstack_sched.adapters.mps_console import CONTROL, PIPE_VARIABLE, MpsConsole
from dstack_sched.domain.mps import MpsServer
from dstack_sched.errors import InputError, MachineError

GPU_DEVICE = Path("/dev/nvidiactl")
DEFAULT_PIPE_DIR = Path("/tmp/nvidia-mps")  # noqa: S108 - where NVIDIA's own default is
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
OWNER_FILE = "dstack-owner"  # in our own pipe directory: who started the daemon there
BY_HAND = "dstackctl mps start"
START_TIMEOUT_S = 15.0
QUIT_TIMEOUT_S = 10.0
WAIT_FOR_DAEMON_S = 15.0


def mps_available(environ: Mapping[str, str] = os.environ) -> bool:
    """A GPU and the control program are here."""
    return GPU_DEVICE.exists() and shutil.which(CONTROL, path=environ.get("PATH")) is not None


def own_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where our daemon has its pipes, always the same: clients of one that died find the next there."""
    return runtime_dir(environ) / "mps"


def usual_directories(environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Where a daemon may answer: $CUDA_MPS_PIPE_DIRECTORY, else NVIDIA's default place; then ours."""
    named = environ.get(PIPE_VARIABLE)
    return Path(named) if named else DEFAULT_PIPE_DIR, own_directory(environ)


def find_daemon(environ: Mapping[str, str] = os.environ) -> MpsConsole | None:
    """The daemon that programs of this environment would use, if one answers."""
    if not mps_available(environ):
        return None
    consoles = (MpsConsole(each, environ) for each in usual_directories(environ))
    return next((each for each in consoles if each.answers()), None)


def owner_of(console: MpsConsole, environ: Mapping[str, str] = os.environ) -> str | None:
    """Which command of ours started this daemon; None: somebody else did."""
    if console.pipe_dir != own_directory(environ):
        return None
    try:
        return (console.pipe_dir / OWNER_FILE).read_text().strip() or None
    except OSError:
        return None


class MpsDaemon:
    """ports.MpsControl. Ours runs in the foreground under a keeper, in pipe and log directories of this user.

    A daemon that already answers, in $CUDA_MPS_PIPE_DIRECTORY, in NVIDIA's default place or in ours (another
    dstackctl on this host started it), is used and never stopped. Errors: MachineError, InputError.
    """

    def __init__(self, log_path: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.log_path = log_path
        self._environ = dict(environ)
        self._process: KeptProcess | None = None
        self._down_since: float | None = None
        self._console = MpsConsole(usual_directories(environ)[0], environ)

    @property
    def name(self) -> str:
        return "MPS daemon"

    @property
    def owned(self) -> bool:
        """Whether the daemon in use was started by us."""
        return self._process is not None

    def available(self) -> bool:
        """A GPU and the control program are here."""
        return mps_available(self._environ)

    def running(self) -> bool:
        """Whether a daemon answers: ours, or one in the usual places, which is then the one in use."""
        if self._process is None:
            found = find_daemon(self._environ)
            self._console = found or MpsConsole(own_directory(self._environ), self._environ)
            return found is not None
        return self._console.answers()

    def servers(self) -> tuple[MpsServer, ...] | None:
        """The servers of the daemon in use; None when it does not answer. From any thread."""
        return self._console.servers()

    def start(self) -> Mapping[str, str]:
        """Start it if need be; the environment that clients need. {} where there is no GPU."""
        if not self.available():
            return {}
        if self._process is None and self.running():
            return {PIPE_VARIABLE: str(self._console.pipe_dir)}
        if self._process is None or self._process.poll() is not None:
            self._start_own()
        return client_environment(self._console.pipe_dir)

    def _start_own(self) -> None:
        if self._process is not None:
            self._process.stop()
        pipe_dir = prepare_directory(f"dstackctl, process {os.getpid()}", self._environ)
        self._console = MpsConsole(pipe_dir, self._environ)
        self._process = KeptProcess(
            [CONTROL, "-f"],
            log_path=self.log_path,
            env=daemon_environment(pipe_dir, self._environ),
            grace_s=QUIT_TIMEOUT_S,
            remove=[pipe_dir],
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

    def starting_again(self) -> bool:
        """Whether our daemon went down a moment ago: a CUDA process that starts now would have no share for
        life. One that stays down is not waited for. From any thread."""
        if self.failure() is None:
            self._down_since = None
            return False
        self._down_since = self._down_since or time.monotonic()
        return time.monotonic() - self._down_since < WAIT_FOR_DAEMON_S

    def stop(self) -> None:
        """Stop our daemon, if it is ours: asked first, so that its server process ends in order."""
        if self._process is not None:
            self._console.quit(QUIT_TIMEOUT_S)
            self._process.stop()
            self._process = None


def start_in_background(environ: Mapping[str, str] = os.environ) -> MpsConsole:
    """A daemon of ours that outlives this program. Errors: MachineError, InputError."""
    pipe_dir = prepare_directory(BY_HAND, environ)
    console = MpsConsole(pipe_dir, environ)
    run = subprocess.run(
        [CONTROL, "-d"], env=daemon_environment(pipe_dir, environ), text=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=START_TIMEOUT_S,
    )  # fmt: skip
    until = time.monotonic() + START_TIMEOUT_S
    while run.returncode == 0 and not console.answers() and time.monotonic() < until:
        time.sleep(0.05)
    if run.returncode != 0 or not console.answers():
        said = " ".join((run.stderr or run.stdout).split()) or "it does not answer"
        raise MachineError(f"the MPS daemon ({CONTROL} -d) did not start: {said}; see {pipe_dir / 'log'}")
    return console


def stop_in_background(console: MpsConsole) -> None:
    """End a daemon that start_in_background started, and its directories. Errors: MachineError."""
    console.quit(QUIT_TIMEOUT_S)
    until = time.monotonic() + QUIT_TIMEOUT_S
    while console.answers():
        if time.monotonic() > until:
            raise MachineError(f"the MPS daemon at {console.pipe_dir} did not end; end its process by hand")
        time.sleep(0.05)
    shutil.rmtree(console.pipe_dir, ignore_errors=True)


def client_environment(pipe_dir: Path) -> dict[str, str]:
    """What clients of a daemon there need."""
    return {PIPE_VARIABLE: str(pipe_dir), LOG_VARIABLE: str(pipe_dir / "log")}


def daemon_environment(pipe_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What a daemon of ours runs in. It sees all GPUs: under CUDA_VISIBLE_DEVICES it would number them anew,
    and clients with the same variable would look for numbers that are not there."""
    shown = {key: value for key, value in environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return {**shown, **client_environment(pipe_dir)}


def prepare_directory(owner: str, environ: Mapping[str, str]) -> Path:
    """Fresh directories for a daemon of ours. Errors: InputError where others could plant sockets there."""
    pipe_dir = own_directory(environ)
    private_directory(pipe_dir.parent)
    shutil.rmtree(pipe_dir, ignore_errors=True)
    for each in (pipe_dir, pipe_dir / "log"):
        each.mkdir(mode=0o700)
    (pipe_dir / OWNER_FILE).write_text(owner + "\n")
    return pipe_dir


def private_directory(path: Path) -> None:
    """Make it (0700), or check that it is ours alone: others must not plant sockets there."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{path}: must be a directory of yours that nobody else can write (chmod 700)")
