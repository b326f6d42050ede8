"""perf_analyzers that take no fresh memory while they send (steady.c), where there is a C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("steady.c")
SHARED_MEMORY = Path("/dev/shm")
TOTAL_MB = 4096  # for all perf_analyzers of a cell
MIB = bytes(1 << 20)
COMPILE_LIMIT_S = 60.0


class SteadyMemory:
    """A context manager: `environment(processes)` is for that many perf_analyzers at a time, {} without a
    compiler. The memory is taken then, and given back at the end."""

    def __init__(self, directory: Path) -> None:
        self._library = directory / "steady.so"
        self._files = SHARED_MEMORY / f"dstack-steady-{os.getpid()}-"
        self.works = False

    def __enter__(self) -> SteadyMemory:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is not None:
            made = subprocess.run(
                [compiler, "-O2", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE)],
                capture_output=True, timeout=COMPILE_LIMIT_S,
            )  # fmt: skip
            self.works = made.returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._files.parent.glob(self._files.name + "*"):
            each.unlink(missing_ok=True)

    def environment(self, processes: int) -> dict[str, str]:
        if not self.works:
            return {}
        size_mb = TOTAL_MB // max(1, processes)
        for number in range(processes):
            path = Path(f"{self._files}{number}")
            with path.open("ab", buffering=0) as file:
                for _ in range(file.tell() >> 20, size_mb):
                    file.write(MIB)  # here, not in the first run
        return {
            "LD_PRELOAD": str(self._library), "STEADY_FILES": str(self._files), "STEADY_MB": str(size_mb)
        }  # fmt: skip
