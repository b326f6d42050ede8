"""PlanChanged as plain JSON types, for the wire and for the arbiter's plan file, and back with strict checks.

    {"capacity_percent": 200.0, "models": [{"name": ..., every field of EngineModel}]}

Latencies are rounded to 0.1 microseconds, so that the tables of 64 models fit into one packet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError

MAX_CAPACITY_PERCENT = 600.0
MAX_MODELS = 256
MAX_BATCH_SIZE = 1 << 20
MAX_GPUS = 64
MAX_TABLE_SIDE = 128
MAX_LATENCY_MS = 3.6e6
MAX_SLO_US = 3_600_000_000
MAX_NAME_CHARACTERS = 512
CPU_INDEX = -1

_PLAN_KEYS = frozenset(field.name for field in dataclasses.fields(PlanChanged))
_MODEL_KEYS = frozenset(field.name for field in dataclasses.fields(EngineModel))
_MODEL_NEEDED = frozenset(
    field.name for field in dataclasses.fields(EngineModel) if field.default is dataclasses.MISSING
)


def gpus_to_json(plans: Mapping[int, PlanChanged]) -> dict[str, Any]:
    """GPU index -> plan, as the "gpus" object of a Control message."""
    return {str(gpu): plan_to_json(plan) for gpu, plan in sorted(plans.items())}


def gpus_from_json(raw: object, where: str = "gpus") -> dict[int, PlanChanged]:
    """The plans of a "gpus" object. Errors: InputError that names the place and what is wanted."""
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{where}: an object of GPU index -> plan is wanted, with at least one GPU")
    plans: dict[int, PlanChanged] = {}
    for key, plan in raw.items():
        gpu = gpu_index(key, where)
        if gpu in plans:
            raise InputError(f"{where}: GPU {gpu} is there twice")
        plans[gpu] = plan_from_json(plan, f"{where}.{gpu}")
    return plans


def gpu_index(key: object, where: str) -> int:
    """-1 (CPU) or a GPU's index, given as a JSON object key. Errors: InputError."""
    text = key if isinstance(key, str) and len(key) <= 4 else ""
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
        raise InputError(f"{where}: {str(key)[:40]!r} is no GPU index")
    if not CPU_INDEX <= int(text) < MAX_GPUS:
        raise InputError(f"{where}: GPU index {text} is not in {CPU_INDEX}..{MAX_GPUS - 1}")
    return int(text)


def plan_to_json(plan: PlanChanged) -> dict[str, Any]:
    """The plan of one GPU in plain JSON types; plan_from_json gives it back (latencies to 0.1 us)."""
    return {
        "capacity_percent": plan.capacity_percent,
        "models": [_model_to_json(model) for model in plan.models],
    }


def _model_to_json(model: EngineModel) -> dict[str, Any]:
    row = dataclasses.asdict(model)
    row["on_late"] = model.on_late.value
    row["latency_ms"] = [[max(round(cell, 4), 0.0001) for cell in line] for line in model.latency_ms]
    return row


def plan_from_json(raw: object, where: str = "plan") -> PlanChanged:
    """The plan of one GPU. Errors: InputError that names the place and what is wanted."""
    body = _object(raw, where, _PLAN_KEYS, _PLAN_KEYS)
    capacity = _number(body, "capacity_percent", where, 0, MAX_CAPACITY_PERCENT)
    rows = _list(body["models"], f"{where}.models", MAX_MODELS)
    models = tuple(_model(row, f"{where}.models[{i}]") for i, row in enumerate(rows))
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}.models: {twice!r} is there twice")
    return PlanChanged(capacity, models)


