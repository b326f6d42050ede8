"""Triton's GPU N in a process that CUDA has numbered anew."""

from __future__ import annotations

import pytest

from dstack_backend.cuda_devices import GPUS_VARIABLE, ordinal_of
from dstack_backend.errors import DeviceError

TOLD = {GPUS_VARIABLE: "GPU-a,GPU-b,GPU-c"}


@pytest.mark.parametrize(
    ("present", "ordinals"),
    [
        (["GPU-a", "GPU-b", "GPU-c"], [0, 1, 2]),
        (["GPU-b", "GPU-c"], [None, 0, 1]),
        (["GPU-c"], [None, None, 0]),
    ],
)
def test_a_gpu_that_went_moves_those_behind_it_up(present: list[str], ordinals: list[int | None]) -> None:
    """Guards against a model that lands on another GPU than the arbiter counts it on."""
    for device_id, ordinal in enumerate(ordinals):
        if ordinal is not None:
            assert ordinal_of(device_id, TOLD, lambda: present) == ordinal
            continue
        with pytest.raises(DeviceError, match=rf"GPU {device_id} \(GPU-.\) is not there any more; place"):
            ordinal_of(device_id, TOLD, lambda: present)


@pytest.mark.parametrize("environ", [{}, {GPUS_VARIABLE: ""}, {GPUS_VARIABLE: "GPU-a"}])
def test_what_nobody_told_stays_as_it_is(environ: dict[str, str]) -> None:
    def asked() -> list[str]:
        raise AssertionError("CUDA is not started for nothing")

    assert ordinal_of(1, environ, asked) == 1


def test_where_cuda_cannot_tell_the_load_says_why() -> None:
    assert ordinal_of(1, TOLD, list) == 1
