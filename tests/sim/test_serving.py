"""What serving costs beside the run, and time slices without MPS."""

from __future__ import annotations

import numpy as np
import pytest

from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.policy.interference import NO_INTERFERENCE
from dstack_sched.sim.gpu import Gpu, SpeedModel
from dstack_sched.sim.scenario import Serving
from dstack_sched.sim.study import make_case, result_of


class Flat:
    """A surface of 10 ms whatever the share and the batch."""

    max_batch, min_percent = 8, 1.0

    def latency_ms(self, p: object, b: object) -> object:
        return np.full(np.shape(b), 10.0)

    p99_ms = latency_ms


@pytest.mark.parametrize(("sliced", "ends_us"), [(True, 10_000.0 * (1 + 0.97**2)), (False, 10_000.0)])
def test_without_mps_two_batches_take_turns_on_the_device(sliced: bool, ends_us: float) -> None:
    gpu = Gpu(SpeedModel({"m": Flat()}, NO_INTERFERENCE, sliced=sliced), np.random.default_rng(1))  # type: ignore[dict-item]
    for owner in (0, 1):
        gpu.launch(gpu.make(owner, "m", 50.0, 1), 0)
    assert gpu.next_end_us == pytest.approx(ends_us)


def test_a_batch_that_was_never_launched_can_be_taken_off() -> None:
    """A process that dies while it prepares a batch."""
    gpu = Gpu(SpeedModel({"m": Flat()}, NO_INTERFERENCE), np.random.default_rng(1))  # type: ignore[dict-item]
    gpu.launch(gpu.make(0, "m", 50.0, 1), 0)
    gpu.finish(gpu.make(1, "m", 50.0, 1), 5)
    assert gpu.promised == 50.0 and len(gpu.jobs) == 1


def test_the_rows_of_a_batch_are_answered_one_after_the_other() -> None:
    points = tuple(ProfilePoint(p, b, 10.0, 10.0, 50) for p in (50.0, 100.0) for b in (1, 8))
    device = Device("g", 100, 1 << 30, "d", "r")
    profiles = ProfileSet(device, {"m": ModelProfile("m", "", 1, points)})
    workload = Workload((ModelDemand("m", 100.0, 300.0),))

    def latencies_ms(answer_us: int) -> tuple[float, float]:
        case = make_case(profiles, workload, serving=Serving(answer_us=answer_us))
        found = result_of(case, "mps-static", 2.0, 1).models["m"]
        assert found.mean_batch_size > 2.5
        return found.latency_ms_p50, found.latency_ms_p99

    (at_once, at_once_p99), (one_by_one, one_by_one_p99) = latencies_ms(0), latencies_ms(1000)
    assert one_by_one - at_once > 1.5  # of three rows or so, the one in the middle
    assert 3.0 < one_by_one_p99 - at_once_p99 < 8.0
