"""config.pbtxt parameters -> Settings: defaults, what fits, and one clear line for what does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dstack_backend import settings as backend
from dstack_backend.errors import ModelError
from dstack_backend.mps_limits import MPS_MEMORY, limit_memory
from dstack_backend.settings import Settings, model_path, parse_settings


def arguments(config: dict[str, Any] | None = None, kind: str = "CPU", **parameters: str) -> dict[str, str]:
    """Triton's initialize() arguments of a model "m"."""
    texts = {key: {"string_value": value} for key, value in parameters.items()}
    return {
        "model_config": json.dumps({"max_batch_size": 8, "parameters": texts, **(config or {})}),
        "model_name": "m",
        "model_version": "2",
        "model_instance_name": "m_0_0",
        "model_instance_kind": kind,
        "model_instance_device_id": "1",
        "model_repository": "/models/m",
    }


def settings(config: dict[str, Any] | None = None, kind: str = "CPU", **parameters: str) -> Settings:
    return parse_settings(arguments(config, kind, **parameters))[0]


def test_defaults() -> None:
    got = settings()
    assert (got.model, got.version, got.instance) == ("m", "2", "m_0_0")
    assert got.model_path == Path("/models/m/2/model.onnx")
    assert (got.provider, got.device_id) == ("cpu", -1)
    assert (got.max_batch_size, got.batch_size, got.gpu_percent, got.slo_us) == (8, 8, 100, 0)
    assert not got.reject_late


def test_all_parameters_are_read() -> None:
    got = settings(
        kind="GPU", gpu_percent="37.5", slo_ms="12.5", batch_size="4", on_late="reject", prefetch="1.5",
        execution_provider="cuda", model_file="net.onnx", cuda_graphs="false", gpu_memory_limit_mb="512",
    )  # fmt: skip
    assert (got.provider, got.device_id, got.gpu_percent) == ("cuda", 1, 37.5)
    assert (got.slo_us, got.batch_size, got.reject_late, got.prefetch) == (12_500, 4, True, 1.5)
    assert got.model_path.name == "net.onnx"
    assert got.cuda["cuda_graphs"] is False
    assert got.cuda["memory_limit_bytes"] == 512 << 20


def test_a_bound_of_the_process_s_memory_is_in_mib() -> None:
    assert settings(kind="GPU").cuda["process_memory_limit_bytes"] == 0
    assert settings(kind="GPU", process_memory_limit_mb="2048").cuda["process_memory_limit_bytes"] == 2 << 30
    with pytest.raises(ModelError, match="process_memory_limit_mb is '-1'; a number in"):
        settings(kind="GPU", process_memory_limit_mb="-1")


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "1=2048M"), ("0=4G", "0=4G,1=2048M"), ("0=4G, 1=8G", "0=4G,1=2048M"), ("", "1=2048M")],
)
def test_the_bound_goes_into_the_environment_of_mps(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.delenv(MPS_MEMORY, raising=False)
    if before is not None:
        monkeypatch.setenv(MPS_MEMORY, before)
    limit_memory(1, 2 << 30)
    assert os.environ[MPS_MEMORY] == after


@pytest.mark.parametrize(
    ("text", "levels"),
    [("off", ()), ("auto", (25, 50, 100)), ("50, 12.5,50", (12.5, 50)), ("100", (100,)), ("", ())],
)
def test_levels(text: str, levels: tuple[float, ...]) -> None:
    cuda = settings(kind="GPU", levels=text).cuda
    assert (cuda["levels"], cuda["levels_needed"]) == (levels, text != "auto")


def test_the_readme_and_the_settings_agree_on_the_default_of_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(backend.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"| `levels` | `{backend.LEVELS_DEFAULT}` |" in readme
    monkeypatch.setattr(backend, "LEVELS_DEFAULT", "auto")
    assert settings(kind="GPU").cuda["levels"] == backend.AUTO_LEVELS
    assert not settings(kind="GPU").cuda["levels_needed"], "a default must do with any driver"


@pytest.mark.parametrize(
    "text", ["on", "0,50", "50,101", "50;60", ",", "nan", ",".join(map(str, range(1, 18)))]
)
def test_bad_levels(text: str) -> None:
    with pytest.raises(ModelError, match=r"parameter levels is .* by comma are wanted"):
        settings(kind="GPU", levels=text)


def test_a_model_without_batches_runs_one_at_a_time() -> None:
    assert settings({"max_batch_size": 0}).batch_size == 1


def test_default_model_filename_of_triton_is_heeded() -> None:
    assert settings({"default_model_filename": "a.onnx"}).model_path.name == "a.onnx"
    assert settings({"default_model_filename": "a.onnx"}, model_file="b.onnx").model_path.name == "b.onnx"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"gpu_percent": "0"}, "gpu_percent is '0'; a number in (0, 100]"),
        ({"gpu_percent": "half"}, "gpu_percent is 'half'"),
        ({"gpu_percent": "nan"}, "gpu_percent is 'nan'"),
        ({"gpu_percent": "101"}, "gpu_percent is '101'"),
        ({"slo_ms": "-1"}, "slo_ms is '-1'"),
        ({"batch_size": "9"}, "batch_size is '9'; a whole number in [1, 8]"),
        ({"batch_size": "2.5"}, "batch_size is '2.5'"),
        ({"on_late": "drop"}, "on_late is 'drop'; one of serve, reject"),
        ({"execution_provider": "tpu"}, "one of cuda, cpu"),
        ({"execution_provider": "cuda"}, "KIND_GPU in instance_group"),
        ({"model_file": "../model.onnx"}, "a file name in the version directory"),
        ({"gpu_precent": "50"}, "unknown parameter 'gpu_precent'; did you mean 'gpu_percent'?"),
        ({"slo": "50"}, "did you mean 'slo_ms'?"),
    ],
)
def test_bad_parameters_get_one_line_that_names_them(parameters: dict[str, str], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        settings(**parameters)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_of_others_are_left_alone() -> None:
    """Upper case is Triton's Python backend's; an unknown one may be another tool's: a warning, no error."""
    _, warnings = parse_settings(arguments(FORCE_CPU_ONLY_INPUT_TENSORS="no", owner="team-a"))
    assert len(warnings) == 1
    assert "'owner'" in warnings[0]


def test_parameters_of_the_onnxruntime_backend_are_no_slips_of_ours() -> None:
    """Guards adopted models: execution_mode looks like execution_provider, gpu_mem_limit like ours."""
    _, warnings = parse_settings(
        arguments(execution_mode="1", gpu_mem_limit="4294967296", cudnn_conv_algo_search="0")
    )
    assert warnings == []


def test_a_directory_model_onnx_holds_the_model(tmp_path: Path) -> None:
    (tmp_path / "1" / "model.onnx").mkdir(parents=True)
    (tmp_path / "2").mkdir()
    assert model_path(tmp_path / "1", {}, {}) == tmp_path / "1" / "model.onnx" / "model.onnx"
    assert model_path(tmp_path / "2", {}, {}) == tmp_path / "2" / "model.onnx"


def test_kind_model_is_refused() -> None:
    with pytest.raises(ModelError, match="KIND_GPU or KIND_CPU"):
        settings(kind="MODEL")
