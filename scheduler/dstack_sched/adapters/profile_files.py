"""profiles.json: what was measured about models on one device, read strictly and written atomically.

The contract is DESIGN section 5. Keys that the contract does not name may stand beside and are ignored;
a key that it does name must be right, and the first thing wrong is reported as one line that names the
file, the model, the point and the mend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dstack_sched.adapters.json_files import check_version, parse_json, read_text, write_json
from dstack_sched.domain.order import MONOTONE_TOLERANCE, non_monotone
from dstack_sched.domain.profile import (
    CorunMember,
    CorunPoint,
    Device,
    Knee,
    LatencyFit,
    ModelProfile,
    ProfilePoint,
    ProfileSet,
)
from dstack_sched.errors import InputError

VERSION = 1
MIN_POINTS = 2
# The last ones: a report of how the profiles were made may stand in the same file.
KNOWN_KEYS = frozenset(
    {
        "version",
        "gpu",
        "models",
        "corun",
        "note",
        "profiling",
        "command",
        "commit",
        "date",
        "machine",
        "figures",
    }
)


class ProfileFile(NamedTuple):
    """A file's content and, one line each, the parts of it that were left out."""

    profiles: ProfileSet
    notes: tuple[str, ...]


def read_profiles(path: Path) -> ProfileSet:
    """The profiles in a profiles.json. Errors: InputError, one line, for a file that cannot be used."""
    return read_profile_file(path).profiles


def read_profile_file(path: Path) -> ProfileFile:
    """As read_profiles, with a note for each part of the file that was left out."""
    return parse_profiles(read_text(path, f"dstackctl profile MODEL --out {path}"), str(path))


def parse_profiles(text: str, source: str) -> ProfileFile:
    """Parse the text of a profiles.json; `source` is its name in error messages."""
    root = _mapping(parse_json(text, source), source)
    check_version(root, source, VERSION, "profile again")
    device = parse_device(root.get("gpu"), f"{source}: gpu")
    raw_models = _mapping(root.get("models"), f"{source}: models")
    if not raw_models:
        raise InputError(f"{source}: models is empty; profile at least one model")
    models = {name: parse_model(name, body, f"{source}: {name}") for name, body in raw_models.items()}
    notes: list[str] = []
    corun = parse_corun(root.get("corun"), source, notes)
    for key in sorted(set(root) - KNOWN_KEYS):
        notes.append(f"{source}: {key} is not part of the contract and was left out")
    return ProfileFile(ProfileSet(device, models, corun), tuple(notes))


def parse_device(raw: Any, where: str) -> Device:
    """The `gpu` object of a profiles.json."""
    body = _mapping(raw, where)
    return Device(
        name=_text(body, "name", where),
        sms=_whole(body, "sms", where, at_least=1),
        memory_bytes=_whole(body, "memory_bytes", where, at_least=1),
        driver=_text(body, "driver", where),
        runtime=_text(body, "runtime", where),
    )


def parse_model(name: str, raw: Any, where: str, *, complete: bool = True) -> ModelProfile:
    """One entry of `models`. `complete`: check the points against each other too (not while measuring)."""
    body = _mapping(raw, where)
    points = tuple(
        parse_point(point, f"{where} point {i + 1}") for i, point in enumerate(_items(body, "points", where))
    )
    if complete:
        check_points(points, where)
    levels = body.get("levels") or ()
    if not isinstance(levels, Sequence) or isinstance(levels, str):
        raise InputError(f"{where}: levels must be a list of GPU percentages")
    return ModelProfile(
        name=name,
        sha256=_text(body, "sha256", where) if "sha256" in body else "",
        memory_bytes=_whole(body, "memory_bytes", where, at_least=0) if "memory_bytes" in body else 0,
        points=points,
        fit=_parse_fit(body.get("fit"), f"{where} fit"),
        knee=_parse_knee(body.get("knee"), f"{where} knee"),
        levels=tuple(_percent({"level": level}, "level", where) for level in levels),
    )


