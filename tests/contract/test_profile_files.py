"""profiles.json: what is written is read back; what is wrong is one line that names thing and mend."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dstack_sched.adapters.profile_files import (
    check_device,
    check_models,
    parse_profiles,
    read_profile_file,
    read_profiles,
    write_profiles,
)
from dstack_sched.errors import InputError

GPU = {
    "name": "NVIDIA H100 80GB HBM3",
    "sms": 132,
    "memory_bytes": 85520809984,
    "driver": "580.1",
    "runtime": "x 1.31",
}


def point(percent: float, batch: int, p50: float, p99: float | None = None) -> dict[str, Any]:
    return {
        "gpu_percent": percent,
        "batch_size": batch,
        "latency_ms_p50": p50,
        "latency_ms_p99": p50 * 1.02 if p99 is None else p99,
        "samples": 40,
    }


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "version": 1,
        "gpu": dict(GPU),
        "models": {
            "resnet50": {
                "sha256": "ab" * 32,
                "memory_bytes": 1 << 30,
                "points": [point(10, 16, 20.47), point(40, 16, 6.2), point(100, 16, 3.44), point(10, 1, 3.6)],
                "fit": {"a0": 0.7, "a1": 0.01, "a2": 10.0, "a3": 6.2, "max_relative_error": 0.03},
                "knee": {"gpu_percent": 60, "batch_size": 16},
                "levels": [25, 50, 100],
            },
            "vgg19": {"points": [point(10, 16, 37.59), point(100, 16, 5.27)]},
        },
        "corun": [
            {
                "members": [
                    {
                        "model": n,
                        "gpu_percent": 50,
                        "batch_size": 16,
                        "latency_ms_p50": 6.3,
                        "throughput_per_s": 2500,
                    }
                    for n in ("resnet50", "vgg19")
                ]
            }
        ],
    }


def parse(document: Any) -> Any:
    return parse_profiles(json.dumps(document), "p.json")


def test_written_profiles_are_read_back_equal(document: dict[str, Any], tmp_path: Path) -> None:
    profiles = parse(document).profiles
    path = tmp_path / "new" / "profiles.json"
    write_profiles(path, profiles)
    again = read_profiles(path)
    assert again.device == profiles.device
    assert again.corun == profiles.corun
    assert set(again.models["resnet50"].points) == set(profiles.models["resnet50"].points)
    assert again.models["resnet50"].fit == profiles.models["resnet50"].fit
    assert again.models["resnet50"].levels == (25.0, 50.0, 100.0)
    assert [p.name for p in path.parent.iterdir()] == ["profiles.json"], "no temporary file stays"
    write_profiles(path, again)
    assert read_profiles(path) == again


def test_keys_beside_the_contract_are_left_alone(document: dict[str, Any]) -> None:
    document["cuda_graph"] = [1]
    document["models"]["resnet50"]["comment"] = "mine"
    result = parse(document)
    assert result.notes == ("p.json: cuda_graph is not part of the contract and was left out",)


def test_a_table_of_coruns_is_understood_where_it_says_enough(document: dict[str, Any]) -> None:
    table = {
        "models": ["resnet50", "vgg19"],
        "batch_size": 16,
        "throughput_per_s": [2535, 2505],
        "latency_ms_p50": [6, 7],
    }
    document["corun"] = [
        {"setting": "MPS", "gpu_percent": 50, **table},
        {"setting": "no MPS", "gpu_percent": None, **table},
        {"setting": "totals", "total_per_s": {"MPS 25": [1, 2]}},
    ]
    result = parse(document)
    assert [m.latency_ms_p50 for p in result.profiles.corun for m in p.members] == [6, 7]
    assert len(result.notes) == 2


def test_the_h100_measurements_of_this_project_are_read() -> None:
    path = Path(__file__).parents[2] / "../shared/measurements/h100_2026-11-22.json"
    if not path.exists():
        pytest.skip("the shared measurements are not here")
    result = read_profile_file(path)
    assert set(result.profiles.models) == {"resnet50", "mobilenet_v2", "vgg19", "bert"}
    assert len(result.profiles.corun) == 3
    assert len(result.profiles.models["resnet50"].points) == 10


def change(path: str, value: Any) -> Any:
    """A change of a document: `path` with dots, numbers index lists; `...` deletes."""

    def apply(document: dict[str, Any]) -> dict[str, Any]:
        document = copy.deepcopy(document)
        target: Any = document
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            target = target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value
        return document

    return apply


POINT = "models.resnet50.points.1"
BAD = {
    "NaN": (
        change(f"{POINT}.latency_ms_p50", float("nan")),
        "p.json: resnet50 point 2: latency_ms_p50 is nan",
    ),
    "infinite": (change(f"{POINT}.latency_ms_p99", float("inf")), "latency_ms_p99 is inf"),
    "negative": (change(f"{POINT}.latency_ms_p50", -6.2), "resnet50 point 2: latency_ms_p50 is -6.2"),
    "zero": (change(f"{POINT}.latency_ms_p50", 0), "latency_ms_p50 is 0, it must be above 0"),
    "text": (change(f"{POINT}.latency_ms_p50", "6.2"), "latency_ms_p50 must be a number, it is '6.2'"),
    "p99 below p50": (change(f"{POINT}.latency_ms_p99", 1.0), "latency_ms_p99 1 is below"),
    "one point": (change("models.vgg19.points", [point(10, 1, 3)]), "p.json: vgg19: has 1 point, at least 2"),
    "no points": (change("models.vgg19.points", []), "vgg19: has 0 points, at least 2"),
    "twice": (change(f"{POINT}", point(10, 16, 20.0)), "resnet50: GPU% 10, batch 16 stands there twice"),
    "slower with more GPU%": (
        change(f"{POINT}.latency_ms_p50", 2.0),
        "resnet50: not monotone: 3.44 ms at GPU% 100",
    ),
    "faster with a larger batch": (
        change("models.resnet50.points.3", point(10, 1, 3600)),
        "not monotone: 3600 ms",
    ),
    "wrong version": (change("version", 2), "p.json: version is 2, this dstackctl reads version 1"),
    "version true": (change("version", True), "version is True"),
    "no version": (change("version", ...), "version is None"),
    "no gpu": (change("gpu", ...), "p.json: gpu: is missing"),
    "no sms": (change("gpu.sms", ...), "p.json: gpu: sms must be a number"),
    "no models": (change("models", {}), "models is empty"),
    "models a list": (change("models", []), "models: is not an object"),
    "GPU% of 0": (change(f"{POINT}.gpu_percent", 0), "gpu_percent is 0, a GPU% lies above 0"),
    "GPU% of 101": (change(f"{POINT}.gpu_percent", 101), "gpu_percent is 101"),
    "batch of 1.5": (change(f"{POINT}.batch_size", 1.5), "batch_size is 1.5, it must be a whole number"),
    "no samples": (change(f"{POINT}.samples", 0), "samples is 0"),
    "fit": (change("models.resnet50.fit.a2", -1), "resnet50 fit: a2 is -1"),
    "knee": (change("models.resnet50.knee.gpu_percent", 400), "resnet50 knee: gpu_percent is 400"),
    "levels": (change("models.resnet50.levels", [0]), "resnet50: level is 0"),
    "corun": (change("corun.0.members", []), "corun 1: needs at least two models"),
    "corun throughput": (change("corun.0.members.0.throughput_per_s", 0), "corun 1: throughput_per_s is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_profile_is_one_line(document: dict[str, Any], case: str) -> None:
    spoil, wanted = BAD[case]
    with pytest.raises(InputError) as caught:
        parse(spoil(document))
    text = str(caught.value)
    assert wanted in text
    assert text.startswith("p.json")
    assert "\n" not in text
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"version": 1'])
def test_what_is_no_profile_at_all_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"p\.json"):
        read_profiles(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; make one with `dstackctl profile"):
        read_profiles(tmp_path / "none.json")


def test_noise_below_the_tolerance_is_no_error(document: dict[str, Any]) -> None:
    assert parse(change(f"{POINT}.latency_ms_p50", 3.0)(document)).profiles


def test_another_device_or_model_is_refused(document: dict[str, Any]) -> None:
    profiles = parse(document).profiles
    check_device(profiles, profiles.device.name, "p.json")
    with pytest.raises(InputError, match=r"p\.json: measured on NVIDIA H100.*the plan is for L4; profile on"):
        check_device(profiles, "L4", "p.json")
    check_models(profiles, {"vgg19": "cd" * 32, "unknown": "cd" * 32}, "p.json")
    check_models(profiles, {"resnet50": profiles.models["resnet50"].sha256}, "p.json")
    with pytest.raises(
        InputError, match=r"p\.json: resnet50 was measured with another model file.*profile it"
    ):
        check_models(profiles, {"resnet50": "cd" * 32}, "p.json")
