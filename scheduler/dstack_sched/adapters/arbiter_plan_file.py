"""Each GPU's last plan as a JSON file, so that an arbiter comes back with it before the controller does."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from dstack_sched.domain.event import PlanChanged
from dstack_sched.domain.json_form import gpus_from_json, gpus_to_json
from dstack_sched.errors import InputError

log = logging.getLogger("dstack.arbiter")

VERSION = 1
MAX_FILE_BYTES = 16 * 1024 * 1024


class ArbiterPlanFile:
    """{"version": 1, "gpus": {INDEX: plan}} at `path`. A file that cannot be used is set aside, not fatal:
    the arbiter must come up, and the controller sends its plan again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Mapping[int, PlanChanged]:
        """The plans; empty where there is no file or it cannot be used (logged, kept beside as *.bad)."""
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except (OSError, InputError) as error:
            log.warning("kept plan %s is not used: %s", self.path, error)
            try:
                self.path.replace(self.path.with_name(self.path.name + ".bad"))
            except OSError as rename_error:
                log.warning("%s: %s", self.path, rename_error)
            return {}

    def _read(self) -> Mapping[int, PlanChanged]:
        with self.path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InputError(f"larger than {MAX_FILE_BYTES} bytes")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from None
        if not isinstance(body, dict) or body.get("version") != VERSION:
            raise InputError(f"version {VERSION} is wanted")
        return gpus_from_json(body.get("gpus"))

    def save(self, plans: Mapping[int, PlanChanged]) -> bool:
        """Replace the file whole. False (logged) where it cannot be written; the old file then stays.

        No fsync: it would stall the grants, and what it guards against, a crash of the host, ends the
        backends too; the controller then sends the plan again.
        """
        text = json.dumps({"version": VERSION, "gpus": gpus_to_json(plans)}, separators=(",", ":"))
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            log.warning("plan is not kept at %s: %s", self.path, error.strerror)
            temporary.unlink(missing_ok=True)
            return False
        return True
