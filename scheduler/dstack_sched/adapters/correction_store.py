"""STATE/corrections.json: how latencies have drifted from the profiles, so that a restart knows it still."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstack_sched.adapters.json_files import parse_json, write_json
from dstack_sched.adapters.profile_files import parse_point
from dstack_sched.domain.profile import Correction, Device
from dstack_sched.errors import DstackError, InputError

FILE_NAME = "corrections.json"
VERSION = 1
log = logging.getLogger("dstack.controller")


class FileCorrectionStore:
    """Corrections by device and model hash. A file that cannot be used is said once and begun anew: what it
    holds can be found out again; one that cannot be written is said, too, and nothing else."""

    def __init__(self, state: Path) -> None:
        self.path = state / FILE_NAME
        self._complained = False

    def read(self, device: Device) -> dict[str, Correction]:
        """sha256 of a model -> its correction on this device."""
        found = {}
        for key, raw in self._all().items():
            name, _, sha256 = key.rpartition(" ")
            if name != _name(device):
                continue
            try:
                found[sha256] = correction_of(raw, f"{self.path}: {sha256[:12]}")
            except InputError as error:
                log.warning("%s; forgotten", error)
        return found

    def write(self, device: Device, corrections: Mapping[str, Correction]) -> None:
        """Replace those of these models (by sha256), keep the others."""
        rows = self._all()
        rows |= {f"{_name(device)} {sha256}": asdict(each) for sha256, each in corrections.items()}
        try:
            write_json(self.path, {"version": VERSION, "models": rows})
            self._complained = False
        except DstackError as error:
            if not self._complained:
                log.warning("%s; drift will have to be found again after a restart", error)
            self._complained = True

    def _all(self) -> dict[str, Any]:
        try:
            root = parse_json(self.path.read_text(encoding="utf-8"), str(self.path))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, DstackError) as error:
            log.warning("%s cannot be read (%s); corrections begin anew", self.path, error)
            return {}
        rows = root.get("models") if isinstance(root, dict) and root.get("version") == VERSION else None
        return dict(rows) if isinstance(rows, dict) else {}


def _name(device: Device) -> str:
    return f"{device.name} {device.sms} {device.driver} {device.runtime}"


def correction_of(raw: Any, where: str) -> Correction:
    """A correction as it is written (its fields by name). Errors: InputError where it is none."""
    try:
        base, scale, points = str(raw["base"]), float(raw["scale"]), raw["points"]
        slowdown = None if raw.get("slowdown") is None else float(raw["slowdown"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: not a correction ({error})") from None
    if not 0 < scale < 1e3 or not 0 <= (slowdown or 0.0) < 1e3 or not isinstance(points, list):
        raise InputError(f"{where}: scale {scale:g}, slowdown {slowdown} or points are out of range")
    return Correction(base, scale, tuple(parse_point(point, where) for point in points), slowdown)
