"""ports.ModelRepository on disk: reads configs, replaces them whole, and leaves the rest alone."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path

from dstack_sched.adapters.config_pbtxt import edit_config, read_config
from dstack_sched.domain.model_config import ConfigChange, ModelConfig
from dstack_sched.errors import InputError

CONFIG_NAME = "config.pbtxt"
MAX_CONFIG_BYTES = 4 * 1024 * 1024
TEMPORARY_PREFIX = ".dstack-"
# Newer than before even on file systems that keep whole seconds (or two, FAT).
COARSE_TIME_STEP_NS = 2_000_000_000


class DiskRepository:
    """A model repository directory. A model is a directory with a config.pbtxt or a numbered version in it.

    Raises InputError where `root` is missing or no directory.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise InputError(f"model repository {root} {what}; name the directory that holds the models")
        self.root = root

    def models(self) -> tuple[str, ...]:
        """Names of all models, sorted. Raises InputError where there is none, or the root cannot be read."""
        try:
            found = sorted(path.name for path in self.root.iterdir() if _is_model(path))
        except OSError as error:
            raise _failed(self.root, "cannot be read", error) from error
        if not found:
            raise InputError(f"model repository {self.root} holds no model: MODEL/1/model.onnx is wanted")
        return tuple(found)

    def config_path(self, model: str) -> Path:
        return self.model_dir(model) / CONFIG_NAME

    def model_dir(self, model: str) -> Path:
        """The model's directory. Raises InputError for a model that is not there."""
        path = self.root / model
        if "/" in model or model in ("", ".", "..") or not path.is_dir():
            raise InputError(f"model {model} is not in {self.root}; it has {', '.join(self.models())}")
        return path

    def read_config(self, model: str) -> str | None:
        path = self.config_path(model)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_CONFIG_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed(path, "cannot be read", error) from error
        if len(data) > MAX_CONFIG_BYTES:
            raise InputError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, this is no model config")
        return data.decode("utf-8", "surrogateescape")

    def config(self, model: str) -> ModelConfig:
        return read_config(self.read_config(model) or "", str(self.config_path(model)))

    def edited(self, model: str, change: ConfigChange) -> str:
        return edit_config(self.read_config(model) or "", change, str(self.config_path(model)))

    def check_writable(self, model: str) -> None:
        path = self.config_path(model)
        if path.is_symlink():
            raise InputError(
                f"{path}: is a link to {path.readlink()}; put a copy in its place, then try again"
            )
        for directory in (path.parent, self._temporary_dir(path.parent)):
            if not os.access(directory, os.W_OK | os.X_OK):
                raise InputError(f"{directory}: is not writable; nothing was changed")

    def write_config(self, model: str, text: str | None) -> None:
        """Replace the file by one made beside the model's directory and flushed before the rename."""
        path = self.config_path(model)
        self.check_writable(model)
        try:
            if text is None:
                path.unlink(missing_ok=True)
                _flush_directory(path.parent)
            else:
                _replace(path, self._temporary_dir(path.parent), text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise _failed(path, "cannot be written, the file is as it was", error) from error

    def make_newer(self, model: str) -> None:
        """Make the model's version directories newer than all in them, so that the next load is a full one: a
        newer config of equal content is none (decisions/0030). No content changes."""
        versions = [path for path in self.model_dir(model).iterdir() if path.name.isdigit() and path.is_dir()]
        if not versions:
            raise InputError(f"model {model}: {self.model_dir(model)} has no version directory")
        for version in versions:
            try:
                newest = max(path.stat().st_mtime_ns for path in (version, *version.rglob("*")))
                _touch(version, newest)
            except OSError as error:
                raise _failed(version, "its time stamp cannot be set", error) from error

    def sweep(self) -> None:
        """Remove temporary files that a killed controller left. Only for the holder of the journal's lock."""
        for folder in (self.root, *(self.root / model for model in self.models())):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*.tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _temporary_dir(self, model_dir: Path) -> Path:
        """On the model's file system, and not inside the model's directory, which Triton watches.

        A model that is a mount of its own leaves no choice but its own directory.
        """
        real = model_dir.resolve()
        device = real.stat().st_dev
        outside = (self.root.resolve(), real.parent)
        return next((path for path in outside if path.stat().st_dev == device), real)


def _is_model(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_dir():
        return False
    return (path / CONFIG_NAME).exists() or any(
        version.name.isdigit() and version.is_dir() for version in path.iterdir()
    )


def _replace(path: Path, temporary_dir: Path, data: bytes) -> None:
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
            _make_newer(temporary, before.st_mtime_ns)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def _make_newer(path: Path, than_ns: int) -> None:
    """Triton reloads a model only when a time stamp has grown; clocks jump and file systems round."""
    if path.stat().st_mtime_ns <= than_ns:
        _touch(path, than_ns)


def _touch(path: Path, than_ns: int) -> None:
    """The time now, or just past `than_ns` where that lies in the future."""
    now_ns = time.time_ns()
    try:
        os.utime(path, ns=(now_ns, max(now_ns, than_ns + 1_000_000)))
    except PermissionError:  # another's file that we may write: the time now, and no other
        os.utime(path)
    if path.stat().st_mtime_ns <= than_ns:
        os.utime(path, ns=(now_ns, than_ns + COARSE_TIME_STEP_NS))


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed(path: Path, what: str, error: OSError) -> InputError:
    mend = {
        errno.ENOSPC: "; free some space",
        errno.EDQUOT: "; free some space",
        errno.EROFS: "; mount it read-write",
    }.get(error.errno or 0, "")
    return InputError(f"{path}: {what} ({error.strerror}){mend}")
