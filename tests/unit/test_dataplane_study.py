"""perf/dataplane: what is made of the measurements. The measuring itself is tried by a dry run on the CPU."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))

from dataplane import endurance
from dataplane.clients import Checked, row_bytes
from dataplane.references import relative_error
from dataplane.speed import stage_means_us
from dataplane.study import Study, carried
from dataplane.table import figures, markdown
from dstack_sched.errors import MachineError


@pytest.fixture(autouse=True)
def named_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports name the commit; a unit test asks no git."""
    monkeypatch.setenv("DSTACK_COMMIT", "tried")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)


def make_study(folder: Path, provider: str = "cuda", fresh: bool = False) -> Study:
    return Study(
        argparse.Namespace(
            provider=provider, models="resnet50,vgg19", state=folder / "state", out=folder / "out",
            log=folder / "state" / "log.txt", models_dir=folder, time_budget_s=100.0, fresh=fresh,
        )
    )  # fmt: skip


def closed_loop(rows_per_s: float, **more: object) -> dict[str, object]:
    return {"best": {"rows_per_s": rows_per_s, "concurrency": 4}, **more}


def raw_of(rows_per_s: float, p50: float, copies: float) -> dict[str, object]:
    row = {"device": {"rows_per_s": rows_per_s, "latency_ms_p50": p50}}
    return {**row, "copies": {"rows_per_s": rows_per_s / 2, "latency_ms_p50": copies}}


def test_ratios_are_against_the_raw_loop_without_copies_the_faster_one(study: Study) -> None:
    study.parts["raw"] = {"resnet50": {"16": raw_of(9999, 1.6, 2.0), "1": raw_of(9999, 0.1, 0.2)}}  # of later
    study.parts["served"] = {
        "models": {
            "resnet50": {
                "client_batch_16": closed_loop(4600),
                "client_batch_1": closed_loop(4000),
                "cuda_shared_memory": closed_loop(4700, memory="cuda"),
                "raw": raw_of(5000, 3.2, 4.0),
            }
        }
    }
    study.parts["overhead"] = {
        "models": {
            "resnet50": {
                "latency_ms_p50": 1.35,
                "stages_us": {"run": 900.0},
                "floor": {"latency_ms_p50": 0.3, "rows_per_s_client_batch_16": 70000.0},
                "raw": raw_of(1000, 1.0, 1.5),
            }
        }
    }
    found = figures(study)
    assert found["served_over_raw"] == {"resnet50": 0.92}
    assert found["cuda_shared_memory_over_raw"] == {"resnet50": 0.94}
    assert found["overhead_ms_p50"] == {"resnet50": 0.35}
    assert found["targets"] == {
        "resnet50: served over raw >= 0.9": True,
        "resnet50: CUDA shared memory over raw >= 0.95": False,
        "resnet50: served - raw <= 0.4 ms at p50": True,
    }
    text = markdown(study, found)
    assert "| resnet50 | 5000 | 2500 | 4600 (4 x 16) | 4000 (4 x 1) | 0.92 | 0.94 | 70000 |" in text
    assert "**not met**: resnet50: CUDA shared memory over raw >= 0.95" in text


def test_clients_with_system_memory_are_never_shown_as_cuda_memory(study: Study) -> None:
    models = {"resnet50": {"client_batch_16": closed_loop(1), "client_batch_1": closed_loop(1)}}
    models["resnet50"]["cuda_shared_memory"] = closed_loop(4700, memory="system")
    models["resnet50"]["raw"] = raw_of(5000, 3.2, 4.0)
    study.parts["served"] = {"models": models}
    assert figures(study)["cuda_shared_memory_over_raw"] is None


def test_a_report_without_any_part_has_all_keys_and_claims_nothing(study: Study) -> None:
    found = figures(study)
    named = {"served_over_raw", "overhead_ms_p50", "cuda_graphs", "level_switch_ms_p50", "reload_s_p50"}
    named |= {"leak", "mps_recovery_s"}
    assert all(found[key] is None for key in named) and found["targets"] == {}
    study.write(found)
    assert named <= json.loads(study.report.read_text()).keys()
    assert "Throughput" not in markdown(study, found)


def test_a_failing_part_is_recorded_and_its_figures_stay_away(study: Study, tmp_path: Path) -> None:
    def fails(_: Study) -> dict[str, object]:
        raise ValueError("no such\nthing")

    written = []
    study.run("leak", fails, 1.0, lambda: written.append(dict(study.parts)))
    assert written[0]["leak"]["error"] == "ValueError: no such thing"
    assert study.result("leak") == {} and figures(study)["leak"] is None
    assert study.problems == ["leak: ValueError: no such thing"]
    study.run("leak", lambda _: {"cycles": 1}, 1000.0, lambda: None)
    assert "not run" in study.problems[1], "no time for it"
    assert "error" in study.parts["leak"], "what is there stays"


@pytest.mark.parametrize("together", [True, False])
def test_one_model_that_fails_does_not_take_the_others_figures_away(study: Study, together: bool) -> None:
    def measure(name: str) -> str:
        if name == "vgg19":
            raise MachineError("out of\nmemory")
        return name.upper()

    found = study.each(["resnet50", "vgg19", "bert_base"], measure, together=together)
    assert found == {"resnet50": "RESNET50", "bert_base": "BERT_BASE"}
    assert study.problems == ["vgg19: out of memory"]
    assert study.each([], measure, together=together) == {}
    with pytest.raises(MachineError, match="none of vgg19 could be measured"):
        study.each(["vgg19"], measure, together=together)


