"""The last granted batches, in memory taken at the start: an arbiter that runs for months does not grow."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """One granted batch: who had how much of which GPU, from when to when (CLOCK_MONOTONIC us).

    outcome: "done", "unused" (no row was run), "lease" (share taken back, the batch did not end in time) or
    "left" (the backend unloaded or died).
    """

    sequence: int
    gpu: int
    model: str
    instance: str
    gpu_percent: float
    start_us: int
    end_us: int
    rows: int
    late_rows: int
    batch_size: int
    outcome: str


class IntervalRing:
    """Intervals by their sequence number, which begins at 1; the newest `kept` of them are there.

    A column a field, all of full length from the start; names are references to strings that others hold.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self.next_sequence = 1
        self._numbers = {
            name: array(code, [0]) * kept
            for name, code in (
                ("gpu", "q"), ("gpu_percent", "d"), ("start_us", "q"), ("end_us", "q"), ("rows", "q"),
                ("late_rows", "q"), ("batch_size", "q"),
            )
        }  # fmt: skip
        self._names: dict[str, list[str]] = {name: [""] * kept for name in ("model", "instance", "outcome")}
        self._columns: tuple[Any, ...] = tuple(
            self._numbers.get(name, self._names.get(name)) for name in Interval._fields[1:]
        )

    @property
    def oldest(self) -> int:
        """Sequence number of the oldest that is kept; that of the next one where there is none."""
        return max(1, self.next_sequence - self._kept)

    def append(self, *values: object) -> None:
        """The fields of an Interval behind `sequence`, in its order."""
        slot = self.next_sequence % self._kept
        for column, value in zip(self._columns, values, strict=True):
            column[slot] = value
        self.next_sequence += 1

    def __getitem__(self, sequence: int) -> Interval:
        slot = sequence % self._kept
        return Interval(sequence, *(column[slot] for column in self._columns))

    def ended_since(self, since_us: int) -> int:
        """Sequence number of the first that ended then or later."""
        ends, kept = self._numbers["end_us"], self._kept
        present = range(self.oldest, self.next_sequence)
        return self.oldest + bisect_left(present, since_us, key=lambda sequence: ends[sequence % kept])