def parse_point(raw: Any, where: str) -> ProfilePoint:
    """One measured point; latencies are finite and above 0, and p99 is not below p50."""
    body = _mapping(raw, where)
    point = ProfilePoint(
        gpu_percent=_percent(body, "gpu_percent", where),
        batch_size=_whole(body, "batch_size", where, at_least=1),
        latency_ms_p50=_positive(body, "latency_ms_p50", where),
        latency_ms_p99=_positive(body, "latency_ms_p99", where),
        samples=_whole(body, "samples", where, at_least=1),
    )
    if point.latency_ms_p99 < point.latency_ms_p50:
        raise InputError(
            f"{where}: latency_ms_p99 {point.latency_ms_p99:g} is below"
            f" latency_ms_p50 {point.latency_ms_p50:g}; measure this point again"
        )
    return point


def check_points(points: Sequence[ProfilePoint], where: str) -> None:
    """Enough points, none twice, and monotone within MONOTONE_TOLERANCE. Errors: InputError."""
    if len(points) < MIN_POINTS:
        raise InputError(
            f"{where}: has {len(points)} point{'' if len(points) == 1 else 's'}, at least {MIN_POINTS}"
            " (GPU%, batch) points are needed; profile it again"
        )
    seen = set()
    for point in points:
        if (key := (point.gpu_percent, point.batch_size)) in seen:
            raise InputError(f"{where}: GPU% {key[0]:g}, batch {key[1]} stands there twice; keep one")
        seen.add(key)
    wrong = non_monotone(points)
    if wrong:
        slow, fast = wrong[0]
        raise InputError(
            f"{where}: not monotone: {slow.latency_ms_p50:g} ms at GPU% {slow.gpu_percent:g},"
            f" batch {slow.batch_size} but {fast.latency_ms_p50:g} ms at GPU% {fast.gpu_percent:g},"
            f" batch {fast.batch_size} (over {MONOTONE_TOLERANCE:.0%} off); measure again on a quiet device"
        )


def check_device(profiles: ProfileSet, served_on: str, source: str) -> None:
    """Refuse profiles of another device than that: latencies do not carry over. Errors: InputError."""
    if profiles.device.name != served_on:
        raise InputError(
            f"{source}: measured on {profiles.device.name}, the plan is for {served_on};"
            " profile on the device that serves"
        )


def check_models(profiles: ProfileSet, hashes: Mapping[str, str], source: str) -> None:
    """Refuse profiles of other weights or another graph than the model served (one without a hash passes).

    hashes: model -> sha256 of the file that is served. Errors: InputError.
    """
    for model, sha256 in hashes.items():
        profile = profiles.models.get(model)
        if profile is not None and profile.sha256 and profile.sha256 != sha256:
            raise InputError(
                f"{source}: {model} was measured with another model file (sha256 {profile.sha256[:12]}...,"
                f" served: {sha256[:12]}...); profile it again"
            )


def profiles_json(profiles: ProfileSet) -> dict[str, Any]:
    """The JSON object of a profiles.json, points ordered by batch and GPU%."""
    content: dict[str, Any] = {
        "version": VERSION,
        "gpu": asdict(profiles.device),
        "models": {name: model_json(model) for name, model in profiles.models.items()},
    }
    if profiles.corun:
        content["corun"] = [asdict(point) for point in profiles.corun]
    return content


def model_json(model: ModelProfile) -> dict[str, Any]:
    """One entry of `models`."""
    body = asdict(model)
    del body["name"]
    body["points"] = sorted(body["points"], key=lambda point: (point["batch_size"], point["gpu_percent"]))
    for key in ("fit", "knee", "levels"):
        if not body[key]:
            del body[key]
    return body


def write_profiles(path: Path, profiles: ProfileSet) -> None:
    """Write a profiles.json whole or not at all. Errors: InputError when the place cannot be written."""
    write_json(path, profiles_json(profiles))


def _parse_fit(raw: Any, where: str) -> LatencyFit | None:
    if raw is None:
        return None
    body = _mapping(raw, where)
    return LatencyFit(**{key: _not_negative(body, key, where) for key in LatencyFit.__slots__})


