"""The profiling use case on a made-up device: what is measured, kept, reused and given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest

from dstack_sched.app.corun_profiling import corun_batches, corun_percents, measure_coruns
from dstack_sched.app.profiling import (
    ProfilingOptions,
    Progress,
    candidate_batches,
    candidate_percents,
    profile_model,
)
from dstack_sched.domain.profile import (
    CorunMember,
    CorunPoint,
    Device,
    ModelProfile,
    ProfilePoint,
    ProfileSet,
)
from dstack_sched.errors import InputError, MachineError
from dstack_sched.policy.batch_program import efficacy

GPU = Device("H100", 132, 80 << 30, "580", "onnxruntime-gpu 1.31")
CPU = Device("EPYC", 2, 24 << 30, "cpu", "onnxruntime 1.32")
HASH = "a" * 64


class FakeClock:
    """Time passes only when something is measured."""

    def __init__(self) -> None:
        self.us = 0

    def now_us(self) -> int:
        return self.us

    def wall_time_s(self) -> float:
        return self.us / 1e6

    def sleep_s(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)


class FakeProbe:
    """A device whose latencies are a function; each point takes a second."""

    def __init__(
        self, clock: FakeClock, latency_ms: Callable[[float, int], float], device: Device = GPU
    ) -> None:
        self.clock, self.latency_ms, self._device = clock, latency_ms, device
        self.measured: list[tuple[float, int]] = []
        self.prepared: list[float] = []
        self.prepared_batches: tuple[int, ...] = ()
        self.memory = 1000

    def device(self) -> Device:
        return self._device

    def prepare(self, gpu_percents: Iterable[float], batch_sizes: Iterable[int] = ()) -> None:
        self.prepared += gpu_percents
        self.prepared_batches = tuple(batch_sizes)

    def measure(self, gpu_percent: float, batch_size: int) -> ProfilePoint:
        self.clock.sleep_s(1.0)
        self.measured.append((gpu_percent, batch_size))
        ms = self.latency_ms(gpu_percent, batch_size)
        return ProfilePoint(gpu_percent, batch_size, ms, ms * 1.02, 20)

    def memory_bytes(self) -> int:
        return self.memory + len(self.measured)

    def close(self) -> None: ...


class FakeStore:
    """ports.ProfileStore in memory; counts writes."""

    def __init__(self) -> None:
        self.kept: dict[str, ModelProfile] = {}
        self.points: list[CorunPoint] = []
        self.writes = 0

    def get(self, sha256: str, device: Device) -> ModelProfile | None:
        return self.kept.get(sha256)

    def put(self, profile: ModelProfile, device: Device) -> None:
        self.kept[profile.sha256] = profile
        self.writes += 1

    def corun(self, device: Device) -> tuple[CorunPoint, ...]:
        return tuple(self.points)

    def put_corun(self, points: Iterable[CorunPoint], device: Device) -> None:
        self.points += points

    def export(self, device: Device, hashes: Mapping[str, str]) -> ProfileSet:
        return ProfileSet(device, {name: self.kept[sha] for name, sha in hashes.items()})


def smooth(p: float, b: int) -> float:
    return 0.5 + 0.02 * b + (8 + 5 * b) / p


def run(probe: FakeProbe, store: FakeStore, **options):
    return profile_model("m", HASH, probe, store, probe.clock, ProfilingOptions(**options))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def test_a_smooth_model_takes_few_points_and_is_known_well(clock: FakeClock, store: FakeStore) -> None:
    probe = FakeProbe(clock, smooth)
    result = run(probe, store)
    assert result.error <= 0.05
    assert result.measured == len(probe.measured) <= 60, "what plans would be made of several times"
    assert len(result.profile.points) <= 45, "of 60 candidates"
    assert result.profile.fit is not None
    assert (result.profile.fit.a2, result.profile.fit.a3) == pytest.approx((8, 5), rel=0.05)
    assert result.profile.knee is not None
    assert result.profile.memory_bytes > 1000
    assert probe.prepared == list(candidate_percents(GPU)), "all workers load together"
    assert store.writes >= result.measured, "each point is stored as it is measured"


def test_batch_sizes_are_made_ready_together_where_they_fit_the_device(clock: FakeClock) -> None:
    """Each size of each worker takes memory of its own: all of them at once would not fit a small device."""
    small, large = FakeProbe(clock, smooth), FakeProbe(clock, smooth)
    large.memory = 10 << 30
    run(small, FakeStore())
    run(large, FakeStore())
    assert small.prepared_batches == candidate_batches(GPU)[:4]
    assert large.prepared_batches == ()
    assert large.prepared == small.prepared == list(candidate_percents(GPU))


def test_adaptive_points_choose_as_well_as_the_whole_grid(clock: FakeClock) -> None:
    """The best (GPU%, batch) of the grid by its own measurements, within 3%, from fewer points."""

    def bent(p: float, b: int) -> float:
        return (0.6 + 0.03 * b + (6 + 4 * b) / p) * (1.0 + 0.06 * (b >= 16) - 0.04 * (p == 60))

    adaptive = run(FakeProbe(clock, bent), FakeStore())
    grid = run(FakeProbe(clock, bent), FakeStore(), exhaustive=True, time_budget_s=1e4)
    assert grid.measured == 60
    assert len(adaptive.profile.points) < len(grid.profile.points)

    def best(profile: ModelProfile) -> float:
        return max(efficacy(x.gpu_percent, x.batch_size, x.latency_ms_p50) for x in profile.points)

    assert best(adaptive.profile) >= 0.97 * best(grid.profile)


def test_a_known_model_is_not_measured_again(clock: FakeClock, store: FakeStore) -> None:
    run(FakeProbe(clock, smooth), store)
    again = FakeProbe(clock, smooth)
    result = run(again, store)
    assert again.measured == []
    assert again.prepared == [], "no worker is even started"
    assert result.reused == len(result.profile.points)


def test_a_run_cut_short_goes_on_where_it_was(clock: FakeClock, store: FakeStore) -> None:
    probe = FakeProbe(clock, smooth)

    def dies(p: float, b: int) -> float:
        if len(probe.measured) > 3:
            raise MachineError("the profiling worker died")
        return smooth(p, b)

    probe.latency_ms = dies
    with pytest.raises(MachineError):
        run(probe, store)
    assert len(store.kept[HASH].points) == 3
    resumed = FakeProbe(clock, smooth)
    result = run(resumed, store)
    assert result.reused == 3
    assert not set(resumed.measured) & set(probe.measured[:3])
    assert result.error <= 0.05


def test_a_larger_batch_asked_for_later_is_measured(clock: FakeClock, store: FakeStore) -> None:
    run(FakeProbe(clock, smooth), store, batches=(1, 2, 4, 8))
    later = FakeProbe(clock, smooth)
    run(later, store, batches=(1, 2, 4, 8, 64))
    assert any(batch == 64 for _, batch in later.measured)


def test_the_time_budget_ends_it(clock: FakeClock, store: FakeStore) -> None:
    """A surface that nothing fits would be measured for ever."""

    def rough(p: float, b: int) -> float:
        return smooth(p, b) * (1.0 if b in (1, 4, 16) else 1.15) * (1.0 if p in (10.0, 40.0, 100.0) else 1.1)

    result = run(FakeProbe(clock, rough), store, time_budget_s=12.0)
    assert result.measured <= 12 + 6, "the budget, and one round of points out of order"
    assert result.seconds < 20


def test_noise_out_of_order_is_measured_again_and_the_faster_counts(
    clock: FakeClock, store: FakeStore
) -> None:
    """A neighbour was busy once: the point must not stay 2x too slow, and the file must stay readable."""
    probe = FakeProbe(clock, smooth)

    def disturbed(p: float, b: int) -> float:
        first = probe.measured.count((p, b)) == 1
        return smooth(p, b) * (2.0 if (p, b) == (100.0, 32) and first else 1.0)

    probe.latency_ms = disturbed
    result = run(probe, store, batches=(1, 32), percents=(80.0, 90.0, 100.0))
    at = {(x.gpu_percent, x.batch_size): x.latency_ms_p50 for x in result.profile.points}
    assert at[100.0, 32] == pytest.approx(smooth(100.0, 32))
    assert result.notes == ()


def test_what_plans_are_made_of_is_measured_several_times_and_the_median_counts(
    clock: FakeClock, store: FakeStore
) -> None:
    """One lucky measurement must not make a place look best: the third best is 20% faster, once."""
    lucky = (40.0, 4)
    probe = FakeProbe(clock, smooth)

    def noisy(p: float, b: int) -> float:
        first = probe.measured.count((p, b)) == 1
        return smooth(p, b) * (0.8 if (p, b) == lucky and first else 1.0)

    probe.latency_ms = noisy
    result = run(probe, store, percents=(20.0, 40.0, 60.0, 100.0), batches=(1, 4, 8))
    at = {(x.gpu_percent, x.batch_size): x for x in result.profile.points}
    assert probe.measured.count(lucky) >= 3
    assert at[lucky].latency_ms_p50 == pytest.approx(smooth(*lucky))
    assert at[lucky].samples == 20 * probe.measured.count(lucky)


def test_on_a_cpu_host_nothing_is_measured_more_than_twice(clock: FakeClock, store: FakeStore) -> None:
    """There are few places, and a second each: onboarding must stay short."""
    probe = FakeProbe(clock, smooth, CPU)
    run(probe, store)
    assert max(probe.measured.count(place) for place in probe.measured) == 2


def test_a_share_that_never_helps_counts_as_the_smaller_one(clock: FakeClock, store: FakeStore) -> None:
    """A tiny model is slower on two threads than on one: it keeps a profile that can be planned with."""

    def wrong(p: float, b: int) -> float:
        return 3.0 * smooth(p, b) if (p, b) == (100.0, 8) else smooth(p, b)

    result = run(FakeProbe(clock, wrong), store, batches=(1, 8), percents=(50.0, 75.0, 100.0))
    at = {(x.gpu_percent, x.batch_size): x.latency_ms_p50 for x in result.profile.points}
    assert at[100.0, 8] == at[75.0, 8] == smooth(75.0, 8)
    assert any("GPU% 100, batch 8" in note and "counts as the smaller share" in note for note in result.notes)
    assert set(store.kept[HASH].points) == set(result.profile.points)


def test_a_small_batch_that_stays_slower_than_a_large_one_is_given_up(
    clock: FakeClock, store: FakeStore
) -> None:
    def wrong(p: float, b: int) -> float:
        return 3.0 * smooth(p, b) if (p, b) == (50.0, 4) else smooth(p, b)

    result = run(FakeProbe(clock, wrong), store, batches=(1, 4, 8), percents=(50.0, 100.0), exhaustive=True)
    assert (50.0, 4) not in {(x.gpu_percent, x.batch_size) for x in result.profile.points}
    assert any("GPU% 50, batch 4" in note and "left out" in note for note in result.notes)


def test_batches_that_do_not_fit_or_take_too_long_are_left_out(clock: FakeClock, store: FakeStore) -> None:
    probe = FakeProbe(clock, smooth)

    def small_memory(p: float, b: int) -> float:
        if b >= 16:
            raise InputError("m at GPU% 100: out of memory")
        return smooth(p, b)

    probe.latency_ms = small_memory
    result = run(probe, store)
    assert max(x.batch_size for x in result.profile.points) == 8
    assert any("out of memory" in note for note in result.notes)
    slow = run(FakeProbe(clock, lambda p, b: 100.0 * smooth(p, b)), FakeStore(), limit_ms=4000.0)
    assert max(x.latency_ms_p50 for x in slow.profile.points) <= 4000
    assert any("a run would take more than 4000 ms" in note for note in slow.notes)


def test_a_model_that_cannot_run_at_all_is_the_users_to_mend(clock: FakeClock, store: FakeStore) -> None:
    def fails(p: float, b: int) -> float:
        raise InputError("m: needs an input of another shape")

    with pytest.raises(InputError, match="another shape"):
        run(FakeProbe(clock, fails), store)


def test_one_point_is_no_profile(clock: FakeClock, store: FakeStore) -> None:
    with pytest.raises(InputError, match="only 1 point could be measured"):
        run(FakeProbe(clock, smooth), store, batches=(1,), percents=(100.0,))


def test_progress_tells_points_error_and_time_left(clock: FakeClock, store: FakeStore) -> None:
    seen: list[Progress] = []
    probe = FakeProbe(clock, smooth)
    profile_model("m", HASH, probe, store, clock, ProfilingOptions(time_budget_s=30), on_progress=seen.append)
    assert [state.points for state in seen][:6] == [1, 2, 3, 4, 5, 6]
    assert [state.left_s for state in seen] == [30.0 - i for i in range(1, len(seen) + 1)]
    assert seen[0].error == float("inf")
    assert seen[-1].error <= 0.05


def test_candidates_suit_the_device() -> None:
    assert candidate_percents(CPU) == (50.0, 100.0)
    assert len(candidate_percents(Device("big", 64, 1, "cpu", "x"))) == 8
    assert candidate_batches(CPU) == (1, 2, 4, 8)
    assert candidate_batches(CPU, 3) == (1, 2, 3)
    assert candidate_batches(CPU, 1) == (1,)
    assert candidate_batches(GPU, 64)[-1] == 64
    assert corun_percents(CPU) == (50.0, 100.0)
    assert corun_percents(GPU) == (25.0, 50.0, 70.0, 100.0)


def test_coruns_are_measured_once_and_within_the_time(store: FakeStore) -> None:
    asked: list[tuple] = []

    def measure(seats):
        asked.append(seats)
        return CorunPoint(tuple(CorunMember(n, p, b, 2.0, 500.0) for n, p, b in seats))

    hashes = {"x": "a" * 64, "y": "b" * 64}
    design = [(("x", 50.0), ("y", 50.0)), (("x", 100.0), ("y", 100.0))]
    time_left = iter([1.0, 0.0])
    batches = {"x": 8, "y": 4}
    found = measure_coruns(design, batches, measure, store, GPU, hashes, lambda: next(time_left))
    assert len(found) == len(asked) == 1
    assert [m.model for m in store.points[0].members] == ["a" * 64, "b" * 64], "kept by hash"
    assert [m.model for m in found[0].members] == ["x", "y"]
    found = measure_coruns(design, batches, measure, store, GPU, hashes, lambda: 1.0)
    assert len(found) == 2
    assert len(asked) == 2, "the first is not measured again"


def test_corun_batches_were_measured_alone_too() -> None:
    def model(name: str, *batches: int) -> ModelProfile:
        return ModelProfile(name, HASH, 0, tuple(ProfilePoint(50, b, 1.0, 1.0, 1) for b in batches))

    assert corun_batches([model("x", 1, 4, 32), model("y", 16, 32)]) == {"x": 4, "y": 16}
