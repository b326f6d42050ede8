"""Profiles kept on disk, one file a model and device, so that nothing is measured twice.

Layout: ROOT/<device>/<sha256>.json and ROOT/<device>/corun.json. A device is its name, SMs, driver and
runtime: latencies do not carry over when any of them changes. Files are replaced whole; each point is
stored as soon as it is measured, so a profiler that dies goes on where it was. In the store co-run
members are named by model hash; `export` gives them the names of the day.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dstack_sched.adapters.json_files import write_json
from dstack_sched.adapters.profile_files import (
    VERSION,
    model_json,
    parse_corun,
    parse_device,
    parse_model,
)
from dstack_sched.domain.profile import CorunPoint, Device, ModelProfile, ProfileSet
from dstack_sched.errors import InputError


def model_sha256(model_path: Path) -> str:
    """Hash of an ONNX model with the files that hold its external weights, in the order the graph names them.

    A model without external data has the plain sha256 of its file, as `sha256sum` prints it.
    """
    digest = hashlib.sha256()
    try:
        for path in [model_path, *external_files(model_path)]:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); name an ONNX model file"
        ) from None
    return digest.hexdigest()


def external_files(model_path: Path) -> Iterator[Path]:
    """Files beside the model that hold weights, each once. Errors: InputError when it is not ONNX."""
    import onnx  # slow to import, and only hashing and reading graphs need it

    try:
        model = onnx.load(str(model_path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf raises classes of its own, by version
        raise InputError(f"{model_path}: is not an ONNX model ({str(error).splitlines()[0]})") from None
    seen = set()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in seen:
                seen.add(entry.value)
                yield model_path.parent / entry.value


class FileProfileStore:
    """ports.ProfileStore in a directory, normally STATE/profiles. Errors: InputError for a broken file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, sha256: str, device: Device) -> ModelProfile | None:
        """The profile as far as it is measured; it may hold a single point yet."""
        path = self._folder(device) / f"{sha256}.json"
        body = self._read(path)
        if body is None:
            return None
        model = body.get("model")
        name = model.get("name", "") if isinstance(model, dict) else ""
        return parse_model(str(name), model, str(path), complete=False)

    def put(self, profile: ModelProfile, device: Device) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", profile.sha256):
            raise InputError(
                f"{profile.name}: sha256 {profile.sha256!r} is not a model hash; profile the model file"
            )
        body = {"name": profile.name, **model_json(profile)}
        path = self._folder(device) / f"{profile.sha256}.json"
        write_json(path, {"version": VERSION, "gpu": asdict(device), "model": body})

    def corun(self, device: Device) -> tuple[CorunPoint, ...]:
        path = self._folder(device) / "corun.json"
        body = self._read(path)
        return parse_corun(body.get("corun"), str(path), []) if body else ()

    def put_corun(self, points: Iterable[CorunPoint], device: Device) -> None:
        """Add points (members named by model hash); a newer one replaces an older one of the same setting."""
        kept = {_setting(point): point for point in (*self.corun(device), *points)}
        content = {
            "version": VERSION,
            "gpu": asdict(device),
            "corun": [asdict(point) for point in kept.values()],
        }
        write_json(self._folder(device) / "corun.json", content)

    def export(self, device: Device, hashes: Mapping[str, str]) -> ProfileSet:
        """The named models (name -> sha256) that have a profile, and the co-run points among them."""
        found = {name: self.get(sha256, device) for name, sha256 in hashes.items()}
        models = {name: replace(profile, name=name) for name, profile in found.items() if profile}
        names = {hashes[name]: name for name in models}
        corun = tuple(
            CorunPoint(tuple(replace(member, model=names[member.model]) for member in point.members))
            for point in self.corun(device)
            if all(member.model in names for member in point.members)
        )
        return ProfileSet(device, models, corun)

    def profiles(self) -> Iterator[tuple[Device, ModelProfile]]:
        """Everything stored, in a stable order."""
        for path in sorted(self.root.glob("*/*.json")):
            body = self._read(path)
            if body is None or "model" not in body:
                continue
            device = parse_device(body.get("gpu"), f"{path}: gpu")
            model = self.get(path.stem, device)
            if model:
                yield device, model

    def _folder(self, device: Device) -> Path:
        identity = "\n".join((device.name, str(device.sms), device.driver, device.runtime))
        slug = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()[:40]
        return self.root / f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: the profile store is broken here ({error}); delete this file"
            ) from None
        if not isinstance(body, dict) or body.get("version") != VERSION:
            raise InputError(f"{path}: is not of version {VERSION}; delete this file and profile again")
        return body


def _setting(point: CorunPoint) -> tuple[tuple[str, float, int], ...]:
    return tuple(sorted((member.model, member.gpu_percent, member.batch_size) for member in point.members))
