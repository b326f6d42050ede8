"""The latency surface: fit, monotone grid, p50 and p99, and what it says it cannot know."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from dstack_sched.domain.profile import LatencyFit, ModelProfile, ProfilePoint
from dstack_sched.errors import InputError
from dstack_sched.policy.latency import LatencySurface, Posynomial, fit_posynomial, fit_profile
from dstack_sched.policy.monotone import isotonic_repair
from fakes.surfaces import h100_raw, h100_surfaces, points, random_shape, random_surface

PERCENTS, BATCHES = (10, 20, 40, 70, 100), (1, 4, 16)


def test_fit_recovers_the_coefficients_that_made_the_points():
    a = (0.8, 0.05, 17.0, 10.0)
    surface = LatencySurface("m", points(Posynomial(a), PERCENTS, BATCHES))
    np.testing.assert_allclose(surface.a, a, rtol=1e-6)
    assert surface.kind == "posynomial"
    assert surface.max_relative_error < 1e-9


def test_fit_is_the_non_negative_least_squares_of_relative_errors():
    """Against another solver, on noisy points: guards the scaling of columns and rows."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        found = points(random_shape(rng), PERCENTS, BATCHES, rng, noise=0.1)
        p, b, y = (np.array([getattr(x, k) for x in found], float) for k in
                   ("gpu_percent", "batch_size", "latency_ms_p50"))  # fmt: skip
        columns = np.stack([np.ones_like(p), b, 1 / p, b / p], axis=1) / y[:, None]
        scale = np.linalg.norm(columns, axis=0)
        expected = lsq_linear(columns / scale, np.ones_like(y), bounds=(0, np.inf), method="bvls").x / scale
        a = np.array(fit_posynomial(p, b, y).a)
        residual = np.linalg.norm(columns @ a - 1)
        assert residual <= np.linalg.norm(columns @ expected - 1) * (1 + 1e-9)
        assert (a >= 0).all()


def test_resnet50_on_an_h100_fits_within_3_percent():
    surface = h100_surfaces()["resnet50"]
    assert surface.kind == "posynomial"
    assert surface.max_relative_error < 0.03
    fit = fit_profile([ProfilePoint(**x) for x in h100_raw()["models"]["resnet50"]["points"]])
    assert fit.max_relative_error == pytest.approx(surface.fit_error)
    assert (fit.a0, fit.a1, fit.a2, fit.a3) == surface.a


def test_every_h100_model_fits_within_its_stated_error_and_errors_are_per_point():
    for surface in h100_surfaces().values():
        worst = max(abs(error.p50) for error in surface.errors)
        assert worst == surface.max_relative_error <= 0.06
        for error in surface.errors:
            here = float(surface.latency_ms(error.gpu_percent, error.batch_size))
            assert np.isfinite(error.p99) and here > 0


def test_a_bad_fit_falls_back_to_the_measured_grid_and_meets_its_points():
    """A step in b is nothing the formula can follow; planning must then use what was measured."""
    steps = [
        ProfilePoint(p, b, (1.0 if b < 4 else 9.0) * 100 / p, 12.0 * 100 / p, 9)
        for p in (25.0, 50.0, 100.0)
        for b in (1, 2, 3, 4, 8)
    ]
    surface = LatencySurface("m", steps)
    assert surface.kind == "grid" and surface.fit_error > 0.10
    assert surface.max_relative_error < 1e-9 and surface.repaired == 0.0
    for x in steps:
        np.testing.assert_allclose(surface.latency_ms(x.gpu_percent, x.batch_size), x.latency_ms_p50)


