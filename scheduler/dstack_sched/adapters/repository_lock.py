"""One at a time on a model repository: a lock on its directory, whatever state directory each one uses.

Held while configs are rewritten or models reloaded, by `dstackctl apply`, `run`, `serve`, `adopt`. It goes
with the process that holds it, so there is nothing to clean up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from dstack_sched.errors import InputError, MachineError

POLL_S = 0.1
UNSUPPORTED = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # NFS wants a writable descriptor


class RepositoryLock:
    """A context manager. wait_s: how long to wait for a holder to end.

    beside: a file to lock where the file system cannot lock a directory (NFS); then those that share the
    state directory keep out of each other's way, at least. Errors: MachineError while another one holds it,
    InputError where the directory cannot be opened.
    """

    def __init__(self, repository: Path, *, beside: Path, wait_s: float = 0.0) -> None:
        self._repository = repository
        self._beside = beside
        self._wait_s = wait_s
        self._descriptor: int | None = None

    def __enter__(self) -> RepositoryLock:
        try:
            self._descriptor = os.open(self._repository, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"model repository {self._repository}: {error.strerror}") from error
        try:
            self._lock()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # and with it goes the lock
            self._descriptor = None

    def _lock(self) -> None:
        until = time.monotonic() + self._wait_s
        while not self._try():
            if time.monotonic() >= until:
                raise MachineError(
                    f"{self._repository}: dstackctl (pid {self._holder()}) is rewriting it; wait for its end"
                )
            time.sleep(POLL_S)

    def _try(self) -> bool:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED or not self._lock_file_instead():
                raise InputError(f"model repository {self._repository}: {error.strerror}") from error
            return self._try()
        return True

    def _lock_file_instead(self) -> bool:
        """From now on the file beside; False where it is that already."""
        assert self._descriptor is not None
        if not Path(f"/proc/self/fd/{self._descriptor}").is_dir():
            return False
        try:
            self._beside.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"{self._beside}: {error.strerror}; choose another with --state DIR") from error
        os.close(self._descriptor)
        self._descriptor = file
        return True

    def _holder(self) -> str:
        """The process id of who holds it, as the kernel tells."""
        assert self._descriptor is not None
        inode = os.fstat(self._descriptor).st_ino
        try:
            for line in Path("/proc/locks").read_text().splitlines():
                words = line.split()
                if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                    return words[4]
        except (OSError, IndexError):
            pass
        return "unknown"
