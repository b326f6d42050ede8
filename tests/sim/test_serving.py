"""What serving costs beside the run, and time slices without MPS."""

from __future__ import annotations

import numpy as np
import pytest

from dstack_sched.policy.interference import NO_INTERFERENCE
from dstack_sched.sim.gpu import Gpu, SpeedModel


class Flat:
    """A surface of 10 ms whatever the share and the batch."""

    max_batch, min_percent = 8, 1.0

    def latency_ms(self, p: object, b: object) -> object:
        return np.full(np.shape(b), 10.0)

    p99_ms = latency_ms


@pytest.mark.parametrize(("sliced", "ends_us"), [(True, 20_000.0), (False, 10_000.0)])
def test_without_mps_two_batches_take_twice_as_long(sliced: bool, ends_us: float) -> None:
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