@pytest.mark.parametrize("seed", range(60))
def test_surfaces_are_monotone_everywhere(seed):
    """Faster with more GPU%, not faster with more rows, inside and outside of the measured range, also on
    irregular grids and with noise."""
    rng = np.random.default_rng(seed)
    found = list(points(random_shape(rng), PERCENTS, BATCHES, rng, noise=float(rng.uniform(0, 0.5))))
    rng.shuffle(found)
    surface = LatencySurface("m", found[: rng.integers(3, len(found) + 1)])
    p, b = np.geomspace(2, 100, 60), np.linspace(1, 64, 50)
    for values in (surface.latency_ms(p[:, None], b[None, :]), surface.p99_ms(p[:, None], b[None, :])):
        assert np.isfinite(values).all() and (values > 0).all()
        assert (np.diff(values, axis=0) <= 1e-9 * values[1:]).all()
        assert (np.diff(values, axis=1) >= -1e-9 * values[:, 1:]).all()
    assert (surface.p99_ms(p[:, None], b) >= surface.latency_ms(p[:, None], b)).all()


def _pool_adjacent(values: np.ndarray) -> np.ndarray:
    """Isotonic regression on a line, ascending, by pooling adjacent violators."""
    blocks = [[value, 1] for value in values]
    i = 0
    while i < len(blocks) - 1:
        if blocks[i][0] > blocks[i + 1][0] + 1e-15:
            (a, m), (b, n) = blocks[i], blocks.pop(i + 1)
            blocks[i] = [(a * m + b * n) / (m + n), m + n]
            i = max(0, i - 1)
        else:
            i += 1
    return np.concatenate([[value] * count for value, count in blocks])


def test_repair_on_a_line_is_isotonic_regression_in_log_space():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        b = np.arange(1.0, 9.0)
        measured = np.exp(rng.normal(0, 1, 8))
        repaired = isotonic_repair(np.full(8, 50.0), b, measured)
        np.testing.assert_allclose(np.log(repaired), _pool_adjacent(np.log(measured)), atol=1e-7)


def test_repair_reports_how_far_it_moved_a_point():
    """The kind of noise that a busy device gives: 50% slower than 25% for one point."""
    odd = [
        ProfilePoint(25, 1, 4.0, 4.2, 9),
        ProfilePoint(50, 1, 6.25, 6.4, 9),
        ProfilePoint(100, 1, 1.0, 1.1, 9),
    ]
    surface = LatencySurface("m", odd)
    assert surface.kind == "grid"
    np.testing.assert_allclose(surface.latency_ms([25, 50], 1), [5.0, 5.0])
    assert surface.repaired == pytest.approx(0.25)


def test_one_batch_size_only_says_so_and_stays_on_the_safe_side():
    surface = h100_surfaces()["vgg19"]
    assert surface.unknown and "batch size 16 only" in surface.unknown[0]
    assert float(surface.latency_ms(50, 1)) == pytest.approx(float(surface.latency_ms(50, 16)))
    assert float(surface.latency_ms(50, 32)) == pytest.approx(2 * float(surface.latency_ms(50, 16)))


def test_one_gpu_percent_only_says_so():
    surface = LatencySurface("m", [ProfilePoint(100, b, 1.0 + b, 1.1 + b, 9) for b in (1, 2, 4)])
    assert "100% only" in surface.unknown[0]
    assert surface.min_percent == 100


def test_two_by_three_points_of_a_cpu_host_are_enough():
    found = points(Posynomial((0.2, 0.1, 30.0, 90.0)), (50, 100), (1, 4, 8))
    surface = LatencySurface("m", found)
    assert surface.kind == "posynomial" and not surface.unknown


def test_p99_is_a_surface_of_its_own_and_never_below_the_median():
    found = points(Posynomial((0.2, 0.1, 30.0, 90.0)), PERCENTS, BATCHES, tail=1.3)
    surface = LatencySurface("m", found)
    np.testing.assert_allclose(surface.p99_ms(30, 3), 1.3 * surface.latency_ms(30, 3), rtol=1e-6)


