"""GPUs that the operator takes out of service: STATE/excluded_gpus.json, read again at every look."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dstack_sched.adapters.json_files import check_version, parse_json, read_text, write_json
from dstack_sched.errors import InputError

FILE_NAME = "excluded_gpus.json"


class GpuExclusions:
    """Indexes or beginnings of UUIDs. `always`: excluded whatever the file says. Errors: InputError."""

    def __init__(self, state: Path, always: Collection[str] = ()) -> None:
        self.path = state / FILE_NAME
        self._always = frozenset(check_names(always))

    def __call__(self) -> frozenset[str]:
        """All that are excluded now. A file that cannot be read excludes nothing more."""
        try:
            return self._always | self.kept()
        except InputError:
            return self._always

    def kept(self) -> frozenset[str]:
        """Those in the file."""
        if not self.path.exists():
            return frozenset()
        found = parse_json(read_text(self.path, "dstackctl gpus --exclude 1"), str(self.path))
        check_version(found, str(self.path), 1, "remove it")
        return frozenset(check_names(found.get("excluded", ())))

    def change(self, exclude: Collection[str], include: Collection[str]) -> None:
        """Add and remove entries."""
        wanted = (self.kept() | frozenset(check_names(exclude))) - frozenset(check_names(include))
        write_json(self.path, {"version": 1, "excluded": sorted(wanted)})


def check_names(names: Collection[str]) -> Collection[str]:
    """Errors: InputError for what is neither an index nor the beginning of a UUID."""
    for name in names:
        if not (isinstance(name, str) and (name.isdigit() or (name.startswith("GPU-") and len(name) > 4))):
            raise InputError(f"{name!r} names no GPU; an index (1) or a UUID (GPU-...) is wanted")
    return names
