"""The order that latencies must keep: no slower with more GPU%, no faster with a larger batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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


def ordered_by_trust(
    points: Sequence[ProfilePoint], times: Mapping[tuple[float, int], int]
) -> tuple[ProfilePoint, ...]:
    """The points, those measured less often brought into the order that those measured more often keep.

    times: how often each (GPU%, batch size) was measured. A single measurement that comes out slower than
    a smaller share, measured five times, takes its latency; otherwise a repair of the order would take half
    of the contradiction out of what is known well. Points measured equally often are left as they are.
    """
    kept: list[ProfilePoint] = []
    for point in sorted(points, key=lambda p: -times[p.gpu_percent, p.batch_size]):
        n = times[point.gpu_percent, point.batch_size]
        surer = [other for other in kept if times[other.gpu_percent, other.batch_size] > n]
        slower = [p.latency_ms_p50 for p in surer if _no_faster(p, point)]
        faster = [p.latency_ms_p50 for p in surer if _no_faster(point, p)]
        ms = max([min([point.latency_ms_p50, *slower]), *faster])
        scale = ms / point.latency_ms_p50
        kept.append(
            replace(point, latency_ms_p50=ms, latency_ms_p99=point.latency_ms_p99 * scale)
            if scale != 1.0
            else point
        )
    place = {(p.gpu_percent, p.batch_size): p for p in kept}
    return tuple(place[p.gpu_percent, p.batch_size] for p in points)


def _no_faster(one: ProfilePoint, other: ProfilePoint) -> bool:
    """Whether `one` has at most the GPU% and at least the batch of `other`."""
    return one.gpu_percent <= other.gpu_percent and one.batch_size >= other.batch_size