def test_a_stated_fit_is_used_where_it_meets_the_points_and_not_where_it_misses_them():
    found = points(Posynomial((0.2, 0.1, 30.0, 90.0)), PERCENTS, BATCHES)
    close = LatencyFit(0.2, 0.1, 30.0, 91.0, 0.01)
    assert LatencySurface("m", found, close).a == (0.2, 0.1, 30.0, 91.0)
    far = LatencySurface("m", found, LatencyFit(9.0, 0.1, 30.0, 90.0, 0.01))
    assert far.kind == "grid" and far.max_relative_error < 1e-9
    stated = LatencySurface("m", found, LatencyFit(0.2, 0.1, 30.0, 90.0, 0.2))
    assert stated.kind == "grid"  # DESIGN: a stated error above 10% means the measured grid


def test_table_is_the_surface_in_rows_of_gpu_percent():
    surface = random_surface(np.random.default_rng(3))
    table = surface.table((20.0, 50.0), (1, 2, 4))
    assert table[1][2] == float(surface.latency_ms(50.0, 4))
    assert len(table) == 2 and len(table[0]) == 3


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, float("inf")])
def test_points_that_are_not_latencies_are_refused(bad):
    with pytest.raises(InputError, match="finite and positive"):
        LatencySurface("m", [ProfilePoint(50, 1, bad, 1.0, 9)])


def test_no_points_and_repeated_points_are_refused():
    with pytest.raises(InputError, match="no points"):
        LatencySurface.from_profile(ModelProfile("m", "0" * 64, 1, ()))
    twice = ProfilePoint(50, 1, 1.0, 1.1, 9)
    with pytest.raises(InputError, match="two points"):
        LatencySurface("m", [twice, twice])


def test_unmeasured_cells_follow_what_the_points_around_them_are_off_the_formula():
    """Twice as slow from batch 8 on: a cell between two such points is too, whatever the formula says."""
    a = (0.5, 0.02, 8.0, 5.0)

    def truth(p, b):
        return float(Posynomial(a)(p, b)) * (2.0 if b >= 8 else 1.0)

    percents = (10.0, 40.0, 100.0)
    known = [
        ProfilePoint(p, b, truth(p, b), truth(p, b), 9)
        for p in percents
        for b in (1, 4, 8, 16)
        if (p, b) not in {(40.0, 8), (40.0, 4)}
    ]
    surface = LatencySurface("m", known)
    assert surface.kind == "grid"
    for batch in (4, 8):
        assert float(surface.latency_ms(40.0, batch)) == pytest.approx(truth(40.0, batch), rel=0.12)


def test_a_fit_that_misses_by_more_than_5_percent_is_not_trusted():
    """Efficacy squares the error: on an H100 a fit within 9% chose 9% below the best (decision 0020)."""
    surface = LatencySurface("m", points(Posynomial((0.8, 0.05, 17.0, 10.0)), PERCENTS, BATCHES))
    bent = [
        ProfilePoint(e.gpu_percent, e.batch_size, ms := float(surface.latency_ms(e.gpu_percent, e.batch_size))
                     * (1.14 if (e.gpu_percent, e.batch_size) == (40.0, 4) else 1.0), ms, 9)
        for e in surface.errors
    ]  # fmt: skip
    found = LatencySurface("m", bent)
    assert 0.05 < found.fit_error < 0.15
    assert found.kind == "grid"
    assert found.max_relative_error < 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_filled_cells_of_a_grid_are_monotone_too(seed):
    """Most of a wide grid is missing, the rest noisy: what fills the holes must not break the order."""
    rng = np.random.default_rng(seed)
    found = list(points(random_shape(rng), range(10, 101, 10), (1, 2, 4, 8, 16, 32), rng, noise=0.4))
    rng.shuffle(found)
    surface = LatencySurface("m", found[:24])
    assert surface.kind == "grid"
    table = np.array(surface.table(surface.percents, surface.batches))
    assert (np.diff(table, axis=0) <= 1e-9).all() and (np.diff(table, axis=1) >= -1e-9).all()
