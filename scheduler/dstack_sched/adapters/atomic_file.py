"""Files replaced whole or not at all, with time stamps that grow: Triton watches them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path

from dstack_sched.errors import InputError

TEMPORARY_PREFIX = ".dstack-"
# Newer than before even on file systems that keep whole seconds (or two, FAT).
COARSE_TIME_STEP_NS = 2_000_000_000


def replace_file(path: Path, temporary_dir: Path, data: bytes) -> None:
    """Put `data` in the place of a file, whole or not at all, newer than what was there, with its mode and
    owner. The temporary directory must be on the same file system. Raises OSError with the file as it was."""
    before = path.stat() if path.exists() else None
    temporary = temporary_dir / f"{TEMPORARY_PREFIX}{path.parent.name}-{os.getpid()}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if before:
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                with contextlib.suppress(PermissionError):  # only root can give a file away
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fsync(file.fileno())
        if before:
            make_newer(temporary, before.st_mtime_ns)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def make_newer(path: Path, than_ns: int) -> None:
    """Triton reloads a model only when a time stamp has grown; clocks jump and file systems round."""
    if path.stat().st_mtime_ns <= than_ns:
        touch(path, than_ns)


def touch(path: Path, than_ns: int) -> None:
    """The time now, or just past `than_ns` where that lies in the future."""
    now_ns = time.time_ns()
    try:
        os.utime(path, ns=(now_ns, max(now_ns, than_ns + 1_000_000)))
    except PermissionError:  # another's file that we may write: the time now, and no other
        os.utime(path)
    if path.stat().st_mtime_ns <= than_ns:
        os.utime(path, ns=(now_ns, than_ns + COARSE_TIME_STEP_NS))


def flush_directory(directory: Path) -> None:
    """What was renamed or removed in it is so after a power cut, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def failed(path: Path, what: str, error: OSError) -> InputError:
    """One line for what a file system refused, with the mend where there is one."""
    mend = {
        errno.ENOSPC: "; free some space",
        errno.EDQUOT: "; free some space",
        errno.EROFS: "; mount it read-write",
    }.get(error.errno or 0, "")
    return InputError(f"{path}: {what} ({error.strerror}){mend}")
