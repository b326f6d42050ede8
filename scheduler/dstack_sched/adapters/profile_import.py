"""Measurements of other tools as profile points: Triton Model Analyzer's and perf_analyzer's CSV.

Both measure a served model, queue and network included, so rows with more than one request at a time, or
with more than MAX_QUEUE_FRACTION of the median spent in the server's queue, are left out. GPU% is not in
these files: they are measured on the whole GPU unless the caller says otherwise.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.errors import InputError

US_PER_MS = 1000.0
MAX_QUEUE_FRACTION = 0.1


@dataclass(frozen=True)
class Imported:
    """points: by GPU% and batch, each once; skipped: rows left out because requests queued in them."""

    points: tuple[ProfilePoint, ...]
    skipped: int


def read_csv(path: Path, model: str, gpu_percent: float = 100.0, batch_size: int = 1) -> Imported:
    """Points of one model from either tool's CSV, told apart by their columns.

    model: as the file's column Model names it (a perf_analyzer file does not say).
    batch_size: of a perf_analyzer file, which does not say (its option -b).
    Errors: InputError naming the file, the row and the column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restkey="", restval=""))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a CSV of Model Analyzer or perf_analyzer") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; name a CSV of Model Analyzer or perf_analyzer")
    columns = set(rows[0])
    if "Inferences/Second" in columns:
        return _points(_from_perf_analyzer(path, rows, gpu_percent, batch_size), path)
    if "Model" in columns and any(name.startswith("p99 Latency") for name in columns):
        return _points(_from_model_analyzer(path, rows, model, gpu_percent), path)
    raise InputError(f"{path}: neither Model Analyzer's metrics-model CSV nor perf_analyzer's (-f) CSV")


@dataclass(frozen=True)
class _Row:
    point: ProfilePoint
    queued: bool


def _from_perf_analyzer(
    path: Path, rows: Iterable[Mapping[str, str]], gpu_percent: float, batch_size: int
) -> Iterable[_Row]:
    for number, row in enumerate(rows, start=2):
        where = f"{path} row {number}"
        p50, p99 = (_number(row, f"{q} latency", where) / US_PER_MS for q in ("p50", "p99"))
        queue_ms = float(row.get("Server Queue") or 0) / US_PER_MS
        queued = _concurrency(row, where) > 1 or queue_ms > MAX_QUEUE_FRACTION * p50
        yield _Row(ProfilePoint(gpu_percent, batch_size, p50, max(p50, p99), 1), queued)


def _from_model_analyzer(
    path: Path, rows: Iterable[Mapping[str, str]], model: str, gpu_percent: float
) -> Iterable[_Row]:
    seen = set()
    for number, row in enumerate(rows, start=2):
        where = f"{path} row {number}"
        seen.add(row["Model"])
        if row["Model"] != model:
            continue
        p99 = _number(row, "p99 Latency (ms)", where)
        # The median is in the file only where it was asked for; the mean stands in for it, at most p99.
        middle = next((c for c in ("p50 Latency (ms)", "Avg Latency (ms)") if row.get(c)), None)
        p50 = min(p99, _number(row, middle, where)) if middle else p99
        batch = int(_number(row, "Batch", where))
        yield _Row(ProfilePoint(gpu_percent, batch, p50, p99, 1), _concurrency(row, where) > 1)
    if model not in seen:
        raise InputError(f"{path}: no rows of {model!r}; it has {', '.join(sorted(seen))}")


def _points(rows: Iterable[_Row], path: Path) -> Imported:
    """One point a GPU% and batch: the fastest of the rows that were measured one batch at a time."""
    kept: dict[tuple[float, int], ProfilePoint] = {}
    skipped = 0
    for row in rows:
        key = (row.point.gpu_percent, row.point.batch_size)
        if row.queued:
            skipped += 1
        elif key not in kept or row.point.latency_ms_p50 < kept[key].latency_ms_p50:
            kept[key] = row.point
    if not kept:
        raise InputError(f"{path}: requests queued in every row; measure with one client (concurrency 1)")
    return Imported(tuple(kept[key] for key in sorted(kept)), skipped)


def _concurrency(row: Mapping[str, str], where: str) -> int:
    return int(_number(row, "Concurrency", where)) if row.get("Concurrency") else 1


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    text = (row.get(column) or "").replace(",", "").strip()
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{where}: column {column!r} holds {text!r}, a number is wanted") from None
    if not 0 < value < float("inf"):
        raise InputError(f"{where}: column {column!r} is {text}, it must be above 0 and finite")
    return value
