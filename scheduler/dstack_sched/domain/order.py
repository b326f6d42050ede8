"""The order that latencies must keep: no slower with more GPU%, no faster with a larger batch."""

from __future__ import annotations

from collections.abc import Sequence

from dstack_sched.domain.profile import ProfilePoint

# Medians of a quiet device repeat within a few percent; a latency that goes the wrong way by more than this
# is a broken measurement (a busy device, swapped columns), and planning on it would be planning on noise.
MONOTONE_TOLERANCE = 0.20


def non_monotone(
    points: Sequence[ProfilePoint], tolerance: float = MONOTONE_TOLERANCE
) -> list[tuple[ProfilePoint, ProfilePoint]]:
    """Pairs (slow, fast) where `slow` has at least the GPU% and at most the batch of `fast` and yet takes
    more than (1 + tolerance) of its time; the worst pair first."""
    pairs = [
        (slow, fast)
        for slow in points
        for fast in points
        if slow is not fast
        and slow.gpu_percent >= fast.gpu_percent
        and slow.batch_size <= fast.batch_size
        and slow.latency_ms_p50 > fast.latency_ms_p50 * (1 + tolerance)
    ]
    return sorted(pairs, key=lambda pair: pair[1].latency_ms_p50 / pair[0].latency_ms_p50)
