"""A model repository that cannot be used is one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dstack_sched.adapters.repository_check import check_repository
from dstack_sched.errors import InputError


def test_model_names_sorted_files_and_hidden_directories_left_out(tmp_path: Path) -> None:
    for name in ("b", "a", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "fetch.py").touch()
    assert check_repository(tmp_path) == ("a", "b")


def test_missing_not_a_directory_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such directory"):
        check_repository(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: not a directory"):
        check_repository(tmp_path / "file")
    with pytest.raises(InputError, match="empty; it wants"):
        check_repository(tmp_path)


def test_not_writable_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.access answers for a read-only place, since tests may run as root, to whom all is writable."""
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path).name == "model"))
    with pytest.raises(InputError, match=r"/model: not writable; configs are rewritten there"):
        check_repository(tmp_path)
    assert check_repository(tmp_path, writable=False) == ("model",)
