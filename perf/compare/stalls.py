"""Moments in which the machine itself stalls, seen by a process that has nothing to do with serving.

A virtual machine's cores are not always there: a process that only sleeps is then woken milliseconds late.
Requests of such moments say nothing about how models share a GPU, so they are left out of a trial, those in
time and those late alike, and how much of it that is is told. On a machine without such stalls nothing is
left out. The probe touches no memory: on such a machine that alone makes stalls (decision 0123).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

WATCH = Path(__file__).with_name("stall_watch.py")
BEFORE_S, AFTER_S = 0.002, 0.015  # what waited meanwhile is worked off
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
        seen = np.array(json.loads(told or "[]"), dtype=float).reshape(-1, 2)
        self.stalls_s = seen + np.array([-BEFORE_S, AFTER_S])


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
