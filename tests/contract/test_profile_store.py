"""The profile store: kept by model hash and device, resumable, whole files only."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from dstack_sched.adapters.profile_store import FileProfileStore, model_sha256
from dstack_sched.domain.profile import CorunMember, CorunPoint, Device, ModelProfile, ProfilePoint
from dstack_sched.errors import InputError
from fakes.onnx_models import SlowSum

DEVICE = Device("NVIDIA H100 80GB HBM3", 132, 1 << 36, "580.1", "onnxruntime-gpu 1.31")
A, B = "a" * 64, "b" * 64


def profile(sha256: str, name: str = "m") -> ModelProfile:
    return ModelProfile(
        name, sha256, 5, (ProfilePoint(50, 1, 2.0, 2.1, 9), ProfilePoint(100, 1, 1.0, 1.1, 9))
    )


def corun(*models: str, latency_ms: float = 3.0) -> CorunPoint:
    return CorunPoint(tuple(CorunMember(model, 50, 1, latency_ms, 300.0) for model in models))


def test_a_profile_comes_back_by_hash_and_device(tmp_path: Path) -> None:
    store = FileProfileStore(tmp_path)
    assert store.get(A, DEVICE) is None
    store.put(profile(A), DEVICE)
    assert store.get(A, DEVICE) == profile(A)
    assert store.get(B, DEVICE) is None
    for other in (
        replace(DEVICE, driver="590"),
        replace(DEVICE, runtime="newer"),
        replace(DEVICE, name="L4"),
    ):
        assert store.get(A, other) is None
    assert [(d, m.name) for d, m in store.profiles()] == [(DEVICE, "m")]


def test_a_profile_of_one_point_can_be_kept_while_measuring(tmp_path: Path) -> None:
    store = FileProfileStore(tmp_path)
    first = replace(profile(A), points=profile(A).points[:1])
    store.put(first, DEVICE)
    assert store.get(A, DEVICE) == first


def test_a_profile_without_a_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model hash"):
        FileProfileStore(tmp_path).put(profile("../../etc/passwd"), DEVICE)


def test_export_names_models_and_their_coruns(tmp_path: Path) -> None:
    """Co-run points are kept by hash: a model renamed, or replaced under its name, is not mistaken."""
    store = FileProfileStore(tmp_path)
    store.put(profile(A), DEVICE)
    store.put(profile(B), DEVICE)
    store.put_corun([corun(A, B), corun(A, A)], DEVICE)
    store.put_corun([corun(B, A, latency_ms=4.0)], DEVICE)
    assert len(store.corun(DEVICE)) == 2, "the newer measurement of a setting replaces the older"
    both = store.export(DEVICE, {"x": A, "y": B})
    assert set(both.models) == {"x", "y"}
    assert {tuple(m.model for m in point.members) for point in both.corun} == {("y", "x"), ("x", "x")}
    assert [tuple(m.model for m in p.members) for p in store.export(DEVICE, {"z": A}).corun] == [("z", "z")]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 7}'])
def test_a_broken_file_says_delete_it(tmp_path: Path, text: str) -> None:
    store = FileProfileStore(tmp_path)
    store.put(profile(A), DEVICE)
    (path,) = tmp_path.glob("*/*.json")
    path.write_text(text)
    with pytest.raises(InputError, match=r"a+\.json.*delete this file"):
        store.get(A, DEVICE)


def test_the_hash_of_a_plain_model_is_that_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    SlowSum("m", inner=8, depth=1).save(path)
    assert model_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hash_covers_external_weights(tmp_path: Path) -> None:
    """Two models that differ in an external weight only must not share a profile."""
    SlowSum("m", inner=64, depth=1).save(tmp_path / "whole.onnx")
    model = onnx.load(str(tmp_path / "whole.onnx"))
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    before = model_sha256(path)
    weights = tmp_path / "weights.bin"
    changed = np.frombuffer(weights.read_bytes(), np.uint8).copy()
    changed[100] ^= 1
    weights.write_bytes(changed.tobytes())
    assert model_sha256(path) != before
    weights.unlink()
    with pytest.raises(InputError, match=r"weights\.bin"):
        model_sha256(path)


def test_what_is_no_model_has_no_hash(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("not a model")
    with pytest.raises(InputError, match="is not an ONNX model"):
        model_sha256(tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"none\.onnx"):
        model_sha256(tmp_path / "none.onnx")
