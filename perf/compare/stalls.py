"""Moments in which the machine itself stalls, seen by a process that has nothing to do with serving.

Seen on the virtual machines of H100s: for 50 to 250 ms every second and a half, with nothing else running
too, a process that touches 600 KB of fresh memory takes 7 ms for it instead of 0.4, and of models that take
no time at all just the requests of these moments are late: 493 of 493 that took over 8 ms (decision 0123).
They say nothing about how models share a GPU, so they are left out of a trial, those in time and those late
alike, and how much of it that is is told. On a machine without such stalls nothing is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WATCH = Path(__file__).with_name("stall_watch.py")
MOST_LEFT_OUT = 0.5  # of a trial
APART_S = 0.12  # two of them nearer than this are one: it comes and goes
BEFORE_S, AFTER_S = 0.005, 0.015
WORK_OFF = 1.0  # what waited meanwhile is worked off: as long as the stall was, at half load
END_LIMIT_S = 5.0


class StallProbe:
    """A context manager around a stretch of load; `stalls_s` holds, behind it, the stalls seen: wall-clock
    seconds, shape (stalls, 2), with what belongs to them on either side."""

    def __init__(self) -> None:
        self.stalls_s = np.empty((0, 2))

    def __enter__(self) -> StallProbe:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(WATCH)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it watches
        return self

    def __exit__(self, *_: object) -> None:
        try:
            told, _stderr = self._process.communicate("", END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            told, _stderr = self._process.communicate()
        self.stalls_s = stretches_of(json.loads(told or "[]"))


def stretches_of(seen_s: Sequence[tuple[float, float]]) -> np.ndarray:
    """What is to be left out for what was seen, [since_s, until_s] in order of time; shape (stretches, 2)."""
    joined: list[list[float]] = []
    for since_s, until_s in seen_s:
        if joined and since_s - joined[-1][1] < APART_S:
            joined[-1][1] = max(joined[-1][1], until_s)
        else:
            joined.append([since_s, until_s])
    found = np.array(joined, dtype=float).reshape(-1, 2)
    length_s = found[:, 1] - found[:, 0]
    found[:, 0] -= BEFORE_S
    found[:, 1] += AFTER_S + WORK_OFF * length_s
    return found


def outside(sent_s: np.ndarray, done_s: np.ndarray, stalls_s: np.ndarray) -> np.ndarray:
    """Whether each request lies outside of all stalls, shape (requests,)."""
    kept = np.ones(sent_s.size, dtype=bool)
    for since_s, until_s in stalls_s:
        kept &= (done_s < since_s) | (sent_s > until_s)
    return kept


def length_s(stalls_s: np.ndarray) -> float:
    """Seconds within any of the stalls, shape (stalls, 2)."""
    total, end_s = 0.0, -np.inf
    for since_s, until_s in sorted(stalls_s.tolist()):
        total += max(0.0, until_s - max(since_s, end_s))
        end_s = max(end_s, until_s)
    return total
