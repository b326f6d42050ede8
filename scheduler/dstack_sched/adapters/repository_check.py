"""Can this directory be a model repository of ours? Looked at before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

from dstack_sched.errors import InputError


def check_repository(repository: Path, *, writable: bool = True) -> tuple[str, ...]:
    """The names of its models, sorted. Errors: InputError for missing, not a directory, not writable, empty.

    writable: the controller rewrites config.pbtxt there, so model directories must be writable too.
    """
    if not repository.exists():
        raise InputError(f"model repository {repository}: no such directory")
    if not repository.is_dir():
        raise InputError(f"model repository {repository}: not a directory")
    if not os.access(repository, os.R_OK | os.X_OK):
        raise InputError(f"model repository {repository}: not readable (chmod u+rx)")
    models = tuple(
        sorted(each.name for each in repository.iterdir() if each.is_dir() and not each.name.startswith("."))
    )
    if not models:
        raise InputError(f"model repository {repository}: empty; it wants <model>/1/model.onnx")
    for place in (repository, *(repository / model for model in models)):
        if writable and not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"model repository {place}: not writable; configs are rewritten there")
    return models
