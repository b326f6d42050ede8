"""Models side by side: what is measured for the interference model and the capacity, each setting once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from dstack_sched.domain.profile import CorunPoint, Device, ModelProfile
from dstack_sched.policy.runnable import CPU_DRIVER
from dstack_sched.policy.sampling import CORUN_PERCENTS
from dstack_sched.ports import ProfileStore

CorunRunner = Callable[[tuple[tuple[str, float, int], ...]], CorunPoint]


def corun_percents(device: Device) -> tuple[float, ...]:
    """GPU% of each model when measured side by side; on a CPU host those that are whole cores."""
    if device.driver != CPU_DRIVER:
        return CORUN_PERCENTS
    return tuple(p for p in CORUN_PERCENTS if p * device.sms % 100 == 0)


def measure_coruns(
    design: Iterable[tuple[tuple[str, float], ...]],
    batches: dict[str, int],
    run: CorunRunner,
    store: ProfileStore,
    device: Device,
    hashes: dict[str, str],
    left_s: Callable[[], float],
    on_point: Callable[[CorunPoint], None] = lambda _: None,
) -> tuple[CorunPoint, ...]:
    """Measure models side by side, as far as the time goes; what is stored already is not measured again.

    design: ((model, GPU%), ...) entries; batches: the batch size of each model. `run` measures one entry.
    """
    stored = {_setting(point): point for point in store.corun(device)}
    names = {sha256: name for name, sha256 in hashes.items()}
    found = []
    for entry in design:
        seats = tuple((name, percent, batches[name]) for name, percent in entry)
        key = tuple(sorted((hashes[name], percent, batch) for name, percent, batch in seats))
        point = stored.get(key)
        if point is None:
            if left_s() <= 0:
                break
            point = _renamed(run(seats), hashes)
            store.put_corun([point], device)
        found.append(_renamed(point, names))
        on_point(found[-1])
    return tuple(found)


def _renamed(point: CorunPoint, names: dict[str, str]) -> CorunPoint:
    return CorunPoint(tuple(replace(member, model=names[member.model]) for member in point.members))


def _setting(point: CorunPoint) -> tuple[tuple[str, float, int], ...]:
    return tuple(sorted((member.model, member.gpu_percent, member.batch_size) for member in point.members))


def corun_batches(profiles: Iterable[ModelProfile], wanted: int = 8) -> dict[str, int]:
    """For each model the measured batch size nearest below `wanted` (the smallest where none is)."""
    return {
        profile.name: max(
            (p.batch_size for p in profile.points if p.batch_size <= wanted),
            default=min(p.batch_size for p in profile.points),
        )
        for profile in profiles
    }