def _model(raw: object, where: str) -> EngineModel:
    body = _object(raw, where, _MODEL_KEYS, _MODEL_NEEDED)
    name = body["name"]
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise InputError(f"{where}.name: a name of 1 to {MAX_NAME_CHARACTERS} printable characters is wanted")
    where = f"{where} ({name})"
    percents = _ascending(body.get("gpu_percents", ()), f"{where}.gpu_percents", 100.0)
    batches = _ascending(body.get("batch_sizes", ()), f"{where}.batch_sizes", MAX_BATCH_SIZE)
    if any(batch != int(batch) for batch in batches):
        raise InputError(f"{where}.batch_sizes: whole numbers are wanted")
    return EngineModel(
        name=name,
        gpu_percent=_number(body, "gpu_percent", where, 0, 100.0),
        batch_size=_integer(body, "batch_size", where, 1, MAX_BATCH_SIZE),
        slo_us=_integer(body, "slo_us", where, 0, MAX_SLO_US),
        weight=_number(body, "weight", where, 0, 1e6),
        on_late=_on_late(body["on_late"], where),
        knee_percent=_number(body, "knee_percent", where, 0, 100.0),
        gpu_percents=percents,
        batch_sizes=tuple(int(batch) for batch in batches),
        latency_ms=_table(body.get("latency_ms", ()), f"{where}.latency_ms", len(percents), len(batches)),
        interference_per_percent=_number(body, "interference_per_percent", where, None, 1.0, default=0.0),
        interference_exponent=_number(body, "interference_exponent", where, 0, 10.0, default=1.0),
    )


def _on_late(raw: object, where: str) -> OnLate:
    try:
        return OnLate(raw)
    except ValueError:
        choices = ", ".join(choice.value for choice in OnLate)
        raise InputError(f"{where}.on_late: {str(raw)[:40]!r} is none of {choices}") from None


def _table(raw: object, where: str, rows: int, columns: int) -> tuple[tuple[float, ...], ...]:
    lines = _list(raw, where, MAX_TABLE_SIDE)
    if not lines and not (rows and columns):
        return ()
    if len(lines) != rows or any(
        not isinstance(line, list | tuple) or len(line) != columns for line in lines
    ):
        raise InputError(f"{where}: {rows} rows (gpu_percents) of {columns} (batch_sizes) are wanted")
    cells = tuple(tuple(_finite(cell, where) for cell in line) for line in lines)
    if any(not 0 < cell <= MAX_LATENCY_MS for line in cells for cell in line):
        raise InputError(f"{where}: latencies must be in (0, {MAX_LATENCY_MS:g}] ms")
    return cells


def _ascending(raw: object, where: str, high: float) -> tuple[float, ...]:
    values = tuple(_finite(value, where) for value in _list(raw, where, MAX_TABLE_SIDE))
    if any(not 0 < value <= high for value in values):
        raise InputError(f"{where}: values must be in (0, {high:g}]")
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise InputError(f"{where}: values must ascend")
    return values


def _object(raw: object, where: str, known: frozenset[str], needed: frozenset[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: an object is wanted")
    unknown, missing = sorted(raw.keys() - known), sorted(needed - raw.keys())
    if unknown or missing:
        what = f"unknown key {unknown[0][:40]!r}" if unknown else f"{missing[0]!r} is missing"
        raise InputError(f"{where}: {what}; the keys are {', '.join(sorted(known))}")
    return raw


def _list(raw: object, where: str, most: int) -> list[Any] | tuple[Any, ...]:
    if not isinstance(raw, list | tuple) or len(raw) > most:
        raise InputError(f"{where}: a list of at most {most} is wanted")
    return raw


def _number(
    body: dict[str, Any], key: str, where: str, above: float | None, high: float, default: float | None = None
) -> float:
    """A number in (above, high]; above None: in [0, high]."""
    value = _finite(body.get(key, default), f"{where}.{key}")
    if value > high or value < 0 or (above is not None and value <= above):
        low = "[0" if above is None else f"({above:g}"
        raise InputError(f"{where}.{key}: {value:g} is not in {low}, {high:g}]")
    return value


def _integer(body: dict[str, Any], key: str, where: str, low: int, high: int) -> int:
    value = body[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{where}.{key}: a whole number in [{low}, {high}] is wanted")
    return value


def _finite(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{where}: a number is wanted, not {str(value)[:40]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{where}: a finite number is wanted")
    return number
