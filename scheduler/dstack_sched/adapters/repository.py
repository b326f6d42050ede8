"""ports.ModelRepository on disk: reads configs, replaces them whole, and leaves the rest alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from dstack_sched.adapters.atomic_file import TEMPORARY_PREFIX, failed, flush_directory, replace_file, touch
from dstack_sched.adapters.config_pbtxt import edit_config, read_config
from dstack_sched.adapters.originals import Originals
from dstack_sched.domain.adoption import Original
from dstack_sched.domain.model_config import ConfigChange, ModelConfig
from dstack_sched.errors import InputError

CONFIG_NAME = "config.pbtxt"
MAX_CONFIG_BYTES = 4 * 1024 * 1024


class DiskRepository:
    """A model repository directory. A model is a directory with a config.pbtxt or a numbered version in it.

    Raises InputError where `root` is missing or no directory.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise InputError(f"model repository {root} {what}; name the directory that holds the models")
        self.root = root
        self.name = str(root)
        self._originals = Originals(root)

    def models(self) -> tuple[str, ...]:
        """Names of all models, sorted. Raises InputError where there is none, or the root cannot be read."""
        try:
            found = sorted(path.name for path in self.root.iterdir() if _is_model(path))
        except OSError as error:
            raise failed(self.root, "cannot be read", error) from error
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
            raise failed(path, "cannot be read", error) from error
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
        """Replace the file by one made beside the model's directory and flushed before the rename.

        Of an adopted model it is noted first that the text is ours.
        """
        path = self.config_path(model)
        self.check_writable(model)
        self._originals.note(model, self.read_config(model), text)
        try:
            if text is None:
                path.unlink(missing_ok=True)
                flush_directory(path.parent)
            else:
                replace_file(path, self._temporary_dir(path.parent), text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise failed(path, "cannot be written, the file is as it was", error) from error

    # -- originals of adopted models (originals.py) -----------------------------------------------------

    def adopted(self) -> tuple[str, ...]:
        """Models whose originals are kept, sorted; also those that are not in the repository any more."""
        return self._originals.models()

    def original(self, model: str) -> Original | None:
        """What was there before the adoption; None for a model that is as it was, or was never adopted."""
        return self._originals.get(model, self.read_config(model))

    def keep_originals(self, originals: Mapping[str, tuple[str | None, bool | None]]) -> None:
        """Before the first file is touched: model -> its config, and whether Triton serves it if known."""
        self._originals.keep(originals)

    def drop_unneeded_originals(self) -> None:
        """Those of models whose config is the original. Not while an edit of one is unfinished."""
        present = [model for model in self.adopted() if (self.root / model).is_dir()]
        self._originals.drop_where_back({model: self.read_config(model) for model in present})

    # -- time stamps, leftovers -------------------------------------------------------------------------

    def make_newer(self, model: str) -> None:
        """Make the model's version directories newer than all in them, so that the next load is a full one: a
        newer config of equal content is none (decisions/0030). No content changes."""
        versions = [path for path in self.model_dir(model).iterdir() if path.name.isdigit() and path.is_dir()]
        if not versions:
            raise InputError(f"model {model}: {self.model_dir(model)} has no version directory")
        for version in versions:
            try:
                newest = max(path.stat().st_mtime_ns for path in (version, *version.rglob("*")))
                touch(version, newest)
            except OSError as error:
                raise failed(version, "its time stamp cannot be set", error) from error

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
