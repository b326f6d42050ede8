"""perf/compare/peak.py and cells.py: the search for the peak, and what a cell is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))

from compare.cells import CELLS, MIXES, Cell, file_of
from compare.peak import PeakSearch, Trial, find_peak
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError


def step(limit_per_s: float, calls: list[float]):
    """A system that keeps its attainment up to a limit."""

    def run(rate_per_s: float) -> Trial:
        calls.append(rate_per_s)
        return Trial(rate_per_s, 1.0 if rate_per_s <= limit_per_s else 0.5, min(rate_per_s, limit_per_s))

    return run


@pytest.mark.parametrize("guess_per_s", [20.0, 700.0, 1000.0, 5000.0])
def test_the_peak_is_found_from_any_guess_within_the_tolerance(guess_per_s: float) -> None:
    calls: list[float] = []
    found = find_peak(step(1000.0, calls), guess_per_s, wanted=0.99, tolerance=0.05, max_trials=40)
    assert 1000.0 / 1.06 <= found.peak_per_s <= 1000.0 < found.failed_at_per_s
    assert len(calls) == len(found.trials)


def test_nothing_holds_gives_no_peak() -> None:
    found = find_peak(step(1.0, []), 100.0, wanted=0.99, max_trials=40)
    assert found.peak_per_s == 0.0


def test_the_search_ends_with_what_it_knows_when_time_is_up() -> None:
    left = iter([100.0, 100.0, 3.0])
    found = find_peak(step(1e9, []), 10.0, wanted=0.99, left_s=lambda: next(left), trial_s=5.0)
    assert len(found.trials) == 2 and found.peak_per_s == pytest.approx(12.5)


def test_a_rate_above_one_that_failed_does_not_count() -> None:
    search = PeakSearch()
    search.add(Trial(100.0, 1.0, 100.0), 0.99)
    search.add(Trial(80.0, 0.9, 75.0), 0.99)  # 100 held by chance
    assert search.peak_per_s == 0.0 and search.failed_at_per_s == 80.0
    search.add(Trial(70.0, 1.0, 70.0), 0.99)
    search.add(Trial(90.0, 1.0, 90.0), 0.99)
    assert search.peak_per_s == 70.0


def test_a_cell_reads_its_key_back() -> None:
    for cell in CELLS:
        assert Cell.parse(cell.key) == cell
        assert sum(cell.shares_of_rate().values()) == pytest.approx(1.0)
    assert len({cell.key for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize(
    ("text", "part"),
    [("C-5", "no mix"), ("C-4:x", "no number"), ("C-4:0", "SLO_FACTOR"), ("C-4:5:odd", "SLO_FACTOR"),
     ("C-4:5:equal:odd", "SLO_FACTOR"), ("C-4:5:equal:poisson:1", "SLO_FACTOR")],
)  # fmt: skip
def test_a_bad_cell_is_named(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        Cell.parse(text)


def test_skewed_rates_fall_from_the_first_model_to_the_last_threefold() -> None:
    shares = Cell("C-4", 5.0, "skewed").shares_of_rate()
    values = list(shares.values())
    assert values == sorted(values, reverse=True) and values[0] / values[-1] == pytest.approx(3.0)


def test_the_workload_of_a_cell() -> None:
    cell = Cell("C-12", 3.0)
    solo_ms = dict.fromkeys(cell.models, 2.0)
    workload = cell.workload(solo_ms, 1200.0, OnLate.SERVE)
    assert [demand.name for demand in workload.models] == list(MIXES["C-12"])
    assert {demand.slo_ms for demand in workload.models} == {6.0}
    assert sum(demand.rate_per_s for demand in workload.models) == pytest.approx(1200.0)
    assert file_of("resnet50#2") == file_of("resnet50") == "resnet50_u8"
