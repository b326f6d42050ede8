"""Profile a model: measure few points, well chosen, until the latency surface is known well enough.

Every point is stored as it is measured, so a run that is cut short goes on where it was, and a model that is
known on this device costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median

from dstack_sched.domain.kernels import KernelWork
from dstack_sched.domain.order import non_monotone, ordered_by_trust
from dstack_sched.domain.profile import Device, Knee, LatencyFit, ModelProfile, ProfilePoint
from dstack_sched.errors import InputError
from dstack_sched.policy.knee import knee_percent
from dstack_sched.policy.latency import LatencySurface, fit_profile
from dstack_sched.policy.runnable import CPU_DRIVER
from dstack_sched.policy.sampling import (
    Place,
    most_unsure_place,
    next_decisive,
    start_design,
    surface_error,
)
from dstack_sched.ports import Clock, LatencyProbe, ProfileStore

KNEE_BATCH = 16
REPEAT_ROUNDS = 4
GPU_MOST_TIMES = 8  # measuring what plans would be made of
CPU_MOST_TIMES = 2
MEMORY_RESERVE = 1.6  # larger batches need more than the first, and a device must not be filled
PREPARED_BATCHES = 4  # the smallest: plans are seldom made of larger ones, and each costs seconds
GOOD_PREDICTIONS = 8  # in a row, each made before its point was measured
CPU_BATCHES = (1, 2, 4, 8)
GPU_BATCHES = (1, 2, 4, 8, 16, 32)
GPU_PERCENTS = tuple(float(p) for p in range(10, 101, 10))


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
        run.settle()
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
        self._taken = {place: [point] for place, point in self._points.items()}
        self._repairs: Counter[Place] = Counter()
        self._reused = len(self._points)
        self._measured = 0
        self._surprises: list[float] = []
        self._known_error: float | None = None  # of the points as they are now
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
        place = self._next_decisive()
        return place is None or place in self._points

    def prepare(self) -> None:
        """Measure the cheapest place, drop the batches that would take too long, make the rest ready."""
        self._measure((self.percents[-1], self._batches[0]))
        alone = self._points[self.percents[-1], self._batches[0]]
        slowest_ms = alone.latency_ms_p50 * 100.0 / self.percents[0]
        short = tuple(b for b in self._batches if slowest_ms * b / self._batches[0] <= self._options.limit_ms)
        self._drop(short or self._batches[:1], f"a run would take more than {self._options.limit_ms:g} ms")
        # What was measured is the model and what one batch size needs; each further size needs about as much.
        alone_bytes = self._profile.memory_bytes / 2 * MEMORY_RESERVE * len(self.percents)
        fits = [
            b
            for n, b in enumerate(self._batches[:PREPARED_BATCHES], 1)
            if alone_bytes * (1 + n) < self.device.memory_bytes
        ]
        self._probe.prepare(self.percents, fits)

    def measure_start(self) -> None:
        """The start design, cheapest place first."""
        for place in start_design(self.percents, self._batches):
            if place[1] in self._batches:
                self._measure(place)

    def measure_on(self) -> None:
        """Measure where it tells the most, until all is known or the time is up."""
        while self._left_s() > 0:
            if (slow := self._out_of_order()) is not None:
                self._repairs[slow] += 1
                self._measure(slow, again=_faster)
            elif self._options.exhaustive:
                if not self._missing():
                    return
                self._measure(self._missing()[0])
            elif (place := self._next_decisive()) is not None or (place := self._next_unsure()) is not None:
                self._measure_and_learn(place)
            else:
                return

    def _next_decisive(self) -> Place | None:
        times = {place: len(points) for place, points in self._taken.items()}
        most_times = CPU_MOST_TIMES if self.device.driver == CPU_DRIVER else GPU_MOST_TIMES
        points = self._ordered()
        return next_decisive(points, self._candidates(), times, self._error(), most_times)

    def _next_unsure(self) -> Place | None:
        if self._error() <= self._options.target_error:
            return None
        points = self._ordered()
        return most_unsure_place(points, self._candidates(), self._kernels, self.device.sms)

    def _out_of_order(self) -> Place | None:
        """A point that breaks the order of latencies, to be measured again: what disturbs as much only ever
        adds, so the faster of two counts."""
        slow = ((slow.gpu_percent, slow.batch_size) for slow, _ in self._wrong())
        return min((place for place in slow if self._repairs[place] < REPEAT_ROUNDS), default=None)

    def settle(self) -> None:
        """A slow point that stays in the way is given up."""
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

    def _ordered(self) -> tuple[ProfilePoint, ...]:
        """The points as far as they are known: what was measured again and again outweighs what was not."""
        times = {place: len(points) for place, points in self._taken.items()}
        return ordered_by_trust(tuple(self._points.values()), times)

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
            self._profile = with_fit(replace(self._profile, points=self._ordered()))
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
        """Measure a place, and keep how far the surface was off before it knew it."""
        if place in self._points:
            self._measure(place, again=list)
            return
        expected_ms = float(LatencySurface("", self._ordered()).latency_ms(*place))
        self._measure(place)
        if place in self._points:
            self._surprises.append(abs(expected_ms / self._points[place].latency_ms_p50 - 1.0))

    def _error(self) -> float:
        """Of the surface as it stands; a run of good predictions counts more than one bad point left out."""
        if self._known_error is None:
            self._known_error = surface_error(
                self._ordered(), complete=self._options.exhaustive or not self._missing()
            )
        recent = self._surprises[-GOOD_PREDICTIONS:]
        return min(self._known_error, max(recent)) if len(recent) == GOOD_PREDICTIONS else self._known_error

    def _left_s(self) -> float:
        return self._options.time_budget_s - (self._clock.now_us() - self._started_us) / 1e6

    def _drop(self, keep: tuple[int, ...], why: str) -> None:
        dropped = [batch for batch in self._batches if batch not in keep]
        if dropped:
            self._batches = keep
            self._notes.append(f"{self._profile.name}: batches of {dropped[0]} and more are left out: {why}")

    def _measure(
        self, place: Place, again: Callable[[Sequence[ProfilePoint]], list[ProfilePoint]] | None = None
    ) -> None:
        """Measure a place not known yet; or once more, where `again` says which measurements count."""
        taken = self._taken.get(place, [])
        if taken and again is None:
            return
        try:
            point = self._probe.measure(*place)
        except InputError as error:
            if place[1] == self._batches[0]:
                raise
            self._drop(tuple(b for b in self._batches if b < place[1]), str(error))
            return
        self._taken[place] = again([*taken, point]) if again else [point]
        self._points[place] = median_point(self._taken[place])
        self._measured += 1
        if not taken:
            self._known_error = None
        self._store_points()
        self._on_progress(
            Progress(self._profile.name, len(self._points), self._error(), max(0.0, self._left_s()))
        )

    def _store_points(self) -> None:
        memory = max(self._profile.memory_bytes, self._probe.memory_bytes())
        self._profile = replace(self._profile, points=tuple(self._points.values()), memory_bytes=memory)
        self._store.put(self._profile, self.device)


def _faster(points: Sequence[ProfilePoint]) -> list[ProfilePoint]:
    return [min(points, key=lambda point: point.latency_ms_p50)]


def median_point(points: Sequence[ProfilePoint]) -> ProfilePoint:
    """Measurements of one place as one point: the median of their medians, and of their tails."""
    return replace(
        points[0],
        latency_ms_p50=median(point.latency_ms_p50 for point in points),
        latency_ms_p99=median(point.latency_ms_p99 for point in points),
        samples=sum(point.samples for point in points),
    )
