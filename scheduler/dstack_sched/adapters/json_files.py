"""JSON files of ours: read with one clear line for what is wrong, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_sched.errors import InputError


def read_text(path: Path, make_one: str) -> str:
    """The text of a file; `make_one` is the command that makes one. Errors: InputError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make one with `{make_one}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def parse_json(text: str, source: str) -> Any:
    """What the text holds; `source` is its name in error messages. Errors: InputError."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error})") from None


def check_version(root: Mapping[str, Any], source: str, version: int, mend: str) -> None:
    """Errors: InputError where the file's version is not the one that this program reads."""
    found = root.get("version")
    if found is True or found != version:
        raise InputError(f"{source}: version is {found!r}, this dstackctl reads version {version}; {mend}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON through a temporary file and a rename, so that no reader sees half of it.

    Errors: InputError when the place cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another place") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
