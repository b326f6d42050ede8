"""Profile a model: measure few points, well chosen, until the latency surface is known well enough.

Every point is stored as it is measured, so a run that is cut short goes on where it was, and a model that is
known on this device costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from dstack_sched.domain.kernels import KernelWork
from dstack_sched.domain.order import non_monotone
from dstack_sched.domain.profile import CorunPoint, Device, Knee, LatencyFit, ModelProfile, ProfilePoint
from dstack_sched.errors import InputError
from dstack_sched.policy.knee import knee_percent
from dstack_sched.policy.latency import LatencySurface, fit_profile
from dstack_sched.policy.sampling import (
    CORUN_PERCENTS,
    Place,
    decisive_places,
    next_place,
    start_design,
    surface_error,
)
from dstack_sched.ports import Clock, LatencyProbe, ProfileStore

KNEE_BATCH = 16
REPEAT_ROUNDS = 4
MAX_CONFIRMED = 8
MEMORY_RESERVE = 1.6  # larger batches need more than the first, and a device must not be filled
GOOD_PREDICTIONS = 8  # in a row, each made before its point was measured
CPU_BATCHES = (1, 2, 4, 8)
GPU_BATCHES = (1, 2, 4, 8, 16, 32)
GPU_PERCENTS = tuple(float(p) for p in range(10, 101, 10))
CPU_DRIVER = "cpu"


@dataclass(frozen=True, slots=True)
class ProfilingOptions:
    """percents, batches: candidates, ascending; empty: those that suit the device.

    target_error: stop when the surface is known this well. time_budget_s: stop then in any case.
    exhaustive: measure all candidates. limit_ms: batches that would take longer than this are left out.
    """

    percents: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    target_error: float = 0.05
    time_budget_s: float = 60.0
    exhaustive: bool = False
    limit_ms: float = 4000.0


@dataclass(frozen=True, slots=True)
class Progress:
    """After each point. error: of the surface so far (inf while unknown); left_s: of the time budget."""

    model: str
    points: int
    error: float
    left_s: float


@dataclass(frozen=True, slots=True)
class ProfilingResult:
    """error: as policy.sampling.surface_error; measured, reused: points; seconds: all of it, loading too."""

    profile: ModelProfile
    device: Device
    error: float
    measured: int
    reused: int
    seconds: float
    notes: tuple[str, ...] = field(default=())


def candidate_percents(device: Device) -> tuple[float, ...]:
    """GPU% worth measuring: whole cores on a CPU host (at most 8 of them, spread), tenths on a GPU."""
    if device.driver != CPU_DRIVER:
        return GPU_PERCENTS
    cores = sorted({max(1, round(device.sms * k / 8)) for k in range(1, 9)})
    return tuple(100.0 * count / device.sms for count in cores)


def corun_percents(device: Device) -> tuple[float, ...]:
    """GPU% of each model when measured side by side; on a CPU host those that are whole cores."""
    if device.driver != CPU_DRIVER:
        return CORUN_PERCENTS
    return tuple(p for p in CORUN_PERCENTS if p * device.sms % 100 == 0)


def candidate_batches(device: Device, max_batch_size: int | None = None) -> tuple[int, ...]:
    """Batch sizes worth measuring: powers of two that suit the device, up to the largest allowed."""
    usual = CPU_BATCHES if device.driver == CPU_DRIVER else GPU_BATCHES
    if max_batch_size is None:
        return usual
    return tuple(sorted({batch for batch in usual if batch <= max_batch_size} | {max(1, max_batch_size)}))


def with_fit(profile: ModelProfile) -> ModelProfile:
    """The profile with fit and knee computed from its points (at batch KNEE_BATCH or the largest below)."""
    surface = LatencySurface(profile.name, profile.points)
    batch = max((b for b in surface.batches if b <= KNEE_BATCH), default=surface.batches[0])
    knee = Knee(knee_percent(surface, batch), batch)
    fit: LatencyFit = fit_profile(profile.points)
    return replace(profile, fit=fit, knee=knee)


def profile_model(
    name: str,
    sha256: str,
    probe: LatencyProbe,
    store: ProfileStore,
    clock: Clock,
    options: ProfilingOptions,
    kernels: Sequence[KernelWork] = (),
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> ProfilingResult:
    """Measure one model, alone on the device. kernels: its graph, for the parallelism model; may be empty.

    Errors: InputError when the model cannot run, MachineError when the device or a worker fails.
    """
    run = _Run(name, sha256, probe, store, clock, options, kernels, on_progress)
    if not run.done():
        run.prepare()
        run.measure_start()
        run.measure_on()
        run.repair()
        run.confirm()
    return run.result()


class _Run:
    """The state of one profile_model call."""

    def __init__(
        self,
        name: str,
        sha256: str,
        probe: LatencyProbe,
        store: ProfileStore,
        clock: Clock,
        options: ProfilingOptions,
        kernels: Sequence[KernelWork],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._probe, self._store, self._clock, self._options = probe, store, clock, options
        self._kernels, self._on_progress = kernels, on_progress
        self._started_us = clock.now_us()
        self.device = probe.device()
        known = store.get(sha256, self.device)
        self._profile = replace(known or ModelProfile(name, sha256, 0, ()), name=name)
        self._points = {(p.gpu_percent, p.batch_size): p for p in self._profile.points}
        self._reused = len(self._points)
        self._measured = 0
        self._surprises: list[float] = []
        self._notes: list[str] = []
        self.percents = options.percents or candidate_percents(self.device)
        self._batches = options.batches or candidate_batches(self.device)

    def done(self) -> bool:
        """Whether the surface is known well, to the largest batch, and the points that plans would be made of
        are measured; or nothing is left to measure."""
        if self._options.exhaustive or not self._missing():
            return not self._missing()
        reached = max((batch for _, batch in self._points), default=0)
        if reached < self._batches[-1] or self._error() > self._options.target_error:
            return False
        return all(place in self._points for place in self._decisive())

    def prepare(self) -> None:
        """Measure the cheapest place, drop the batches that would take too long, make the rest ready."""
        self._measure((self.percents[-1], self._batches[0]))
        alone = self._points[self.percents[-1], self._batches[0]]
        slowest_ms = alone.latency_ms_p50 * 100.0 / self.percents[0]
        short = tuple(b for b in self._batches if slowest_ms * b / self._batches[0] <= self._options.limit_ms)
        self._drop(short or self._batches[:1], f"a run would take more than {self._options.limit_ms:g} ms")
        # What was measured is the model and what one batch size needs; each further size needs about as much.
        expected = self._profile.memory_bytes * (1 + len(self._batches)) / 2 * MEMORY_RESERVE
        fits = expected * len(self.percents) < self.device.memory_bytes
        self._probe.prepare(self.percents, self._batches if fits else ())

    def measure_start(self) -> None:
        """The start design, cheapest place first."""
        for place in start_design(self.percents, self._batches):
            if place[1] in self._batches:
                self._measure(place)

    def measure_on(self) -> None:
        """Measure where it tells the most, until done or out of time or places."""
        while not self.done() and self._left_s() > 0:
            if self._options.exhaustive:
                self._measure(self._missing()[0])
                continue
            points = tuple(self._points.values())
            place = next_place(points, self._candidates(), self._kernels, self.device.sms)
            if place is None:
                return
            self._measure_and_learn(place)

    def confirm(self) -> None:
        """Measure what plans would be made of a second time, later: a device drifts by percents."""
        if self._options.exhaustive:
            return
        for place in [place for place in self._decisive() if place in self._points][:MAX_CONFIRMED]:
            if self._left_s() <= 0:
                return
            self._measure(place, combine=_mean)

    def _decisive(self) -> list[Place]:
        return decisive_places(tuple(self._points.values()), self._candidates())

    def repair(self) -> None:
        """Measure points again that break the order of latencies: what disturbs only ever adds, so the faster
        of two measurements counts. A slow point that stays in the way is given up."""
        for _ in range(REPEAT_ROUNDS):
            slow_ones = {(slow.gpu_percent, slow.batch_size) for slow, _ in self._wrong()}
            if not slow_ones or self._left_s() <= 0:
                break
            for place in sorted(slow_ones):
                self._measure(place, combine=_faster)
        while wrong := self._wrong():
            self._settle(*wrong[0])
            self._store_points()

    def _settle(self, slow: ProfilePoint, fast: ProfilePoint) -> None:
        """A model may truly be slower with more (a tiny one on more threads): what a smaller share does, the
        larger one can do, so it gets that time. A smaller batch that takes longer than a larger one goes."""
        place = (slow.gpu_percent, slow.batch_size)
        told = (
            f"{self._profile.name}: GPU% {slow.gpu_percent:g}, batch {slow.batch_size}:"
            f" {slow.latency_ms_p50:.3g} ms, slower than {fast.latency_ms_p50:.3g} ms at GPU%"
            f" {fast.gpu_percent:g}, batch {fast.batch_size}, also when measured again"
        )
        if slow.gpu_percent > fast.gpu_percent:
            self._points[place] = replace(
                slow, latency_ms_p50=fast.latency_ms_p50, latency_ms_p99=fast.latency_ms_p99
            )
            self._notes.append(f"{told}; more GPU% does not help, it counts as the smaller share")
        else:
            del self._points[place]
            self._notes.append(f"{told}; left out, is the device busy?")

    def _wrong(self) -> list[tuple[ProfilePoint, ProfilePoint]]:
        return non_monotone(tuple(self._points.values()))

    def result(self) -> ProfilingResult:
        """The profile with fit and knee, stored. Errors: InputError when too few points could be measured."""
        if len(self._points) < 2:
            raise InputError(
                f"{self._profile.name}: only {len(self._points)} point could be measured; allow more GPU%,"
                " batch sizes or time"
            )
        if self._measured or not (self._profile.fit and self._profile.knee):
            self._profile = with_fit(replace(self._profile, points=tuple(self._points.values())))
            self._store.put(self._profile, self.device)
        return ProfilingResult(
            self._profile,
            self.device,
            self._error(),
            self._measured,
            self._reused,
            (self._clock.now_us() - self._started_us) / 1e6,
            tuple(self._notes),
        )

    def _candidates(self) -> list[Place]:
        return [(p, b) for b, p in product(self._batches, reversed(self.percents))]

    def _missing(self) -> list[Place]:
        return [place for place in self._candidates() if place not in self._points]

    def _measure_and_learn(self, place: Place) -> None:
        """Measure a place, and keep how far the surface was off before it knew."""
        expected_ms = float(LatencySurface("", tuple(self._points.values())).latency_ms(*place))
        self._measure(place)
        if place in self._points:
            self._surprises.append(abs(expected_ms / self._points[place].latency_ms_p50 - 1.0))

    def _error(self) -> float:
        """Of the surface as it stands; a run of good predictions counts more than one bad point left out."""
        error = surface_error(tuple(self._points.values()), complete=not self._missing())
        recent = self._surprises[-GOOD_PREDICTIONS:]
        return min(error, max(recent)) if len(recent) == GOOD_PREDICTIONS else error

    def _left_s(self) -> float:
        return self._options.time_budget_s - (self._clock.now_us() - self._started_us) / 1e6

    def _drop(self, keep: tuple[int, ...], why: str) -> None:
        dropped = [batch for batch in self._batches if batch not in keep]
        if dropped:
            self._batches = keep
            self._notes.append(f"{self._profile.name}: batches of {dropped[0]} and more are left out: {why}")

    def _measure(
        self, place: Place, combine: Callable[[ProfilePoint, ProfilePoint], ProfilePoint] | None = None
    ) -> None:
        """Measure a place not known yet; or again, where `combine` says what two measurements mean."""
        before = self._points.get(place)
        if before is not None and combine is None:
            return
        try:
            point = self._probe.measure(*place)
        except InputError as error:
            if place[1] == self._batches[0]:
                raise
            self._drop(tuple(b for b in self._batches if b < place[1]), str(error))
            return
        self._points[place] = combine(before, point) if before is not None and combine else point
        self._measured += 1
        self._store_points()
        self._on_progress(
            Progress(self._profile.name, len(self._points), self._error(), max(0.0, self._left_s()))
        )

    def _store_points(self) -> None:
        memory = max(self._profile.memory_bytes, self._probe.memory_bytes())
        self._profile = replace(self._profile, points=tuple(self._points.values()), memory_bytes=memory)
        self._store.put(self._profile, self.device)


def _faster(one: ProfilePoint, other: ProfilePoint) -> ProfilePoint:
    return min(one, other, key=lambda point: point.latency_ms_p50)


def _mean(one: ProfilePoint, other: ProfilePoint) -> ProfilePoint:
    """Both medians count the same; the tail is the worse of the two."""
    return replace(
        one,
        latency_ms_p50=(one.latency_ms_p50 + other.latency_ms_p50) / 2,
        latency_ms_p99=max(one.latency_ms_p99, other.latency_ms_p99),
        samples=one.samples + other.samples,
    )


CorunRunner = Callable[[tuple[tuple[str, float, int], ...]], CorunPoint]


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
