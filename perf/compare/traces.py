"""What the clients saw, request by request, and the figures of a trial that are made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compare.peak import Trial
from compare.stalls import MOST_LEFT_OUT, length_s, outside
from dstack_sched.app.bench import LoadGenerator, LoadRun
from dstack_sched.domain.load import BenchResult, LoadTrace
from dstack_sched.errors import ServerError
from dstack_sched.sim.result import jain

CDF_PERCENTS = (0, 1, 2, 5, *range(10, 90, 10), 90, 95, 97, 98, 99, 99.5, 99.9, 100)
MOST_SPANS = 400  # of one model, in a timeline
# Of a model's requests: perf_analyzer forgets all of a stretch that it ends at an error.
MOST_UNMEASURED = 0.5

Traces = Mapping[str, Sequence[LoadTrace]]


class LostLoadError(ServerError):
    """Too little of the load was measured to say anything of a model."""


class Recorder:
    """A load generator that keeps what the runs of another one found: `traces`, by model."""

    def __init__(self, generator: LoadGenerator) -> None:
        self._generator = generator
        self.traces: dict[str, list[LoadTrace]] = {}

    def start(self, model: str, intervals_us: np.ndarray) -> LoadRun:
        kept = self.traces.setdefault(model, [])
        return _Recorded(self._generator.start(model, intervals_us), kept)


class _Recorded:
    def __init__(self, run: LoadRun, kept: list[LoadTrace]) -> None:
        self._run, self._kept = run, kept

    def ends_within(self, timeout_s: float) -> bool:
        return self._run.ends_within(timeout_s)

    def wait(self, timeout_s: float) -> LoadTrace:
        trace = self._run.wait(timeout_s)
        self._kept.append(trace)
        return trace


def spans(traces: Traces, since_s: float, until_s: float) -> dict[str, list[list[float]]]:
    """Model -> [sent, answered] in ms from since_s, of its requests under way then. Wall-clock seconds."""
    found = {}
    for model, parts in traces.items():
        sent = np.concatenate([part.sent_s for part in parts])
        done = sent + np.concatenate([part.latency_ms for part in parts]) / 1e3
        inside = (sent < until_s) & (done > since_s)
        pairs = np.stack([sent[inside] - since_s, done[inside] - since_s], axis=1) * 1e3
        found[model] = np.round(pairs[:MOST_SPANS], 2).tolist()
    return found


def served_share(sent_s: np.ndarray, latency_ms: np.ndarray, window_s: tuple[float, float]) -> float | None:
    """Answers over requests, both within the window: what of the offered rate a model is served. None without
    requests."""
    since_s, until_s = window_s
    done_s = sent_s + latency_ms / 1e3
    offered = ((sent_s >= since_s) & (sent_s < until_s)).sum()
    return float(((done_s >= since_s) & (done_s < until_s)).sum() / offered) if offered else None


def quantiles(latency_ms: np.ndarray) -> list[float]:
    """The latencies at CDF_PERCENTS; [] of none."""
    if not latency_ms.size:
        return []
    return [round(float(value), 3) for value in np.percentile(latency_ms, CDF_PERCENTS)]


def trial_of(
    result: BenchResult,
    traces: Traces,
    window_s: tuple[float, float],
    gpu: Mapping[str, float],
    stalls_s: np.ndarray,
) -> Trial:
    """The figures of a stretch: by model, and of the worst of them. window_s: the stretch in wall-clock
    seconds. stalls_s: what of it is left out (stalls.py), shape (stalls, 2). Errors: LostLoadError."""
    models = {}
    stalls_s = np.clip(stalls_s, *window_s)
    if length_s(stalls_s) > MOST_LEFT_OUT * (window_s[1] - window_s[0]):
        stalls_s = np.empty((0, 2))  # that is the load itself
    kept_s = window_s[1] - window_s[0] - length_s(stalls_s)
    for name, each in result.models.items():
        if each.slo_attainment is None or each.unmeasured > MOST_UNMEASURED * each.requests:
            why = f": {each.errors[0]}" if each.errors else ""
            raise LostLoadError(
                f"{name}: {each.unmeasured} of {each.requests} requests were answered and not measured{why}"
            )
        sent_s = np.concatenate([part.sent_s for part in traces[name]])
        latency_ms = np.concatenate([part.latency_ms for part in traces[name]])
        inside = (sent_s >= window_s[0]) & (sent_s < window_s[1])
        kept = inside & outside(sent_s, sent_s + latency_ms / 1e3, stalls_s)
        good = int((latency_ms[kept] <= (each.slo_ms or np.inf)).sum())
        models[name] = {
            "rate_per_s": round(each.rate_per_s, 2), "requests": each.requests, "failed": each.failed,
            "errors": list(each.errors), "p50_ms": each.latency_ms_p50, "p99_ms": each.latency_ms_p99,
            "attainment": good / max(1, int(kept.sum()) + each.failed),
            "goodput_per_s": round(good / kept_s, 2) if kept_s > 0 else 0.0,
            "kept": int(kept.sum()), "attainment_of_all": each.slo_attainment,
            "served_share": served_share(sent_s, latency_ms, window_s),
            "cdf_ms": quantiles(latency_ms[inside]),
            "send_lag_ms_p99": each.send_lag_ms_p99,
        }  # fmt: skip
    shares = [float(each["served_share"] or 0.0) for each in models.values()]
    answered = sum(each.requests - each.failed for each in result.models.values())
    energy_j = gpu.get("energy_j")
    return Trial(
        rate_per_s=sum(each.rate_per_s for each in result.models.values()),
        attainment=min(each["attainment"] for each in models.values()),
        goodput_per_s=sum(each["goodput_per_s"] for each in models.values()),
        figures={
            "models": models,
            "gpu": {key: round(value, 4) for key, value in gpu.items()},
            "left_out_share": round(1.0 - kept_s / (window_s[1] - window_s[0]), 4),
            "jain_fairness": round(jain(shares), 4),
            "energy_mj_per_inference": round(1e3 * energy_j / answered, 2) if energy_j and answered else None,
        },
    )
