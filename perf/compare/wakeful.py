"""perf_analyzers that do not miss their start (wakeful.c), where there is a C compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("wakeful.c")
COMPILE_LIMIT_S = 60.0


def wakeful_environment(directory: Path) -> dict[str, str]:
    """What perf_analyzers are to find in their environment; {} where nothing could be compiled."""
    library = directory.absolute() / "wakeful.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    made = subprocess.run(command, capture_output=True, timeout=COMPILE_LIMIT_S)
    return {"LD_PRELOAD": str(library)} if made.returncode == 0 else {}
