"""The fetcher of the sample models, run as `make models` runs it, on a wheel that lies in its cache."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

FETCH = Path(__file__).parents[2] / "model_repository" / "fetch.py"
CONTENT = b"not really a network"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # no __pycache__ in the model repository
    spec = importlib.util.spec_from_file_location("fetch", FETCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "thing-1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/model.onnx", CONTENT)
    return tmp_path / "cache"


def source(fetch: ModuleType, sha256: str) -> object:
    return fetch.Source("thing", "thing==1.0", "thing/model.onnx", sha256, "MIT")


def test_in_place_once_and_left_alone_afterwards(fetch: ModuleType, cache: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    wanted = source(fetch, hashlib.sha256(CONTENT).hexdigest())
    assert fetch.fetch(wanted, repository, cache) is True
    model = repository / "thing" / "1" / "model.onnx"
    assert model.read_bytes() == CONTENT
    written = model.stat().st_mtime_ns
    assert fetch.fetch(wanted, repository, cache) is False
    assert model.stat().st_mtime_ns == written, "a running server must not see a reason to reload"
    assert [each.name for each in repository.iterdir()] == ["thing"]
    model.write_bytes(b"damaged")
    assert fetch.fetch(wanted, repository, cache) is True
    assert model.read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_the_wheel_dropped(
    fetch: ModuleType, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected 00"):
        fetch.fetch(source(fetch, "00"), tmp_path, cache)
    assert not (tmp_path / "thing").exists()
    assert not list(cache.rglob("*.whl")), "the next run downloads it again"


def test_every_sample_model_has_a_config(fetch: ModuleType) -> None:
    models = [each.model for each in fetch.SOURCES]
    assert len(models) == len(set(models)) >= 4
    for model in models:
        config = (FETCH.parent / model / "config.pbtxt").read_text()
        assert 'backend: "dstack"' in config
