"""perf/compare: what is compared, in which order, and what is made of the figures. No server, no GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  where no cache of fonts is there, it starts fc-list: not in a test
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))

from compare import summary
from compare.alternatives import ALTERNATIVES, Alternative, Served, config_text, server_arguments
from compare.cells import Cell, arrivals_of, network_of
from compare.deployment import stage_means_ms
from compare.peak import Trial, find_peak
from compare.planning import Planner, profiles_of
from compare.report import write
from compare.stalls import length_s, outside, stretches_of
from compare.static_search import StaticSearch, candidates
from compare.traces import CDF_PERCENTS, LostLoadError, Recorder, served_share, spans, trial_of
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.domain.load import BenchResult, LoadTrace, ModelResult
from dstack_sched.domain.workload import ModelDemand, OnLate
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import InputError
from dstack_sched.policy.latency import LatencySurface

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "perf" / "reports" / "h100" / "profiles.json"
NONE = np.empty((0, 2))


def test_all_eight_alternatives_are_there_and_share_servers_where_only_the_policy_differs() -> None:
    assert sorted(each.letter for each in ALTERNATIVES.values()) == list("abcdefgh")
    servers = {name: each.server for name, each in ALTERNATIVES.items()}
    assert servers["temporal"] == servers["mps-default"]
    assert len({*servers.values()} - {servers["best-static"]}) == 6


def test_a_variant_is_an_alternative_of_its_own() -> None:
    variant = Alternative.parse("dstack+levels=off+capacity=250+shares=planned")
    assert (variant.letter, variant.variant_of, variant.shares) == ("h*", "dstack", "planned")
    assert variant.told_by_name == {"capacity": 250.0} and variant.config["levels"] == "off"
    assert variant.server == ALTERNATIVES["mps-static"].server  # the arbiter alone makes the difference
    assert Alternative.parse("dstack+capacity=250").server == ALTERNATIVES["dstack"].server
    assert Alternative.parse("dstack+levels=auto").server != ALTERNATIVES["dstack"].server
    assert Alternative.parse("dstack+levels=off").server == ALTERNATIVES["dstack"].server
    unlearned = Alternative.parse("dstack+learn=off")
    assert not unlearned.learn and ALTERNATIVES["dstack"].learn
    assert unlearned.server != ALTERNATIVES["dstack"].server  # its shares are others
    assert Alternative.parse("temporal+cuda_graphs=false").config["cuda_graphs"] == "false"


@pytest.mark.parametrize(
    ("text", "part"),
    [("dstak", "no 'dstak'"), ("dstack+levels", "KEY=VALUE"), ("dstack+capacity=x", "above 0"),
     ("dstack+level=off", "level=off"), ("mps-default+learn=on", "learn=on"),
     ("dstack+policy=none", "policy=none")],
)  # fmt: skip
def test_a_bad_alternative_is_named(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        Alternative.parse(text)


def test_the_rate_limiter_is_switched_on_and_counts_what_runs() -> None:
    limited = ALTERNATIVES["rate-limiter"]
    text = config_text(Served(gpu_percent=35.0, batch_size=4), limited, "KIND_GPU")
    assert "count: 35 }" in text and 'key: "prefetch" value { string_value: "0" }' in text
    assert "--rate-limit=execution_count" in server_arguments(limited)
    assert server_arguments(ALTERNATIVES["mps-static"]) == ("--allow-gpu-metrics=false",)


def test_the_search_makes_large_steps_while_it_is_far_off() -> None:
    """A guess that is ten times too low or too high must not cost a trial for every quarter."""
    for guess in (100.0, 10_000.0):
        found = find_peak(
            lambda rate: Trial(rate, 1.0 if rate <= 1000.0 else 0.1, rate), guess, wanted=0.99,
            tolerance=0.06, max_trials=12,
        )  # fmt: skip
        assert found.closed and 900.0 < found.peak_per_s <= 1000.0


def test_a_candidate_that_cannot_be_the_best_costs_one_trial() -> None:
    found = find_peak(lambda rate: Trial(rate, 0.0, 0.0), 106.0, wanted=0.99, worth_per_s=106.0)
    assert len(found.trials) == 1 and found.peak_per_s == 0.0


KNEES = {"a": Served(10.0, 4), "b": Served(15.0, 8), "c": Served(35.0, 8)}


def searched(search: StaticSearch, peaks: dict[str, float], seconds: list[float]) -> list[str]:
    """Run a search whose candidates have these peaks (others 10/s) and that is cut short when `seconds`
    (what is left, by candidate) run out; the names deployed."""
    names = {json.dumps({m: [s.gpu_percent, s.batch_size, s.instances] for m, s in shares.items()}): name
             for name, shares in candidates(KNEES)}  # fmt: skip
    deployed: list[str] = []

    def deploy(shares: Any) -> None:
        key = json.dumps({m: [s.gpu_percent, s.batch_size, s.instances] for m, s in shares.items()})
        deployed.append(names[key])

    def run(rate_per_s: float) -> Trial:
        return Trial(rate_per_s, 1.0 if rate_per_s <= peaks.get(deployed[-1], 10.0) else 0.5, rate_per_s)

    left = iter(seconds)
    now = [1e9]

    def left_s() -> float:
        return now[0]

    def deploy_and_tick(shares: Any) -> None:
        deploy(shares)
        now[0] = next(left, 0.0)

    search.run(
        KNEES, deploy_and_tick, run, wanted=0.99, start_per_s=100.0, left_s=left_s, candidate_s=5.0,
        trial_s=1.0, say=lambda text: None, keep=lambda: None,
    )  # fmt: skip
    return deployed


def test_the_static_search_finds_the_best_candidate_and_starts_from_the_planned_one() -> None:
    search = StaticSearch()
    best = "equal shares, 150% promised"
    searched(search, {best: 150.0, "no limits": 120.0}, [1e9] * 99)
    assert search.complete and search.best == best and 140.0 < search.peak_per_s <= 150.0
    assert [each["shares"] for each in search.tried] == [name for name, _ in candidates(KNEES)]


def test_the_static_search_keeps_the_planned_shares_where_nothing_is_better() -> None:
    search = StaticSearch()
    searched(search, {}, [1e9] * 99)
    assert search.best == "knee shares as planned" and search.shares == KNEES and search.peak_per_s == 100.0


def test_a_static_search_that_was_cut_short_goes_on_where_it_was() -> None:
    first = StaticSearch()
    done = searched(first, {}, [1e9, 1e9, 2.0])
    assert not first.complete and len(done) == 3
    second = StaticSearch.from_json(json.loads(json.dumps(first.to_json())))
    assert second == first
    rest = searched(second, {}, [1e9] * 99)
    assert second.complete and not set(rest) & set(done)


def test_candidates_keep_within_the_gpu() -> None:
    for name, shares in candidates(KNEES):
        assert all(5.0 <= each.gpu_percent <= 100.0 for each in shares.values()), name


def test_a_trace_cell_replays_the_trace_elsewhere_for_each_model_and_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = np.cumsum(np.random.default_rng(1).exponential(1.0, 500))
    (tmp_path / "trace.csv").write_text("\n".join(["TIMESTAMP", *map(str, times)]))
    monkeypatch.setenv("DSTACK_TRACE", str(tmp_path / "trace.csv"))
    cell = Cell.parse("C-2:5:equal:trace")
    demands = [ModelDemand(model, 5.0, 100.0, 1.0, OnLate.SERVE) for model in cell.models]
    rng = np.random.default_rng(1)
    drawn = [arrivals_of(cell, r)(d, 100.0, 5.0, rng) for r in (0, 1) for d in demands]
    assert all(((t >= 0) & (t < 5.0)).all() and (np.diff(t) >= 0).all() for t in drawn)
    assert len({tuple(t[:20]) for t in drawn}) == 4
    again = arrivals_of(cell, 0)(demands[0], 100.0, 5.0, rng)
    assert again.tolist() == drawn[0].tolist()


def test_a_missing_trace_says_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_TRACE", str(tmp_path / "none.csv"))
    with pytest.raises(InputError, match="DSTACK_TRACE"):
        arrivals_of(Cell.parse("C-2:5:equal:trace"), 0)


def test_what_the_clients_saw() -> None:
    trace = LoadTrace(np.array([0.0, 0.1, 0.2, 0.3]), np.array([50.0, 50.0, 500.0, 500.0]))

    class Generator:
        def start(self, model: str, intervals_us: np.ndarray) -> Any:
            class Run:
                def wait(self, timeout_s: float) -> LoadTrace:
                    return trace

            return Run()

    recorder = Recorder(Generator())
    assert recorder.start("m", np.ones(4)).wait(1.0) is trace
    # Two of four were answered while requests came.
    assert served_share(trace.sent_s, trace.latency_ms, (0.0, 0.35)) == 0.5
    assert spans(recorder.traces, 0.12, 0.25) == {"m": [[-20.0, 30.0], [80.0, 580.0]]}


def result(policy: str, peak_per_s: float, cell: str = "C-4:5:equal:poisson", **more: Any) -> dict[str, Any]:
    figures = {
        "models": {"m": {"p50_ms": 1.0, "p99_ms": 2.0, "cdf_ms": [1.0] * len(CDF_PERCENTS)}},
        "stages_ms": {"m": {"wait_grant": 0.5, "run": 1.25, "respond": 0.75}},
        "gpu": {"sm_activity": 0.5, "power_w": 300.0}, "jain_fairness": 1.0, "energy_mj_per_inference": 9.0,
        "timeline": {"seconds": 0.1, "requests": {"m": [[0.0, 2.0], [-1.0, 5.0]]},
                     "batches": [["m", 0.0, 1.5, 50.0, 4]]},
    }  # fmt: skip
    letter = ALTERNATIVES[policy].letter if policy in ALTERNATIVES else "h*"
    return {
        "cell": cell, "policy": policy, "letter": letter, "variant_of": policy.split("+")[0],
        "slo_factor": float(cell.split(":")[1]), "slo_ms": {"m": 5.0}, "peak_per_s": peak_per_s,
        "repeats": [{"peak_per_s": peak_per_s}, {"peak_per_s": peak_per_s * 1.1}],
        "at_peak": {"rate_per_s": peak_per_s, "figures": figures} if peak_per_s else {},
        "goodput_curve": [{"offered_per_s": peak_per_s, "goodput_per_s": peak_per_s}],
        "ideal_corun_per_s": 1000.0, "predicted_peak_per_s": None, **more,
    }  # fmt: skip


def document(*results: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "make perf-h100-compare", "commit": "abc", "date": "2026-01-01",
        "versions": {"triton": "2.51"}, "gpu": {"name": "GPU", "driver": "1"}, "seconds": 3.0, "seed": 1,
        "solo_ms": {"m": 1.0},
        "runs": [{"date": "d", "commit": "abc", "arguments": ["--cells", "C-4:5"]}],
        "problems": ["a problem"], "static_searches": {}, "cells": list(results),
    }  # fmt: skip


def test_stage_times_of_a_trial_are_what_came_between_two_readings() -> None:
    before = {"a": {"run": (1.0, 100)}}
    after = {"a": {"run": (1.5, 200), "respond": (0.2, 100)}, "b": {"run": (0.0, 0)}}
    assert stage_means_ms(before, after) == {"a": {"run": 5.0, "respond": 2.0}}


def test_targets_are_judged_by_the_worst_cell_or_the_median() -> None:
    found = {
        target.text: target.met
        for target in summary.targets(
            document(
                result("dstack", 950.0, predicted_peak_per_s=1000.0), result("time-sliced", 400.0),
                result("mps-default", 700.0), result("mps-static", 960.0),
                result("dstack", 300.0, "C-4:3:equal:poisson"),
                result("time-sliced", 100.0, "C-4:3:equal:poisson"),
            )
        )
    }  # fmt: skip
    assert found["against time-sliced, C-4 and C-7 at 5x: >= 2"] is True
    assert found["against time-sliced, SLOs of 3x: >= 4"] is False
    assert found["against the best of (c), (d), (f), (g): never below 1.0"] is False  # 950 < 960
    assert found["against best static: >= 1.15"] is None  # not measured: neither met nor missed
    assert found["the simulator's peak is within 10% in the median"] is True


def test_the_report_is_written_from_whatever_is_there(tmp_path: Path) -> None:
    """A run that was cut short has no curves, no bounds, no peak of some: the report must stand all that."""
    full = document(
        result("dstack", 950.0, saturated={"jain_fairness": 0.97}, curve_done=True, plan_s=2.0),
        result("time-sliced", 400.0),
        result("temporal", 0.0, ideal_corun_per_s=None, goodput_curve=[], at_peak={}),
        result("dstack+levels=off", 800.0),
    )  # fmt: skip
    full["static_searches"] = {
        "C-4:5:equal:poisson": {"best": "no limits", "search_s": 50.0, "complete": False,
                                "tried": [{"shares": "no limits", "held_per_s": 0.0, "failed_at_per_s": 9.0}]}
    }  # fmt: skip
    text = write(full, tmp_path).read_text()
    for part in ("**950**", "| 2.38 |", "dstack+levels=off | 800 | 950 | 0.84", "cut short", "a problem",
                 "0.970", "10.0%", "| 0.5 /  / 1.2 / 0.8 |"):  # fmt: skip
        assert part in text, part
    for name in ("goodput", "latency", "timeline"):
        assert (tmp_path / f"{name}_C-4_5_equal_poisson.png").stat().st_size > 1000
    assert write(document(), tmp_path).exists()


def test_stalls_near_each_other_are_one_and_what_waited_is_left_out_too() -> None:
    found = stretches_of([(1.0, 1.006), (1.07, 1.08), (2.0, 2.004)])
    assert found == pytest.approx(np.array([[0.995, 1.175], [1.995, 2.023]]))
    assert stretches_of([]).shape == (0, 2)


def test_requests_of_stalls_are_left_out_good_and_bad_alike() -> None:
    """Ten requests of 10 ms, one each 0.1 s; the machine stalls where the 3rd and the 4th (late) are."""
    sent = 100.0 + 0.1 * np.arange(10)
    latency = np.full(10, 10.0)
    latency[3] = 90.0
    stalls = np.array([[100.205, 100.302], [100.29, 100.32]])
    assert outside(sent, sent + latency / 1e3, stalls).sum() == 8
    assert length_s(stalls) == pytest.approx(0.115)
    found = ModelResult(
        slo_ms=20.0, rate_per_s=10.0, requests=10, failed=0, unmeasured=0, latency_ms_p50=10.0,
        latency_ms_p95=10.0, latency_ms_p99=10.0, slo_attainment=0.9, goodput_per_s=9.0,
        send_lag_ms_p99=0.0, errors=(),
    )  # fmt: skip
    result = BenchResult(1.0, 0.0, 1, 0.99, {"a": found}, ("a",))
    traces = {"a": [LoadTrace(sent, latency)]}
    trial = trial_of(result, traces, (100.0, 101.0), {}, stalls)
    assert trial.attainment == 1.0 and trial.figures["models"]["a"]["attainment_of_all"] == 0.9
    assert trial.goodput_per_s == pytest.approx(8 / 0.885, rel=1e-3)
    assert trial.figures["left_out_share"] == pytest.approx(0.115)
    for nothing in (np.empty((0, 2)), np.array([[100.2, 100.8]])):  # most of the time: that is the load
        assert trial_of(result, traces, (100.0, 101.0), {}, nothing).attainment == 0.9


def test_a_load_that_one_error_ended_says_nothing_of_its_model() -> None:
    """perf_analyzer forgets all of a stretch in which a request failed: that is no attainment of 0."""
    found = ModelResult(
        slo_ms=20.0, rate_per_s=40.0, requests=105, failed=1, unmeasured=104, latency_ms_p50=None,
        latency_ms_p95=None, latency_ms_p99=None, slo_attainment=0.0, goodput_per_s=0.0,
        send_lag_ms_p99=None, errors=("region is gone",),
    )  # fmt: skip
    result = BenchResult(1.0, 0.0, 1, 0.99, {"a": found}, ("a",))
    with pytest.raises(LostLoadError, match="region is gone"):
        trial_of(result, {"a": [LoadTrace.cut("region is gone", request_failed=True)]}, (0.0, 1.0), {}, NONE)


def test_the_plan_follows_what_was_learned_and_so_does_the_time_to_find_it() -> None:
    """BERT twice as slow as profiled gets a larger share of a plan for the same rates."""
    planner = Planner(PROFILES, 1)
    try:
        cell = Cell.parse("C-4:5")
        solo = planner.expected_solo(cell, {})
        profile = read_profiles(PROFILES).models["bert_base"]
        surface = LatencySurface.from_profile(profile)
        runs = [Seen(45.0, rows, 100, 2e3 * float(surface.latency_ms(45.0, rows)), 5e3) for rows in (1, 2, 4)]
        correction = planner.learn("bert_base", None, runs)
        assert correction is not None and correction.scale == pytest.approx(2.0, abs=0.01)
        assert planner.learn("bert_base", correction, runs) is None  # nothing new
        quick = Alternative.parse("temporal")  # its plan is not rehearsed
        before = planner.own(cell, solo, quick)
        after = planner.own(cell, solo, quick, (("bert_base", correction),))
        assert after["bert_base"].gpu_percent > before["bert_base"].gpu_percent
    finally:
        planner.close()
    known = {"cells": [], "learned": {"c": {"seconds": 20.0, "corrections": {}}}}
    assert summary.time_to_find_s(known, {"c": {"dstack": {"plan_s": 1.5}}}, "c") == 21.5


def test_a_copy_suffers_as_its_model_was_seen_to_do() -> None:
    cell = Cell.parse("C-12:5")
    copy = next(model for model in cell.models if model != network_of(model))
    known = replace(read_profiles(PROFILES), slowdown={network_of(copy): 0.25})
    found = profiles_of(known, cell).slowdown
    assert found[copy] == 0.25 and set(map(network_of, found)) == {network_of(copy)}
