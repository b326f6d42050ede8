"""For tests on a GPU: an environment that no test spoils for the next, failures that explain themselves."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TAIL_LINES = 60
QUERY = "name,driver_version,memory.used,memory.total,compute_mode"
# What the runtime sets for its own process, and must not reach the next test's servers.
OF_A_PROCESS = ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment as it was, and a cache of optimised models that is nobody else's."""
    before = dict(os.environ)
    os.environ["DSTACK_CACHE_DIR"] = str(tmp_path_factory.getbasetemp() / "cache")
    for name in OF_A_PROCESS:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Beside a failure: the state of the GPU and the ends of the logs below the test's directory."""
    outcome = yield
    report = outcome.get_result()
    known = getattr(item, "funcargs", {})
    server = known.get("server")
    folders = [known.get("tmp_path"), server.repository.parent if server else None]
    if not report.failed:
        return
    report.sections.append(("nvidia-smi", gpu_state()))
    for folder in [folder for folder in folders if folder is not None]:
        for path in sorted([*folder.glob("**/*.log"), *folder.glob("**/*.err")]):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            report.sections.append((str(path.relative_to(folder)), "\n".join(line[:300] for line in lines)))


def pytest_unconfigure() -> None:
    """A process that does not end is a defect, and says where it stays: in Python after 30 s with the
    stacks of its threads, in the exit handlers of a library after 60 s by SIGALRM (status 142).
    """
    if Path("/dev/nvidiactl").exists():
        faulthandler.dump_traceback_later(30, exit=True, file=sys.__stderr__)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)


def pytest_report_header() -> str:
    return f"GPU: {gpu_state()}"


def gpu_state() -> str:
    """One line of nvidia-smi, or why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none (no nvidia-smi)"
    asked = subprocess.run(
        [program, f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
    )
    return " ".join((asked.stdout or asked.stderr).split())
