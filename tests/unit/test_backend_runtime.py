"""Sessions: what a damaged or unsuited model file says, and that nothing falls back silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dstack_backend.errors import DeviceError, ModelError, RunError
from dstack_backend.runtime import load_session, threads_for
from fakes import feature_models as made


def load(path: Path):
    return load_session(path, provider="cpu", gpu_percent=50)


def saved(path: Path, proto: onnx.ModelProto) -> Path:
    made.save(proto, path)
    return path


def typed(kind: int, operator: str = "Identity", domain: str = "") -> onnx.ModelProto:
    nodes = [helper.make_node(operator, ["x"], ["y"], domain=domain)]
    proto = made.model(nodes, [made.value("x", kind, ["N", 2])], [made.value("y", kind, ["N", 2])])
    if domain:
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    return proto


def test_runs_and_names_its_tensors(tmp_path: Path) -> None:
    session = load(saved(tmp_path / "m.onnx", made.dense()))
    (name, dtype, shape), *_ = session.inputs
    assert (name, dtype, shape) == ("x", "tensor(float)", (None, 16))
    assert [spec.name for spec in session.outputs] == ["scores", "mean"]
    (mean,) = session.run({"x": np.ones((2, 16), np.float32)}, ["mean"])
    assert np.array_equal(mean, [1, 1])
    assert len(session.run({"x": np.ones((2, 16), np.float32)})) == 2
    session.close()
    with pytest.raises(RunError, match="closed"):
        session.run({"x": np.ones((2, 16), np.float32)})


def test_truncated_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", made.slow())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"m\.onnx: not a whole ONNX file .* copy it again"):
        load(path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"m\.onnx: an empty ONNX file"):
        load(tmp_path / "m.onnx")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file; put it there or name another"):
        load(tmp_path / "m.onnx")


def test_custom_operator(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", typed(TensorProto.FLOAT, "Fancy", "com.acme"))
    with pytest.raises(ModelError, match=r"uses a custom operator; .*com\.acme:Fancy"):
        load(path)


def test_unknown_operator(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"uses an unknown operator; .*Fancy"):
        load(saved(tmp_path / "m.onnx", typed(TensorProto.FLOAT, "Fancy")))


def test_bf16_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'x' has type tensor.bfloat16., .* FP32 or FP16"):
        load(saved(tmp_path / "m.onnx", typed(TensorProto.BFLOAT16)))


def test_external_data_missing_and_truncated(tmp_path: Path) -> None:
    made.save(made.dense(), tmp_path / "m.onnx", external="w.bin")
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match="external data file is truncated"):
        load(tmp_path / "m.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="external data file is missing"):
        load(tmp_path / "m.onnx")


def test_cuda_without_a_cuda_provider_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    path = saved(tmp_path / "m.onnx", made.dense())
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider: install onnxruntime-gpu"):
        load_session(path, provider="cuda", gpu_percent=50)


@pytest.mark.parametrize(("percent", "threads"), [(1, 1), (12.5, 1), (25, 2), (31, 2), (50, 4), (100, 8)])
def test_share_of_the_cores(percent: float, threads: int) -> None:
    assert threads_for(percent, 8) == threads


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_bad_share(tmp_path: Path, percent: float) -> None:
    with pytest.raises(ModelError, match="gpu_percent"):
        load_session(tmp_path / "m.onnx", provider="cpu", gpu_percent=percent)
