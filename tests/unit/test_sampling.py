"""Where to measure next: on surfaces whose truth is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.sampling import (
    corun_design,
    most_unsure_place,
    next_decisive,
    prediction_spread,
    promises,
    start_design,
    surface_error,
)

PERCENTS = (10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 100.0)
BATCHES = (1, 2, 4, 8, 16, 32)


def point(p: float, b: int, ms: float) -> ProfilePoint:
    return ProfilePoint(p, b, ms, ms, 10)


def smooth(p: float, b: int) -> float:
    return 0.5 + 0.02 * b + (8 + 5 * b) / p


def stepped(p: float, b: int) -> float:
    """Another algorithm from batch 8 on: no posynomial fits this."""
    return smooth(p, b) * (1.0 if b < 8 else 1.8)


def measured(surface, places) -> list[ProfilePoint]:
    return [point(p, b, surface(p, b)) for p, b in places]


def test_the_start_design_spans_the_candidates_once() -> None:
    places = start_design(PERCENTS, BATCHES)
    assert set(product((10.0, 100.0), (1, 32))) <= set(places)
    assert len(places) == len(set(places)) == 6
    assert places[0] == (100.0, 1), "the cheapest first"
    assert all(p in PERCENTS and b in BATCHES for p, b in places)


@pytest.mark.parametrize(
    ("percents", "batches"), [((100.0,), (1,)), ((50.0, 100.0), (1,)), ((100.0,), (1, 2, 4))]
)
def test_the_start_design_of_few_candidates(percents, batches) -> None:
    places = start_design(percents, batches)
    assert set(places) <= set(product(percents, batches))
    assert len(places) == len(set(places))
    assert len(places) >= min(2, len(percents) * len(batches))


def test_the_error_of_an_exact_surface_is_small_and_unknown_without_inner_points() -> None:
    assert surface_error(measured(smooth, product((10.0, 100.0), (1, 32)))) == float("inf")
    assert surface_error(measured(smooth, start_design(PERCENTS, BATCHES))) < 0.01


def test_the_error_sees_what_a_fit_with_all_points_hides() -> None:
    """Left out, the point is mispredicted; fitted along, it is bent towards."""
    points = measured(smooth, start_design(PERCENTS, BATCHES))
    middle = next(
        i for i, p in enumerate(points) if p.gpu_percent not in (10.0, 100.0) and p.batch_size not in (1, 32)
    )
    bent = point(points[middle].gpu_percent, points[middle].batch_size, points[middle].latency_ms_p50 * 1.3)
    points[middle] = bent
    assert surface_error(points) > 0.2


def test_corners_are_not_left_out() -> None:
    """A corner cannot be known from the others: its prediction would be extrapolation."""
    cliff = [
        point(p, b, smooth(p, b) * (1.2 if (p, b) == (10.0, 32) else 1.0))
        for p, b in product(PERCENTS, BATCHES)
    ]
    without_corner_error = surface_error(cliff)
    assert without_corner_error < 0.2


def test_the_most_doubtful_place_is_where_the_predictors_disagree() -> None:
    places = list(product(PERCENTS, BATCHES))
    points = measured(stepped, start_design(PERCENTS, BATCHES))
    open_places = [place for place in places if place not in {(p.gpu_percent, p.batch_size) for p in points}]
    spread = prediction_spread(points, open_places, (), 132)
    assert spread.shape == (len(open_places),)
    assert (spread >= 0).all()
    assert most_unsure_place(points, places, (), 132) == open_places[int(spread.argmax())]


def best_place(surface, places, limit_ms: float = float("inf"), largest: int = 32) -> tuple[float, int]:
    within = [(p, b) for p, b in places if surface(p, b) <= limit_ms and b <= largest]
    return max(within, key=lambda x: x[1] / (x[0] * surface(*x) ** 2))


def test_what_a_plan_would_choose_promises_most_for_every_limit_and_rate() -> None:
    places = list(product(PERCENTS, BATCHES))
    promise = dict(zip(places, promises(measured(stepped, places), places), strict=True))
    fastest = min(stepped(*place) for place in places)
    for limit, largest in product((1.25, 2.0, 8.0, float("inf")), BATCHES):
        assert promise[best_place(stepped, places, limit * fastest, largest)] == pytest.approx(1.0)
    assert promise[10.0, 32] < 0.5


def test_a_place_that_just_misses_a_limit_is_not_forgotten() -> None:
    """Which side of an SLO a latency falls on is chance, within what two measurements differ by."""
    places = [(50.0, 1), (60.0, 1), (100.0, 1)]
    promise = promises([point(50, 1, 1.26), point(60, 1, 1.24), point(100, 1, 1.0)], places)
    assert promise[0] > 1.0, "more efficient than (60, 1), and 1% above 1.25 x the fastest"


def test_what_may_be_best_is_measured_and_then_measured_again_in_turns() -> None:
    """The best of many noisy measurements owes some of its lead to chance: once is not enough."""
    places = list(product(PERCENTS, BATCHES))
    points = dict.fromkeys(start_design(PERCENTS, BATCHES), 1)
    best, order = best_place(smooth, places), []
    while (place := next_decisive(measured(smooth, points), places, points, 0.0, 3)) is not None:
        points[place] = points.get(place, 0) + 1
        order.append(place)
    assert points[best] == 3
    assert max(points.values()) == 3
    assert points.get((10.0, 32)) == 1, "nobody would run there"
    again = [i for i, place in enumerate(order) if place == best]
    assert again[-1] - again[-2] > 1, "rivals in between: a device drifts"


def test_the_less_is_known_the_more_places_may_be_best() -> None:
    places = list(product(PERCENTS, BATCHES))

    def decisive(error: float) -> int:
        points = dict.fromkeys(start_design(PERCENTS, BATCHES), 1)
        while (place := next_decisive(measured(smooth, points), places, points, error, 1)) is not None:
            points[place] = 1
        return len(points)

    assert decisive(0.0) < decisive(0.5) < len(places)


def test_nothing_is_left_when_all_is_measured() -> None:
    places = list(product((50.0, 100.0), (1, 2)))
    assert most_unsure_place(measured(smooth, places), places, (), 132) is None
    assert next_decisive(measured(smooth, places), places, dict.fromkeys(places, 5), 1.0, 5) is None


@pytest.mark.parametrize("surface", [smooth, stepped])
def test_following_the_choices_finds_the_surface(surface) -> None:
    """The loop of the profiler, without a profiler: few points on an easy surface, more on a hard one."""
    percents, batches = PERCENTS[::2], BATCHES[::2] if surface is smooth else (1, 4, 8, 32)
    places = list(product(percents, batches))
    points = measured(surface, start_design(percents, batches))
    while surface_error(points) > 0.05:
        times = {(p.gpu_percent, p.batch_size): 1 for p in points}
        chosen = next_decisive(points, places, times, surface_error(points), 1)
        chosen = chosen or most_unsure_place(points, places, (), 132)
        if chosen is None:
            break
        points += measured(surface, [chosen])
    assert len(points) <= (8 if surface is smooth else len(places))
    found = LatencySurface("m", points)
    p, b = np.array(places).T
    truth = np.array([surface(*place) for place in places])
    error = np.abs(found.latency_ms(p, b) / truth - 1)
    assert error.mean() < 0.05
    best = max(places, key=lambda x: x[1] / (x[0] * surface(*x) ** 2))
    values = b / (p * found.latency_ms(p, b) ** 2)
    chosen_best = places[int(np.argmax(values))]
    ratio = (chosen_best[1] / (chosen_best[0] * surface(*chosen_best) ** 2)) / (
        best[1] / (best[0] * surface(*best) ** 2)
    )
    assert ratio >= 0.97


def test_the_corun_design_has_each_model_beside_others_at_several_promises() -> None:
    design = corun_design(["a", "b", "c", "d", "e", "f", "g", "h"])
    for name in "abcdefgh":
        promises = {
            sum(p for n, p in entry if n != name) for entry in design if name in {n for n, _ in entry}
        }
        assert len(promises) >= 3
    mixes: dict[tuple[str, ...], set[float]] = {}
    for entry in design:
        mixes.setdefault(tuple(n for n, _ in entry), set()).add(sum(p for _, p in entry))
    assert all(len(promises) >= 2 for promises in mixes.values()), "the capacity needs two promises a mix"
    assert len(design) == len(set(design))


def test_the_corun_design_of_few_models() -> None:
    assert corun_design([]) == []
    assert corun_design(["a"], (50.0, 100.0)) == [(("a", 50.0), ("a", 50.0)), (("a", 100.0), ("a", 100.0))]
    assert all({n for n, _ in entry} == {"a", "b"} for entry in corun_design(["a", "b"], (50.0, 100.0)))
