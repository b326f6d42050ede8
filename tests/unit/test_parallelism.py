"""The parallelism model against its formula in plain NumPy, and its fit against known constants."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dstack_sched.domain.kernels import HOST_COPY, KernelWork
from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.errors import InputError
from dstack_sched.policy.knee import knee_of_curve
from dstack_sched.policy.parallelism import (
    ELEMENTS_PER_BLOCK,
    SPLIT_DEPTH,
    START,
    ParallelismModel,
    fit_parallelism,
    held_out_errors,
)

CONV = KernelWork("Conv", 0, 196, 256, 2304, 1, 0, 2.4e6, 4e5)
POOL = KernelWork("MaxPool", 0, 200704, 1, 0, 1, 0, 0, 1.6e6)
DEPTHWISE = KernelWork("Conv", 0, 3136, 1, 9, 96, 0, 4e3, 2.4e6)
ATTENTION = KernelWork("MatMul", 128, 0, 128, 64, 0, 12, 0, 1e6)
COPIES = KernelWork(HOST_COPY, 0, 0, 1, 0, 1, 0, 0, 6e5)
KERNELS = (CONV, POOL, DEPTHWISE, ATTENTION, COPIES)
CONSTANTS = (1.5, 40.0, 25.0, 0.4, 0.006, 0.03, 90.0)


def by_hand(kernels, sms: int, tile: int, constants, p: float, b: int) -> float:
    """The formula of the module, one kernel at a time."""
    per_product, per_element, gb_sm, gb_device, launch, call, gb_host = constants
    share = max(1, round(sms * p / 100))
    total = call
    for k in kernels:
        if k.op == HOST_COPY:
            total += (k.bytes_fixed + k.bytes_per_row * b) / 1e9 * gb_host
            continue
        rows, groups = k.rows_fixed + k.rows_per_row * b, k.groups_fixed + k.groups_per_row * b
        if k.depth >= 16 and k.columns > 1:
            splits = max(1, round(k.depth / SPLIT_DEPTH))
            blocks = math.ceil(rows / tile) * math.ceil(k.columns / tile) * groups * splits
            compute = math.ceil(blocks / share) * tile * tile * k.depth / splits / 1e9 * per_product
        else:
            work = max(k.depth, 1)
            blocks = rows * k.columns * groups * work / (ELEMENTS_PER_BLOCK * work)
            compute = math.ceil(blocks / share) * ELEMENTS_PER_BLOCK * work / 1e9 * per_element
        gigabytes = (k.bytes_fixed + k.bytes_per_row * b) / 1e9
        memory = gigabytes * max(gb_sm / share, gb_device)
        total += max(compute, memory) + launch
    return total


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("p", "b"), [(10, 1), (25, 3), (50, 8), (100, 32)])
def test_latency_is_the_formula(tile: int, p: float, b: int) -> None:
    model = ParallelismModel(KERNELS, 132, tile, CONSTANTS, 0.0)
    assert float(model.latency_ms(p, b)) == pytest.approx(
        by_hand(KERNELS, 132, tile, CONSTANTS, p, b), rel=1e-12
    )


def test_what_the_host_copies_is_not_sped_up_by_more_sms() -> None:
    """A large batch of a small network on a whole GPU waits for its inputs (AlexNet at batch 32, H100)."""
    model = ParallelismModel((CONV, COPIES), 132, 64, CONSTANTS, 0.0)
    without = ParallelismModel((CONV,), 132, 64, CONSTANTS, 0.0)
    for p in (10.0, 100.0):
        assert float(model.latency_ms(p, 32) - without.latency_ms(p, 32)) == pytest.approx(
            32 * 6e5 / 1e9 * 90.0
        )


def test_latency_broadcasts() -> None:
    model = ParallelismModel(KERNELS, 132, 128, CONSTANTS, 0.0)
    table = model.latency_ms(np.array([[10.0], [50.0]]), np.array([1, 4, 16]))
    assert table.shape == (2, 3)
    assert table[1, 2] == model.latency_ms(50, 16)
    assert (np.diff(table, axis=1) >= 0).all(), "a larger batch is never faster"
    assert (np.diff(table, axis=0) <= 0).all(), "more SMs are never slower"


def points_of(model: ParallelismModel, places) -> list[ProfilePoint]:
    return [ProfilePoint(p, b, ms := float(model.latency_ms(p, b)), ms, 10) for p, b in places]


def test_a_handful_of_points_finds_a_model_that_predicts_the_others() -> None:
    truth = ParallelismModel(KERNELS * 12, 132, 128, tuple(START * [0.7, 1.5, 1.2, 0.8, 1.3, 2.0, 0.6]), 0.0)
    known = points_of(truth, [(10, 1), (10, 16), (40, 4), (100, 1), (100, 16)])
    found = fit_parallelism(truth.kernels, 132, known)
    assert found.max_relative_error < 0.03
    others = points_of(truth, [(20, 2), (30, 16), (60, 8), (80, 1), (80, 16)])
    errors = [float(found.latency_ms(p.gpu_percent, p.batch_size)) / p.latency_ms_p50 - 1 for p in others]
    assert max(map(abs, errors)) < 0.10


def test_the_knee_lies_where_a_small_batch_no_longer_fills_the_sms() -> None:
    """16 blocks on 132 SMs: beyond 16 of 132 (12.1%) more SMs are of no use."""
    few = KernelWork("Conv", 512, 0, 512, 256, 1, 0, 0, 0)
    model = ParallelismModel((few,), 132, 128, (100.0, 1.0, 1e-6, 1e-6, 1e-6, 1e-6, 1.0), 0.0)
    knee = knee_of_curve(lambda p: model.latency_ms(p, 1), lowest_percent=1.0)
    assert 11 <= knee <= 13


def test_held_out_errors_are_those_of_models_that_did_not_see_the_point() -> None:
    truth = ParallelismModel(KERNELS, 132, 64, CONSTANTS, 0.0)
    points = points_of(truth, [(10, 1), (10, 16), (40, 4), (100, 1), (100, 16)])
    points[2] = ProfilePoint(40, 4, points[2].latency_ms_p50 * 3, points[2].latency_ms_p50 * 3, 10)
    errors = held_out_errors(KERNELS, 132, points)
    assert len(errors) == 5
    assert errors[2] < -0.5, "the outlier is not learned from itself"


def test_too_little_to_fit_is_said() -> None:
    truth = ParallelismModel(KERNELS, 132, 64, CONSTANTS, 0.0)
    with pytest.raises(InputError, match="3 measured points, there are 2"):
        fit_parallelism(KERNELS, 132, points_of(truth, [(10, 1), (100, 1)]))
    with pytest.raises(InputError, match="needs a graph"):
        fit_parallelism((), 132, points_of(truth, [(10, 1), (100, 1), (50, 1)]))