def _parse_knee(raw: Any, where: str) -> Knee | None:
    if raw is None:
        return None
    body = _mapping(raw, where)
    return Knee(_percent(body, "gpu_percent", where), _whole(body, "batch_size", where, at_least=1))


def parse_corun(raw: Any, source: str, notes: list[str]) -> tuple[CorunPoint, ...]:
    """Co-run points as we write them ({"members": [...]}) or as a table (lists beside `models`)."""
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise InputError(f"{source}: corun must be a list")
    points = []
    for index, entry in enumerate(raw):
        where = f"{source}: corun {index + 1}"
        body = _mapping(entry, where)
        if "members" in body:
            members = tuple(_parse_member(member, where) for member in _items(body, "members", where))
        elif str(body.get("setting", "MPS")) == "MPS" and isinstance(body.get("throughput_per_s"), list):
            members = _parse_table_members(body, where)
        else:
            notes.append(
                f"{where}: not one MPS measurement a model, left out ({body.get('setting', 'no setting')})"
            )
            continue
        if len(members) < 2:
            raise InputError(f"{where}: needs at least two models side by side")
        points.append(CorunPoint(members))
    return tuple(points)


def _parse_member(raw: Any, where: str) -> CorunMember:
    body = _mapping(raw, where)
    return CorunMember(
        model=_text(body, "model", where),
        gpu_percent=_percent(body, "gpu_percent", where),
        batch_size=_whole(body, "batch_size", where, at_least=1),
        latency_ms_p50=_positive(body, "latency_ms_p50", where),
        throughput_per_s=_positive(body, "throughput_per_s", where),
    )


def _parse_table_members(body: Mapping[str, Any], where: str) -> tuple[CorunMember, ...]:
    models = _items(body, "models", where)
    latencies, throughputs = _items(body, "latency_ms_p50", where), _items(body, "throughput_per_s", where)
    if not len(models) == len(latencies) == len(throughputs):
        raise InputError(f"{where}: models, latency_ms_p50 and throughput_per_s must be of one length")
    shared = {"gpu_percent": body.get("gpu_percent"), "batch_size": body.get("batch_size")}
    return tuple(
        _parse_member(
            {**shared, "model": model, "latency_ms_p50": latency, "throughput_per_s": throughput}, where
        )
        for model, latency, throughput in zip(models, latencies, throughputs, strict=True)
    )


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(
            f"{where}: {'is missing' if raw is None else 'is not an object'}; see the profiles.json contract"
        )
    return raw


def _items(body: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} must be a list")
    return value


def _text(body: Mapping[str, Any], key: str, where: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be a text, it is {value!r}")
    return value


def _number(body: Mapping[str, Any], key: str, where: str) -> float:
    value = body.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{where}: {key} must be a number, it is {value!r}")
    if not math.isfinite(value):
        raise InputError(f"{where}: {key} is {value}, not a finite number; measure this point again")
    return float(value)


def _positive(body: Mapping[str, Any], key: str, where: str) -> float:
    value = _number(body, key, where)
    if value <= 0:
        raise InputError(f"{where}: {key} is {value:g}, it must be above 0")
    return value


def _not_negative(body: Mapping[str, Any], key: str, where: str) -> float:
    value = _number(body, key, where)
    if value < 0:
        raise InputError(f"{where}: {key} is {value:g}, it must not be negative")
    return value


def _percent(body: Mapping[str, Any], key: str, where: str) -> float:
    value = _number(body, key, where)
    if not 0 < value <= 100:
        raise InputError(f"{where}: {key} is {value:g}, a GPU% lies above 0 and at most at 100")
    return value


def _whole(body: Mapping[str, Any], key: str, where: str, *, at_least: int) -> int:
    value = _number(body, key, where)
    if value != int(value) or value < at_least:
        raise InputError(f"{where}: {key} is {value:g}, it must be a whole number of at least {at_least}")
    return int(value)
