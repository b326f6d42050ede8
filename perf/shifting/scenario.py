"""What is asked: three models, and how many rows a second of each in each of ten minutes.

The recorded trace gives the timing only. It is striped over the models (each starts elsewhere in it) and its
time is stretched within each minute such that the minute's mean rate is as stated; the trace's own bursts, as
they are seen at that rate, stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstack_sched.domain.workload import ModelDemand, OnLate, Workload
from dstack_sched.sim.arrivals import parse_trace

TRACE = Path(__file__).resolve().parents[2].parent / "shared" / "traces" / "azure_llm_2023_conv.csv"
GOLDEN = 0.381966  # no two stripes close


@dataclass(frozen=True, slots=True)
class StudyModel:
    """One sample model. rows: of each request. per_s: rows a second, minute by minute."""

    name: str
    rows: int
    slo_ms: float
    per_s: tuple[float, ...]


# Minutes: all about equal, one hot at a time, two warm, and back. Chosen such that two cores hold every
# minute under the best shares, and the hot ones not under the shares that are best for the means.
MODELS = (
    StudyModel("magika", 4, 200.0, (80, 240, 240, 20, 20, 80, 250, 20, 20, 230)),
    StudyModel("ocr_recognize", 2, 300.0, (32, 5, 5, 90, 12, 32, 5, 12, 90, 5)),
    StudyModel("ocr_detect", 1, 300.0, (26, 4, 4, 4, 76, 26, 4, 76, 4, 4)),
)


@dataclass(frozen=True, slots=True)
class Script:
    """All arrivals of a run. times_s: model -> send times, ascending, from 0. minutes: how many, minute_s
    long."""

    models: tuple[StudyModel, ...]
    minutes: int
    minute_s: float
    times_s: Mapping[str, np.ndarray]

    @property
    def seconds(self) -> float:
        return self.minutes * self.minute_s

    def workload(self, rates: Mapping[str, float]) -> Workload:
        """These models at these rates (rows a second)."""
        demands = [ModelDemand(m.name, m.slo_ms, rates[m.name], 1.0, OnLate.REJECT) for m in self.models]
        return Workload(tuple(demands))

    def mean_rates(self) -> dict[str, float]:
        """Rows a second over the whole run: what the static plan is made for."""
        return {m.name: m.rows * self.times_s[m.name].size / self.seconds for m in self.models}

    def minute_rates(self, minute: int) -> dict[str, float]:
        """Rows a second of one minute, as they will come."""
        begin, end = minute * self.minute_s, (minute + 1) * self.minute_s
        counts = {m.name: np.searchsorted(self.times_s[m.name], (begin, end)) for m in self.models}
        return {m.name: m.rows * int(np.diff(counts[m.name])[0]) / self.minute_s for m in self.models}


def make_script(
    minutes: int, minute_s: float, scale: float = 1.0, models: Sequence[StudyModel] = MODELS
) -> Script:
    """The script of the study. Errors: InputError where the trace cannot be read."""
    trace_us = parse_trace(TRACE.read_text(encoding="utf-8"), str(TRACE))
    times = {
        model.name: warped(
            np.asarray(trace_us, np.float64),
            [scale * rate / model.rows for rate in model.per_s[:minutes]],
            minute_s,
            stripe=index,
        )
        for index, model in enumerate(models)
    }
    return Script(tuple(models), minutes, minute_s, times)


def warped(trace: np.ndarray, per_s: Sequence[float], minute_s: float, stripe: int) -> np.ndarray:
    """Send times in seconds: the trace, turned to its stripe and repeated, at per_s[k] requests a second in
    minute k. One mean gap of the trace stands for one request: work = rate x time, piecewise linear."""
    mean_gap = float(trace[-1]) / (trace.size - 1)
    start = int(trace.size * ((stripe * GOLDEN) % 1.0))
    turned = np.concatenate(
        [trace[start:] - trace[start], trace[:start] + trace[-1] + mean_gap - trace[start]]
    )
    work = turned / mean_gap  # one request each, on average
    edges = np.concatenate([[0.0], np.cumsum(np.asarray(per_s) * minute_s)])
    turns = int(edges[-1] / trace.size) + 1
    work = np.concatenate([work + turn * trace.size for turn in range(turns)])
    work = work[work < edges[-1]]
    return np.interp(work, edges, np.arange(edges.size) * minute_s)
