"""For all tests: markers by folder, and a guard that keeps the pure ones away from the world."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("dstack", deadline=None)
settings.load_profile("dstack")

TESTS = Path(__file__).parent
GUARDED = frozenset({"unit", "property", "sim"})
FORBIDDEN_EVENTS = {
    "socket.__new__": "opened a socket",
    "subprocess.Popen": "started a subprocess",
    "os.posix_spawn": "started a subprocess",
    "os.fork": "forked",
    "os.forkpty": "forked",
    "os.system": "started a shell",
    "os.exec": "replaced the process",
}

_guarded_test: str | None = None


def _audit(event: str, args: tuple) -> None:
    """An audit hook sees every door to the world, however reached; not removable, so switched."""
    if _guarded_test is None:
        return
    what = FORBIDDEN_EVENTS.get(event)
    if event == "ctypes.dlopen" and "nvidia-ml" in str(args[0]):
        what = "touched NVML"
    if what:
        raise RuntimeError(
            f"{_guarded_test} {what}; such a test belongs in tests/contract or tests/integration"
        )


sys.addaudithook(_audit)


def folder_of(item: pytest.Item) -> str:
    """The first folder below tests/: unit, property, sim, contract, integration, gpu."""
    try:
        return item.path.relative_to(TESTS).parts[0]
    except ValueError:
        return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = folder_of(item)
        if folder in ("integration", "gpu"):
            item.add_marker(folder)
        if folder == "gpu" and not Path("/dev/nvidiactl").exists():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make test-gpu on a GPU host"))


@pytest.fixture(autouse=True)
def world_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """In unit, property and sim tests a socket, subprocess, fork or NVML call is an error."""
    global _guarded_test
    _guarded_test = request.node.nodeid if folder_of(request.node) in GUARDED else None
    try:
        yield
    finally:
        _guarded_test = None
