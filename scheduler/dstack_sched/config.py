"""workload.yaml, parsed once, at the edge, into frozen records; unknown keys are refused.

attainment: 0.99            # optional: share of requests wanted within their SLO
models:
  - name: resnet50
    slo_ms: 25              # null: best effort
    rate_per_s: 400
    weight: 1               # optional
    on_late: serve          # optional: serve | reject
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dstack_sched.domain.workload import ModelDemand, OnLate, Workload
from dstack_sched.errors import InputError

_WORKLOAD_KEYS = ("models", "attainment")
_NEEDED = ("name", "slo_ms", "rate_per_s")
_MODEL_KEYS = (*_NEEDED, "weight", "on_late")


def read_workload(path: Path) -> Workload:
    """The content of a workload.yaml. Errors: InputError, one line that names file, model, key and mend."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a workload.yaml with --workload") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    return parse_workload(text, str(path))


def parse_workload(text: str, source: str) -> Workload:
    """Parse the text of a workload.yaml; `source` is its name in error messages."""
    try:
        raw = yaml.load(text, _StrictLoader)  # noqa: S506  a SafeLoader that refuses duplicate keys
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML: {_one_line(error)}") from None
    root = _mapping(raw, source, "models: [{name, slo_ms, rate_per_s}]")
    _refuse_unknown(root, _WORKLOAD_KEYS, source)
    models = root.get("models")
    if not isinstance(models, list) or not models:
        raise InputError(f"{source}: models: a list with at least one model is wanted")
    demands = tuple(_demand(each, f"{source}: model {i + 1}") for i, each in enumerate(models))
    seen: set[str] = set()
    for demand in demands:
        if demand.name in seen:
            raise InputError(
                f"{source}: model {demand.name} is listed twice; keep one entry and add up the rates"
            )
        seen.add(demand.name)
    attainment = _number(root.get("attainment", 0.99), f"{source}: attainment")
    if not 0 < attainment <= 1:
        raise InputError(f"{source}: attainment is {attainment:g}; a share above 0, at most 1, is wanted")
    return Workload(demands, attainment)


def _demand(raw: Any, where: str) -> ModelDemand:
    entry = _mapping(raw, where, "{name, slo_ms, rate_per_s}")
    name = entry.get("name")
    if isinstance(name, str) and name:
        where = f"{where} ({name})"
    _refuse_unknown(entry, _MODEL_KEYS, where)
    for key in _NEEDED:
        if key not in entry:
            hint = "; null for best effort" if key == "slo_ms" else ""
            raise InputError(f"{where}: {key} is missing{hint}")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: name is {name!r}; the model's name in the repository is wanted")
    slo_ms = None if entry["slo_ms"] is None else _number(entry["slo_ms"], f"{where}: slo_ms")
    if slo_ms is not None and slo_ms <= 0:
        raise InputError(
            f"{where}: slo_ms is {slo_ms:g}; a time above 0 ms is wanted, or null for best effort"
        )
    rate = _number(entry["rate_per_s"], f"{where}: rate_per_s")
    if rate < 0:
        raise InputError(f"{where}: rate_per_s is {rate:g}; 0 or more requests a second are wanted")
    weight = _number(entry.get("weight", 1.0), f"{where}: weight")
    if weight <= 0:
        raise InputError(f"{where}: weight is {weight:g}; a number above 0 is wanted")
    late = entry.get("on_late", OnLate.SERVE.value)
    if late not in tuple(x.value for x in OnLate):
        raise InputError(f"{where}: on_late is {late!r}; serve or reject is wanted")
    return ModelDemand(name, slo_ms, rate, weight, OnLate(late))


def _mapping(raw: Any, where: str, wanted: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: {wanted} is wanted, this is {_kind(raw)}")
    return raw


def _refuse_unknown(entry: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")


def _number(raw: Any, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not math.isfinite(raw):
        raise InputError(f"{where} is {raw!r}; a finite number is wanted")
    return float(raw)


def _kind(raw: Any) -> str:
    return "empty" if raw is None else f"a {type(raw).__name__}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _StrictLoader(yaml.SafeLoader):
    """YAML lets a key be given twice and keeps the last; a workload must not lose a line that way."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    found: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be plain text", key_node.start_mark
            )
        if key in found:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)
