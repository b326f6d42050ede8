"""When requests arrive: arrays of microseconds, ascending, made in one go. Randomness comes in as `rng`.

Spelled in the command line as: poisson | gamma:CV | periodic | onoff:ON_S:OFF_S | trace:FILE | closed:N
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstack_sched.errors import InputError

Times = NDArray[np.int64]
Kind = Literal["poisson", "gamma", "periodic", "onoff", "trace", "closed"]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How requests come. cv: coefficient of variation of the gaps (gamma). on_s, off_s: mean length of bursts
    and pauses (onoff). trace_us: offsets of a recorded trace from its first request. clients: requests in
    flight a model (closed)."""

    kind: Kind = "poisson"
    cv: float = 1.0
    on_s: float = 0.5
    off_s: float = 0.5
    clients: int = 1
    trace_us: tuple[int, ...] = ()

    def times(self, rate_per_s: float, duration_us: int, rng: np.random.Generator, stripe: int = 0) -> Times:
        """Arrival times in [0, duration_us). `stripe` tells the models apart that replay one trace: each
        starts elsewhere in it. A closed loop starts with its clients' first requests."""
        if self.kind == "closed":
            return np.zeros(self.clients, np.int64)
        if rate_per_s <= 0:
            return np.zeros(0, np.int64)
        if self.kind == "poisson":
            times = _renewal(lambda n: rng.exponential(1.0, n), rate_per_s, duration_us)
        elif self.kind == "gamma":
            shape = 1.0 / self.cv**2
            times = _renewal(lambda n: rng.gamma(shape, 1.0 / shape, n), rate_per_s, duration_us)
        elif self.kind == "periodic":
            gap_us = 1e6 / rate_per_s
            times = np.arange(rng.uniform(0, gap_us), duration_us, gap_us)
        elif self.kind == "onoff":
            times = self._bursts(rate_per_s, duration_us, rng)
        else:
            times = self._replay(rate_per_s, duration_us, stripe)
        return times[times < duration_us].astype(np.int64)

    def _bursts(self, rate_per_s: float, duration_us: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Poisson at a higher rate within bursts of exponential length, nothing between them. The rates
        average to rate_per_s over a cycle."""
        factor = (self.on_s + self.off_s) / self.on_s
        pieces = []
        at_us = -rng.uniform(0, self.on_s + self.off_s) * 1e6
        while at_us < duration_us:
            on_us = rng.exponential(self.on_s * 1e6)
            count = rng.poisson(rate_per_s * factor * on_us / 1e6)
            pieces.append(at_us + np.sort(rng.uniform(0, on_us, count)))
            at_us += on_us + rng.exponential(self.off_s * 1e6)
        times = np.concatenate(pieces)
        inside: NDArray[np.float64] = times[times >= 0]
        return inside

    def _replay(self, rate_per_s: float, duration_us: int, stripe: int) -> NDArray[np.float64]:
        """The trace, its time scaled so that its mean rate is rate_per_s, repeated where it is too short."""
        trace = np.asarray(self.trace_us, np.float64)
        span = trace[-1] * trace.size / max(trace.size - 1, 1)
        start = int(trace.size * ((stripe * 0.381966) % 1.0))  # golden section: no two stripes close
        turned = np.concatenate([trace[start:] - trace[start], trace[:start] + span - trace[start]])
        scale = (trace.size / span) * 1e6 / rate_per_s
        turns = int(duration_us / (span * scale)) + 1
        return np.concatenate([(turned + turn * span) * scale for turn in range(turns)])


def _renewal(
    draw: Callable[[int], NDArray[np.float64]], rate_per_s: float, duration_us: int
) -> NDArray[np.float64]:
    """Sums of gaps of mean one, scaled to the rate, until they pass the duration."""
    mean_us = 1e6 / rate_per_s
    expected = duration_us / mean_us
    times: NDArray[np.float64] = np.cumsum(draw(int(expected + 6 * np.sqrt(expected) + 20))) * mean_us
    while times[-1] < duration_us:
        more = times[-1] + np.cumsum(draw(int(expected / 4) + 20)) * mean_us
        times = np.concatenate([times, more])
    return times


def parse_arrivals(text: str, trace_us: tuple[int, ...] = ()) -> Arrivals:
    """The value of --arrivals; the content of a trace file comes in as trace_us. Raises InputError."""
    kind, _, rest = text.partition(":")
    try:
        if kind in ("poisson", "periodic") and not rest:
            return Arrivals(kind="poisson" if kind == "poisson" else "periodic")
        if kind == "gamma":
            return _checked(Arrivals("gamma", cv=float(rest)))
        if kind == "onoff":
            on, _, off = rest.partition(":")
            return _checked(Arrivals("onoff", on_s=float(on), off_s=float(off)))
        if kind == "closed":
            return _checked(Arrivals("closed", clients=int(rest)))
        if kind == "trace" and rest:
            return Arrivals("trace", trace_us=trace_us)
    except ValueError:
        pass
    raise InputError(
        f"arrivals {text!r}: wanted poisson, periodic, gamma:CV, onoff:ON_S:OFF_S, trace:FILE or closed:N"
    )


def _checked(arrivals: Arrivals) -> Arrivals:
    if min(arrivals.cv, arrivals.on_s, arrivals.off_s, arrivals.clients) <= 0 or arrivals.cv > 20:
        raise ValueError
    return arrivals


def parse_trace(text: str, source: str) -> tuple[int, ...]:
    """Offsets in us from a CSV whose first column is a time stamp (ISO date and time, any number of decimals)
    or a number of seconds; a header line is skipped. Raises InputError naming the line."""
    offsets: list[float] = []
    for number, line in enumerate(text.splitlines(), 1):
        field = line.split(",", 1)[0].strip()
        if not field:
            continue
        try:
            offsets.append(_seconds(field))
        except ValueError:
            if number == 1:
                continue
            raise InputError(
                f"{source}: line {number}: {field!r} is neither a time stamp nor seconds"
            ) from None
    if len(offsets) < 2 or max(offsets) <= min(offsets):
        raise InputError(f"{source}: a trace needs at least two requests at different times")
    times = np.sort(np.asarray(offsets))
    return tuple(int(us) for us in np.round((times - times[0]) * 1e6))


def _seconds(field: str) -> float:
    try:
        return float(field)
    except ValueError:
        whole, _, fraction = field.partition(".")
        moment = datetime.fromisoformat(whole)
        return (moment - datetime(1970, 1, 1, tzinfo=moment.tzinfo)).total_seconds() + float(
            f"0.{fraction or 0}"
        )
