#!/usr/bin/env python3
"""Put perf_analyzer into the running environment, as <venv>/bin/perf_analyzer. Idempotent.

The program comes out of the tritonclient 2.48.0 wheel; it wants libb64 and the CUDA runtime, of which the
nvidia-pytriton wheel carries copies. Not the `perf-analyzer` package: it needs glibc 2.38, and its 2.60 keeps
and exports every value of every input, 2.4 MB of memory for an image of 150 KB (decision 0121).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

WHEEL = "tritonclient==2.48.0"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
WRAPPER = """#!/bin/sh
LD_LIBRARY_PATH="{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}" exec "{program}" "$@"
"""


def pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments], check=True
    )


def works(program: Path) -> bool:
    """Whether it starts: all libraries are there. (Its --help exits with 2.)"""
    if not program.exists():
        return False
    run = subprocess.run([str(program), "--help"], capture_output=True, text=True)
    return "--concurrency-range" in run.stdout + run.stderr


def from_client_wheel(site: Path, home: Path) -> Path:
    shutil.rmtree(home, ignore_errors=True)
    (home / "lib").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip("download", "--no-deps", "-d", downloads, WHEEL)
        with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("/data/bin/perf_analyzer"))
            program = home / "perf_analyzer"
            program.write_bytes(wheel.read(member))
    program.chmod(0o755)
    for wanted, pattern in LIBRARIES.items():
        copies = sorted((site / "nvidia_pytriton.libs").glob(pattern))
        if copies:
            (home / "lib" / wanted).symlink_to(copies[0])
    return program


def main() -> int:
    site = Path(sysconfig.get_paths()["purelib"])
    wrapper = Path(sys.prefix) / "bin" / "perf_analyzer"
    if works(wrapper):
        return 0
    home = Path(sys.prefix) / "opt" / "perf_analyzer"
    program = from_client_wheel(site, home)
    wrapper.unlink(missing_ok=True)
    wrapper.write_text(WRAPPER.format(libraries=home / "lib", program=program))
    wrapper.chmod(0o755)
    if not works(wrapper):
        print(f"{wrapper} does not start; run it to see which library is missing", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
