"""What every file in perf/reports has in common: version, command, commit, date, machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "perf" / "reports"
VERSION = 1


def commit() -> str:
    """The commit measured, with "+changes" where tracked files differ from it; "unknown" outside of git.

    $DSTACK_COMMIT names it on a GPU host that gets the working tree without its history.
    """
    named = os.environ.get("DSTACK_COMMIT")
    if named:
        return named
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "backend", "scheduler", "perf/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DSTACK_COMMIT", "unknown")
    return f"{head}+changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """The processor, its cores, memory and load, and the interpreter."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def write_report(path: Path, command: str, figures: Mapping[str, Any]) -> Path:
    """Write `figures` under the common head, whole or not at all; the path written."""
    head = {
        "version": VERSION,
        "command": command,
        "commit": commit(),
        "date": now(),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**head, **figures}, indent=2) + "\n")
    temporary.replace(path)
    return path
