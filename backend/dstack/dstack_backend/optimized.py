"""What was found out or made for a model once, kept in a private cache: a directory an entry, with checksums.

The key tells the content of the model, the device, ONNX Runtime's version and the options that matter, so an
entry never goes stale. Model repositories may be read-only: nothing is written there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from dstack_backend.errors import DeviceError
from dstack_backend.onnx_file import external_files

CACHE_VARIABLE = "DSTACK_CACHE_DIR"
SUMS = "sums.json"
MAX_BYTES = 32 << 30
SPARE_BYTES = 1 << 30  # of the disk, left to others


def cache_directory(environ: dict[str, str] | None = None) -> Path:
    """$DSTACK_CACHE_DIR, else $XDG_CACHE_HOME/dstack, else ~/.cache/dstack."""
    environ = dict(os.environ) if environ is None else environ
    if named := environ.get(CACHE_VARIABLE):
        return Path(named)
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/tmp") / ".cache"  # noqa: S108
    return Path(base) / "dstack"


def key_of(model_path: Path, traits: Iterable[str]) -> str:
    """The name of an entry: a digest of a model's files and of the traits that change what is in it."""
    digest = hashlib.blake2b(digest_size=20)
    for part in (*traits, *(content_of(path) for path in (model_path, *external_files(model_path)))):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def content_of(path: Path) -> str:
    """Name and digest of a file."""
    status = path.stat()
    return f"{path.name}:{_digest(path, status.st_ino, status.st_size, status.st_mtime_ns)}"


@lru_cache(maxsize=64)
def _digest(path: Path, *_: int) -> str:
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class Cache:
    """Entries under a directory of ours (0700), the longest unused ones removed beyond max_bytes.

    Errors: OSError and DeviceError mean that nothing can be kept; the caller does without.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int = MAX_BYTES):
        self._directory = (directory or cache_directory()) / "optimized"
        self._max_bytes = max_bytes

    def get(self, key: str, make: Callable[[Path], None], size_bytes: int) -> Path:
        """The directory of an entry; where there is none, make(directory to fill) makes it first.

        size_bytes: about what it will take. Several processes may make the same entry: one stays.
        """
        entry = self._directory / key
        self._check_owner()
        if entry.is_dir():
            if is_whole(entry):
                os.utime(entry)
                return entry
            shutil.rmtree(entry, ignore_errors=True)
        self._make_room(size_bytes)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=self._directory))
        try:
            make(made)
            seal(made)
            try:
                made.rename(entry)
            except OSError:
                if not is_whole(entry):  # else another process was first
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return entry

    def _check_owner(self) -> None:
        """Sessions trust what lies here: it must be ours alone."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._directory.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise DeviceError(
                f"{self._directory}: others can write there; set {CACHE_VARIABLE} to a private one"
            )

    def _make_room(self, size_bytes: int) -> None:
        entries = []
        for entry in self._directory.iterdir():
            with contextlib.suppress(OSError):  # another process removes too
                used = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, used, entry))
        entries.sort(reverse=True)
        held = sum(used for _, used, _ in entries)
        while entries and held + size_bytes > self._max_bytes:
            _, used, oldest = entries.pop()
            shutil.rmtree(oldest, ignore_errors=True)
            held -= used
        if shutil.disk_usage(self._directory).free < size_bytes + SPARE_BYTES:
            raise OSError(f"{self._directory}: the disk is nearly full; set {CACHE_VARIABLE} to another one")


def seal(entry: Path) -> None:
    """Bring an entry to the disk, with its checksums: after a crash of the host it is whole or seen not to
    be.
    """
    sums = {file.name: checksum(file) for file in entry.iterdir()}
    (entry / SUMS).write_text(json.dumps(sums), encoding="utf-8")
    for path in (*entry.iterdir(), entry):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_whole(entry: Path) -> bool:
    """Whether the files of an entry are those that were sealed."""
    try:
        sums = json.loads((entry / SUMS).read_text(encoding="utf-8"))
        return all(checksum(entry / name) == wanted for name, wanted in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            found = zlib.crc32(chunk, found)
    return found