def test_parts_of_earlier_runs_stay_unless_they_are_of_another_provider(tmp_path: Path) -> None:
    first = make_study(tmp_path)
    first.run("raw", lambda _: {"resnet50": {}}, 1.0, lambda: first.write({}))
    assert "raw" in make_study(tmp_path).parts
    assert make_study(tmp_path, fresh=True).parts == {}
    assert make_study(tmp_path, provider="cpu").parts == {}, "a dry run must not pass for a measurement"


def test_models_that_a_run_was_not_asked_for_keep_their_rows_with_their_date(study: Study) -> None:
    old = {"commit": "a", "date": "then", "models": {"resnet50": {"x": 1}, "vgg19": {"x": 2}}}
    new = {"commit": "b", "date": "now", "models": {"resnet50": {"x": 3}}}
    both = carried(old, dict(new, models=dict(new["models"])), ["resnet50"])
    assert both["models"] == {
        "resnet50": {"x": 3},
        "vgg19": {"x": 2, "carried_from": {"commit": "a", "date": "then"}},
    }
    assert carried(old, dict(new, models={}), ["resnet50", "vgg19"])["models"] == {}, (
        "what failed is not kept"
    )
    assert carried(old, {"error": "none"}, ["resnet50"]) == {"error": "none"}
    rows = carried({"date": "then", "bert_base": {"1": {}}}, {"date": "now", "vgg19": {}}, ["vgg19"])
    assert rows == {"date": "now", "vgg19": {}, "bert_base": {"1": {}, "carried_from": {"date": "then"}}}


def test_stage_means_are_by_sample_where_samples_are_counted_else_by_request() -> None:
    name, samples = "dstack_stage_seconds_total", "dstack_stage_samples_total"
    before = {
        (name, "m", "run"): 1.0,
        (samples, "m", "run"): 10.0,
        ("dstack_requests_total", "m", "m_0"): 5.0,
    }
    after = {
        (name, "m", "run"): 3.0,
        (samples, "m", "run"): 30.0,
        (name, "m", "respond"): 0.5,
        ("dstack_requests_total", "m", "m_0"): 105.0,
        (name, "other", "run"): 9.0,
    }
    assert stage_means_us(before, after, "m") == {"run": 100_000.0, "respond": 5_000.0}


def test_recovery_counts_from_the_kill_to_the_first_answer_that_no_failure_follows() -> None:
    seen = Checked("m", answered=[(9.0, 9.1), (11.0, 11.5), (14.0, 14.2), (15.0, 15.1)])
    seen.failed = [(10.1, 15.1), (12.0, 12.1)]  # the first one hung until its time limit
    assert endurance.recovered(seen, killed_s=10.0) == 4.2
    assert endurance.recovered(Checked("m", answered=[(9.0, 9.1)]), 10.0) is None
    never_failed = Checked("m", answered=[(9.0, 9.1), (10.5, 10.6)])
    assert endurance.recovered(never_failed, 10.0) == 0.6


def test_a_load_is_well_only_while_its_requests_are_answered() -> None:
    """Requests that hang fail late: what is not answered counts against it at once."""
    seen = Checked("m", sent=[1.0, 2.0, 3.0, 4.0])
    assert not seen.well_since(2.5) and not seen.well_since(9.0)
    seen.answered = [(3.0, 3.1), (4.0, 4.1)]
    assert seen.well_since(2.5) and not seen.well_since(0.5)


def test_growth_a_cycle_is_taken_from_the_second_half_of_the_rounds() -> None:
    """Triton's allocator grows over the first rounds; a leak goes on."""
    warm = [{"host_bytes": value} for value in (0, 500, 800, 900, 900, 900, 900, 900)]
    leaking = [{"host_bytes": 100 * n} for n in range(8)]
    assert endurance.slope(warm, "host_bytes") == pytest.approx(0, abs=1e-9)
    assert endurance.slope(leaking, "host_bytes") == pytest.approx(100)
    assert endurance.slope(leaking[:2], "host_bytes") == 0


def test_wrong_missing_and_undefined_outputs_are_errors() -> None:
    want = {"y": np.ones((2, 3), np.float32)}
    assert relative_error({"y": want["y"] * 1.01}, want) == pytest.approx(0.01, rel=1e-3)
    assert relative_error({}, want) == float("inf")
    assert relative_error({"y": np.ones((3, 2), np.float32)}, want) == float("inf")
    assert relative_error({"y": np.full((2, 3), np.nan, np.float32)}, want) == float("inf")


def test_an_output_region_holds_a_row_of_the_largest_output() -> None:
    assert row_bytes({"output": [{"dims": ["1000"]}, {"dims": ["128", "768"]}]}) == 8 * 128 * 768
    assert row_bytes({"output": [{"dims": ["-1"]}]}) == 8


def test_the_time_budget_runs_down(study: Study) -> None:
    left = study.left_s()
    time.sleep(0.01)
    assert study.left_s() < left <= 100
