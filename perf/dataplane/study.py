"""One run of the data-plane study: its options, clock, log, and the parts that are done."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from tritonclient.utils import InferenceServerException

from dataplane.server import Server
from dstack_backend.device import identity
from dstack_sched.errors import DstackError, MachineError
from report import commit, now, write_report

COMMAND = "make perf-h100-dataplane"
KNOWN_MODELS = ("resnet50", "bert_base", "vgg19", "mobilenet_v2")


def carried(before: Mapping[str, Any], part: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A part's result, with the rows of models that this run was not asked for: as an earlier run left them,
    with its date and commit."""
    if "error" in part or "error" in before:
        return part
    about = {key: before[key] for key in ("commit", "date") if key in before}
    for rows, old in ((part, before), (part.get("models"), before.get("models"))):
        for name in KNOWN_MODELS:
            if isinstance(rows, dict) and isinstance(old, Mapping) and name in old and name not in models:
                rows[name] = {"carried_from": about, **old[name]}
    return part


class Study:
    """What the parts share. Each part's result is written as soon as it is there, beside those of earlier
    runs of the same provider that are in the report already."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.provider: str = options.provider
        self.models: list[str] = options.models.split(",")
        self._began_s = time.monotonic()
        self.problems: list[str] = []
        options.state.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)
        self.report = options.out / "dataplane.json"
        self.parts: dict[str, Any] = {} if options.fresh else self._earlier()
        options.log.parent.mkdir(parents=True, exist_ok=True)
        options.log.write_text("", encoding="utf-8")
        self.shared: Server | None = None
        self.shared_models: list[str] = []

    def _earlier(self) -> dict[str, Any]:
        try:
            content = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(content.get("parts", {})) if content.get("provider") == self.provider else {}

    def path(self, name: str) -> Path:
        """The model's file."""
        path: Path = self.options.models_dir / f"{name}.onnx"
        return path

    def log_file(self, name: str) -> Path:
        path: Path = self.options.state / f"{name}.log"
        return path

    def left_s(self) -> float:
        """Of the time budget."""
        left: float = self.options.time_budget_s - (time.monotonic() - self._began_s)
        return left

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._began_s:6.1f} s] {text}"
        print(line, flush=True)
        self._note(line)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"PROBLEM {text}")

    def _note(self, text: str) -> None:
        with self.options.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def each(
        self, names: Iterable[str], measure: Callable[[str], Any], *, together: bool = False
    ) -> dict[str, Any]:
        """What `measure` finds of each model, one after the other or all together. One that fails is a
        problem and is left out, the others stand. Errors: MachineError when all fail."""
        names, found = list(names), {}
        with ThreadPoolExecutor(max(1, len(names)) if together else 1) as pool:
            for name, future in [(name, pool.submit(measure, name)) for name in names]:
                try:
                    found[name] = future.result()
                except (DstackError, InferenceServerException) as error:
                    self.problem(f"{name}: {' '.join(str(error).split())[:400]}")
        if names and not found:
            raise MachineError(f"none of {', '.join(names)} could be measured")
        return found

    def try_one(self, name: str, measure: Callable[[str], Any]) -> Any:
        """What `measure` finds of one model; None, and a problem, where it fails."""
        try:
            return self.each([name], measure)[name]
        except MachineError:  # each() has said why
            return None

    def run(
        self,
        name: str,
        part: Callable[[Study], Mapping[str, Any]],
        needs_s: float,
        finish: Callable[[], None],
    ) -> None:
        """Run one part and write the report. Its failure is recorded and does not end the study."""
        if self.left_s() < needs_s:
            self.problem(f"{name}: not run: {self.left_s():.0f} s are left, it needs about {needs_s:.0f}")
            return
        began_s = time.monotonic()
        self.say(f"-- {name}")
        try:
            result = dict(part(self))
        except Exception as error:  # whatever fails, the parts behind it are still wanted
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
            self.problem(f"{name}: {result['error']}")
            self._note(traceback.format_exc())
            self._note_logs()
            self.close()  # the next part starts afresh
        about = {"commit": commit(), "date": now(), "seconds": round(time.monotonic() - began_s, 1)}
        self.parts[name] = carried(
            self.parts.get(name, {}), {**about, **result}, self.options.models.split(",")
        )
        finish()

    def close(self) -> None:
        """Stop the server that parts share, if one runs."""
        server, self.shared = self.shared, None
        if server is not None:
            try:
                server.close()
            except MachineError as error:
                self.problem(str(error))

    def _note_logs(self, lines: int = 60) -> None:
        """The tails of all logs below the state directory, into the study's log."""
        for path in sorted(self.options.state.glob("**/*.log")) + sorted(self.options.state.glob("**/*.err")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            if tail and path != self.options.log:
                self._note("\n".join([f"---- {path}", *(each[:300] for each in tail)]))

    def result(self, part: str) -> dict[str, Any]:
        """What a part found, {} where it has not run or failed."""
        found = self.parts.get(part, {})
        return {} if "error" in found else found

    def raw(self, model: str, batch_size: int) -> dict[str, Any]:
        """What the raw loop took by mode, {} where it has not run. A part that is compared with it keeps it
        with its own figures: the two are of one run."""
        found: dict[str, Any] = self.result("raw").get(model, {}).get(str(batch_size), {})
        return found

    @lru_cache(maxsize=1)  # noqa: B019 - one study a process
    def device(self) -> dict[str, Any]:
        """What it ran on; where the driver does not answer, why."""
        try:
            return identity(self.provider, 0)
        except (OSError, RuntimeError) as error:
            return {"error": str(error)}

    def write(self, figures: Mapping[str, Any]) -> None:
        """The report with these figures in front of the parts they come from."""
        about = {"provider": self.provider, "device": self.device()}
        content = {**figures, **about, "problems": self.problems, "parts": self.parts}
        write_report(self.report, COMMAND, content)
