"""Part `raw`: what ONNX Runtime alone reaches, the measure of everything served."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

from dataplane.study import Study
from dstack_sched.errors import MachineError

PROGRAM = Path(__file__).with_name("raw_loop.py")
BATCHES = (1, 16)
LAYOUTS, FALLBACK_LAYOUT = "nchw,nhwc", "nchw"
LOAD_LIMIT_S = 90.0
MEASURE_LIMIT_S = 30.0


def raw(study: Study) -> dict[str, Any]:
    """{MODEL: {"1": {"device": ..., "copies": ..., "cuda_graph": ...}, "16": ...}}; loaded together, measured
    one at a time."""
    loops = {name: RawLoop(study, name, LAYOUTS) for name in study.models}
    found: dict[str, Any] = {}
    try:
        for name in study.models:
            loops[name] = ready(study, loops[name], name)
        for name, loop in loops.items():
            try:
                found[name] = loop.measure()
                study.say(f"raw {name}: " + ", ".join(line(*row) for row in found[name].items()))
            except MachineError as error:
                study.problem(str(error))
    finally:
        for loop in loops.values():
            loop.close()
    if not found:
        raise MachineError("no model could be measured")
    return found


def ready(study: Study, loop: RawLoop, name: str) -> RawLoop:
    """The loop once it has loaded; one that dies is tried again with the usual layout alone."""
    try:
        loop.answer(LOAD_LIMIT_S)
        return loop
    except MachineError as error:
        study.problem(str(error))
    loop.close()
    again = RawLoop(study, name, FALLBACK_LAYOUT)
    with contextlib.suppress(MachineError):  # said when it is measured
        again.answer(LOAD_LIMIT_S)
    return again


def line(batch: str, row: dict[str, Any]) -> str:
    device = row["device"]
    return f"b={batch} {device['latency_ms_p50']:.3f} ms, {device['rows_per_s']:.0f}/s"


class RawLoop:
    """One raw_loop.py process. Errors: MachineError with its last words."""

    def __init__(self, study: Study, name: str, layouts: str) -> None:
        self._name = name
        self._log = study.log_file(f"raw-{name}")
        command = [
            sys.executable, str(PROGRAM), str(study.path(name)), "--provider", study.provider,
            "--batches", ",".join(map(str, BATCHES)), "--layouts", layouts,
            "--seconds", str(study.options.raw_seconds),
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(limit_s) else b""
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise MachineError(f"raw loop of {self._name}: no answer in {limit_s:g} s: {said[-1][:300]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self) -> dict[str, Any]:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # answer() tells why it died
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        return self.answer(MEASURE_LIMIT_S)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
