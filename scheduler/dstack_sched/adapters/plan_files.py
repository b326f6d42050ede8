"""plan.json: written atomically, read strictly. The contract is DESIGN section 5.

Beside the contract's keys a model's row carries `replicas`, the demand it was planned for (slo_ms,
rate_per_s, weight, on_late) and `memory_limit_mb`, and the plan `notes` and `gap`. A reader of version 1 may
ignore them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_sched.adapters.json_files import check_version, parse_json, read_text, write_json
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError

VERSION = 1


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON types, as plan.json holds it. A headroom without limit (no rates) is null."""
    return {
        "version": VERSION,
        "capacity_percent": plan.capacity_percent,
        "gpus": list(plan.gpus),
        "models": {name: _model_json(row) for name, row in plan.models.items()},
        "feasible": plan.feasible,
        "binding": list(plan.binding),
        "headroom": plan.headroom if math.isfinite(plan.headroom) else None,
        "gap": plan.gap,
        "notes": list(plan.notes),
    }


def write_plan(path: Path, plan: Plan) -> None:
    """Write plan.json so that no reader sees half of it. Errors: InputError when it cannot be written."""
    write_json(path, plan_json(plan))


def read_plan(path: Path) -> Plan:
    """The plan in a plan.json. Errors: InputError, one line that names the file, the model and the key."""
    return parse_plan(read_text(path, f"dstackctl plan --out {path}"), str(path))


def parse_plan(text: str, source: str) -> Plan:
    """Parse the text of a plan.json; `source` is its name in error messages."""
    root = _mapping(parse_json(text, source), source)
    check_version(root, source, VERSION, "plan again")
    gpus = _strings(root.get("gpus"), f"{source}: gpus")
    feasible = root.get("feasible")
    if not isinstance(feasible, bool):
        raise InputError(f"{source}: feasible is {feasible!r}; true or false is wanted")
    headroom = root.get("headroom")
    models = _mapping(root.get("models"), f"{source}: models")
    return Plan(
        capacity_percent=_number(root, "capacity_percent", source, above=0.0),
        gpus=gpus,
        models={name: _parse_model(row, f"{source}: {name}", len(gpus)) for name, row in models.items()},
        feasible=feasible,
        binding=_strings(root.get("binding"), f"{source}: binding"),
        headroom=math.inf if headroom is None else _number(root, "headroom", source),
        gap=_number(root, "gap", source, default=0.0),
        notes=_strings(root.get("notes", []), f"{source}: notes"),
    )


def _model_json(row: ModelPlan) -> dict[str, Any]:
    return {
        "gpu": row.gpu,
        "gpu_percent": row.gpu_percent,
        "batch_size": row.batch_size,
        "max_queue_delay_us": row.max_queue_delay_us,
        "latency_ms": row.latency_ms,
        "throughput_per_s": row.throughput_per_s,
        "efficacy": row.efficacy,
        "knee_percent": row.knee_percent,
        "utilization": row.utilization,
        "replicas": [
            {"gpu": each.gpu, "gpu_percent": each.gpu_percent, "rate_per_s": each.rate_per_s}
            for each in row.replicas
        ],
        "slo_ms": row.slo_ms,
        "rate_per_s": row.rate_per_s,
        "weight": row.weight,
        "on_late": row.on_late.value,
        "memory_limit_mb": row.memory_limit_mb,
    }


def _parse_model(raw: Any, where: str, gpus: int) -> ModelPlan:
    row = _mapping(raw, where)
    replicas = row.get("replicas", [])
    if not isinstance(replicas, list):
        raise InputError(f"{where}: replicas must be a list")
    placed = tuple(_parse_replica(each, f"{where}: replica {i + 1}", gpus) for i, each in enumerate(replicas))
    _check_replicas(placed, _percent(row, where), where)
    late = row.get("on_late", OnLate.SERVE.value)
    if late not in tuple(x.value for x in OnLate):
        raise InputError(f"{where}: on_late is {late!r}; serve or reject is wanted")
    return ModelPlan(
        gpu=_gpu(row, where, gpus),
        gpu_percent=_percent(row, where),
        batch_size=_whole(row, "batch_size", where, at_least=1),
        max_queue_delay_us=_whole(row, "max_queue_delay_us", where, at_least=0),
        latency_ms=_number(row, "latency_ms", where, above=0.0),
        throughput_per_s=_number(row, "throughput_per_s", where),
        efficacy=_number(row, "efficacy", where),
        knee_percent=_number(row, "knee_percent", where),
        utilization=_number(row, "utilization", where),
        replicas=placed,
        slo_ms=None if row.get("slo_ms") is None else _number(row, "slo_ms", where, above=0.0),
        rate_per_s=_number(row, "rate_per_s", where, default=0.0),
        weight=_number(row, "weight", where, default=1.0, above=0.0),
        on_late=OnLate(late),
        memory_limit_mb=(
            None if row.get("memory_limit_mb") is None else _whole(row, "memory_limit_mb", where, at_least=1)
        ),
    )


def _check_replicas(replicas: tuple[Replica, ...], gpu_percent: float, where: str) -> None:
    """One replica a GPU, all with the model's GPU%: what a config can state."""
    if len({each.gpu for each in replicas}) < len(replicas):
        raise InputError(f"{where}: two replicas on one GPU; one a GPU is wanted")
    if any(each.gpu_percent != gpu_percent for each in replicas):
        raise InputError(
            f"{where}: replicas with another gpu_percent than the model's {gpu_percent:g}; a config "
            "states one GPU% for all, plan again with dstackctl plan"
        )


def _parse_replica(raw: Any, where: str, gpus: int) -> Replica:
    each = _mapping(raw, where)
    return Replica(_gpu(each, where, gpus), _percent(each, where), _number(each, "rate_per_s", where))


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: an object is wanted; plan again with dstackctl plan")
    return raw


def _strings(raw: Any, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(each, str) for each in raw):
        raise InputError(f"{where}: a list of texts is wanted; plan again with dstackctl plan")
    return tuple(raw)


def _number(
    row: Mapping[str, Any], key: str, where: str, *, default: float | None = None, above: float | None = None
) -> float:
    value = row.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {key} is {value!r}; a finite number is wanted")
    if value < 0 or (above is not None and value <= above):
        raise InputError(
            f"{where}: {key} is {value:g}; {'above' if above is not None else 'at least'} 0 is wanted"
        )
    return float(value)


def _percent(row: Mapping[str, Any], where: str) -> float:
    value = _number(row, "gpu_percent", where, above=0.0)
    if value > 100:
        raise InputError(f"{where}: gpu_percent is {value:g}; at most 100 is wanted")
    return value


def _whole(row: Mapping[str, Any], key: str, where: str, *, at_least: int) -> int:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"{where}: {key} is {value!r}; a whole number of at least {at_least} is wanted")
    return value


def _gpu(row: Mapping[str, Any], where: str, gpus: int) -> int:
    """An index into `gpus`; -1 is the CPU of a host without a GPU."""
    value = _whole(row, "gpu", where, at_least=-1)
    if value >= max(1, gpus):
        raise InputError(f"{where}: gpu is {value}, but the plan lists {gpus} GPU(s)")
    return value
