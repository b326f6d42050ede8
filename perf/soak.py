"""A deployment under mixed load for half an hour, with a fault every minute: what grows, what is lost.

    make perf-soak          # 30 minutes -> perf/reports/soak.json
    python perf/soak.py --minutes 3 --fault-every-s 15 --out /tmp/soak.json

`dstackctl serve` (Triton, arbiter) and `dstackctl run` on three models, clients at rates that change every
two minutes. The faults take turns. No growth: what is left of the slope of each role's memory, descriptors,
sockets and threads (staying_up/growth.py), and shared memory at the end. Lost: requests without a right
answer. Those inside a killed process, or sent while Triton had none for their model, are counted with their
fault; any other is unexplained, and the soak fails. Exit status 1 when it fails.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the load client and the deployment of the fault tests

from dstack_sched.adapters.repository import DiskRepository  # noqa: E402
from dstack_sched.adapters.triton_client import TritonClient  # noqa: E402
from fakes.load import Load, all_grow, wait_until  # noqa: E402
from fakes.onnx_models import WIDTH, SlowSum  # noqa: E402
from fakes.site import Site  # noqa: E402
from report import REPORTS, write_report  # noqa: E402
from staying_up.growth import Growth, grows, growths  # noqa: E402
from staying_up.processes import Sample, shared_memory, take  # noqa: E402

MODELS = ("alpha", "beta", "gamma")
SLO_MS = 250.0
ANSWER_WITHIN_S = 6.0
RECOVER_WITHIN_S = 120.0
SAMPLE_EVERY_S = 5.0
# Requests per second, in turns of two minutes.
RATES = (
    {"alpha": 30.0, "beta": 10.0, "gamma": 40.0},
    {"alpha": 10.0, "beta": 30.0, "gamma": 20.0},
    {"alpha": 20.0, "beta": 40.0, "gamma": 10.0},
)
RATES_FOR_S = 120.0
# Growth over the whole run that counts as none: noise of the estimate, pages of the allocator. What is shared
# with processes that come and go (pss) is reported and not judged.
TOLERANCE = {"rss_mib": 3.0, "anonymous_mib": 3.0, "descriptors": 2.0, "sockets": 2.0, "threads": 2.0}


@dataclass
class FaultRecord:
    """One fault that was made. victims: the models whose process it took; recovered_s None: it did not.
    triton_ended_by_itself: a crash of Triton's that nobody asked for; it takes all models."""

    what: str
    at_s: float
    victims: tuple[str, ...] = ()
    triton_ended_by_itself: bool = False
    recovered_s: float | None = None
    failed: Counter[str] = field(default_factory=Counter)


class Faults:
    """The faults, in turns. Each waits until all is as it should be again."""

    def __init__(self, site: Site, load: Load) -> None:
        self.site = site
        self.load = load
        self.slo_ms = SLO_MS
        # Every kind of process dies in the first half, some more than once; in the second nothing does that
        # leaves a model behind in Triton, so that its growth can be told from what those cost.
        first = (
            self.stub_of_beta_killed,
            self.arbiter_killed,
            self.alpha_reloaded,
            self.controller_killed,
            self.clients_vanish,
            self.triton_killed,
            self.stub_of_alpha_killed,
            self.arbiter_hangs,
            self.stub_of_beta_killed,
            self.objective_changed,
            self.stub_of_alpha_killed,
            self.alpha_reloaded,
            self.clients_vanish,
            self.stub_of_beta_killed,
        )
        second = (self.arbiter_hangs, self.alpha_reloaded, self.clients_vanish, self.objective_changed)
        self.turns: tuple[Callable[[], tuple[str, ...]], ...] = (*first, *second * 12)

    def make(self, number: int, began_s: float) -> FaultRecord:
        """The next one, and its recovery."""
        turn = self.turns[number % len(self.turns)]
        record = FaultRecord(turn.__name__.replace("_", " "), time.monotonic() - began_s)
        at_s, triton = time.monotonic(), self._triton_pid()
        try:
            record.victims = turn()
            wait_until("all answer", all_grow(self.load.counts), RECOVER_WITHIN_S)
            wait_until("all run by grants", all_grow(self.site.granted_rows), RECOVER_WITHIN_S)
            record.recovered_s = time.monotonic() - at_s
        except AssertionError as error:
            print(f"{record.what}: {error}", flush=True)
        if turn != self.triton_killed and self._triton_pid() != triton:
            record.triton_ended_by_itself, record.victims = True, MODELS
        return record

    def _triton_pid(self) -> int | None:
        process = self.site.serve.triton() if self.site.serve else None
        return process.pid if process else None

    def _killed(self, what: str, find: Callable[[], Any]) -> None:
        process = find()
        assert process is not None, f"no {what} to kill"
        process.kill()
        wait_until(f"another {what}", lambda: (now := find()) and now.pid != process.pid, RECOVER_WITHIN_S)

    def stub_of_alpha_killed(self) -> tuple[str, ...]:
        assert self.site.serve is not None
        self._killed("stub of alpha", lambda: self.site.serve and self.site.serve.stub("alpha"))
        return ("alpha",)

    def stub_of_beta_killed(self) -> tuple[str, ...]:
        self._killed("stub of beta", lambda: self.site.serve and self.site.serve.stub("beta"))
        return ("beta",)

    def arbiter_killed(self) -> tuple[str, ...]:
        self._killed("arbiter", lambda: self.site.serve and self.site.serve.arbiter())
        return ()

    def arbiter_hangs(self) -> tuple[str, ...]:
        assert self.site.serve is not None
        arbiter = self.site.serve.arbiter()
        assert arbiter is not None
        arbiter.suspend()
        time.sleep(3.0)
        arbiter.resume()
        return ()

    def controller_killed(self) -> tuple[str, ...]:
        assert self.site.run is not None
        self.site.run.stop(signal.SIGKILL)
        start_run(self.site)
        return ()

    def triton_killed(self) -> tuple[str, ...]:
        self._killed("Triton", lambda: self.site.serve and self.site.serve.triton())
        return MODELS

    def alpha_reloaded(self) -> tuple[str, ...]:
        """Under load, as after an update of its files."""
        DiskRepository(self.site.repository).make_newer("alpha")
        with TritonClient(self.site.url) as client:
            client.load("alpha")
        return ()

    def objective_changed(self) -> tuple[str, ...]:
        """The operator edits the workload file; the controller follows without a load."""
        self.slo_ms = 1.5 * SLO_MS if self.slo_ms == SLO_MS else SLO_MS
        self.site.write_workload(self.slo_ms, RATES[0])
        wait_until("it is in force", self._objective_is_stated, RECOVER_WITHIN_S)
        return ()

    def _objective_is_stated(self) -> bool:
        return {float(found["slo_ms"]) for found in self.site.stated().values()} == {self.slo_ms}

    def clients_vanish(self) -> tuple[str, ...]:
        """Clients that go away without waiting for their answers. Over HTTP: cancelled gRPC requests crash
        Triton before 24.12 (decisions/0102)."""
        assert self.site.serve is not None
        until_s = time.monotonic() + 3.0
        while time.monotonic() < until_s:
            for model in MODELS:
                connection = http.client.HTTPConnection(self.site.serve.printed["urls"]["http"])
                connection.request("POST", f"/v2/models/{model}/infer", json.dumps(a_request(model)))
                connection.close()
            time.sleep(0.02)
        return ()


def a_request(model: str) -> dict[str, Any]:
    """In the form of the KServe protocol."""
    x = {"name": f"x_{model}", "datatype": "FP32", "shape": [1, WIDTH], "data": [1.0] * WIDTH}
    return {"inputs": [x]}


def start_run(site: Site) -> None:
    site.start_run("--cooldown-s", 20)


class Sampler:
    """Looks at all processes every few seconds, in a thread of its own."""

    def __init__(self, site: Site, began_s: float) -> None:
        self.site = site
        self.samples: list[Sample] = []
        self.shared: list[dict[str, float]] = []
        self._began_s = began_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            site = self.site
            assert site.serve is not None
            now_s = time.monotonic() - self._began_s
            running = (site.serve, site.run)
            self.samples += take([each.process.pid for each in running if each is not None], now_s)
            prefix = f"dstack_{site.serve.process.pid}_"
            dead = sum(each.dead_stubs for each in self.samples if each.at_s == now_s)
            self.shared.append({"at_s": now_s, "dead_stubs": dead, **shared_memory(prefix)})


def soak(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the report. Starts what is needed; the caller stops it."""
    site.start_serve()
    start_run(site)
    assert site.serve is not None
    sysv_before = shared_memory("dstack_")["sysv_segments"]
    load = Load(
        site.url, site.models, clients=4, rates=RATES[0], answer_within_s=ANSWER_WITHIN_S, slo_ms=SLO_MS
    )
    began_s = time.monotonic()
    sampler = Sampler(site, began_s)
    faults, records = Faults(site, load), []
    try:
        while (elapsed_s := time.monotonic() - began_s) < options.minutes * 60:
            load.rates.update(RATES[int(elapsed_s / RATES_FOR_S) % len(RATES)])
            due_s = (len(records) + 1) * options.fault_every_s
            if elapsed_s >= due_s and elapsed_s < options.minutes * 60 - options.fault_every_s / 2:
                records.append(faults.make(len(records), began_s))
                print(f"{elapsed_s:6.0f} s  {records[-1].what}: {told(records[-1].recovered_s)}", flush=True)
            time.sleep(0.2)
        faults_left = site.status()["faults"]
    finally:
        sampler.stop()
        load.stop()
    run_s = time.monotonic() - began_s
    unexplained = explain(load, records, began_s)
    return figures(load, records, sampler, run_s, options.warm_up_s, unexplained, faults_left, sysv_before)


def told(recovered_s: float | None) -> str:
    return "did not recover" if recovered_s is None else f"all well after {recovered_s:.1f} s"


def explain(load: Load, records: list[FaultRecord], began_s: float) -> list[str]:
    """Count each failure with the fault that took its process; what is left has no explanation."""
    left = []
    for failure in load.failures:
        sent_s = failure.sent_s - began_s
        for record in records:
            until_s = record.at_s + (record.recovered_s or RECOVER_WITHIN_S)
            if failure.model in record.victims and record.at_s - ANSWER_WITHIN_S <= sent_s <= until_s:
                record.failed[failure.model] += 1
                break
        else:
            left.append(f"at {sent_s:.1f} s {failure.model}: {failure.why}")
    return left


def figures(
    load: Load,
    records: list[FaultRecord],
    sampler: Sampler,
    run_s: float,
    warm_up_s: float,
    unexplained: list[str],
    faults_left: list[Any],
    sysv_before: float,
) -> dict[str, Any]:
    sent, answered, in_time = load.sent.total(), load.answered.total(), load.in_time.total()
    roles = sorted({each.role for each in sampler.samples})
    growth = {role: growths(sampler.samples, role, warm_up_s, run_s) for role in roles}
    last = sampler.shared[-1]
    verdict = {
        "every fault was recovered from": all(each.recovered_s is not None for each in records),
        "no fault is left": faults_left == [],
        "Triton did not end by itself": not any(each.triton_ended_by_itself for each in records),
        "no request was lost without a cause": unexplained == [],
        "nothing grows": growing(growth) == [],
        # one region a stub, and one for each model that Triton holds though its stub was killed
        "no shared memory is left over": last["regions"] <= len(MODELS) + last["dead_stubs"],
        "no System V segment is left over": last["sysv_segments"] <= sysv_before,
    }
    return {
        "minutes": round(run_s / 60, 2),
        "models": list(MODELS),
        "requests": {
            "sent": sent,
            "answered": answered,
            "failed": len(load.failures),
            "with_a_killed_process": sum(each.failed.total() for each in records),
            "unexplained": len(unexplained),
            "unexplained_first": unexplained[:10],
            "attainment": in_time / sent if sent else None,
            "slo_ms": SLO_MS,
        },
        "faults": [asdict(each) | {"failed": dict(each.failed)} for each in records],
        "faults_left": faults_left,
        "growth": {role: {q: asdict(g) for q, g in found.items()} for role, found in growth.items()},
        "growing": growing(growth),
        "tolerance_over_the_run": TOLERANCE,
        "warm_up_s": warm_up_s,
        "shared_memory": {
            "first": sampler.shared[0],
            "last": last,
            "most_mib": max(s["mib"] for s in sampler.shared),
        },
        "verdict": verdict,
        "passed": all(verdict.values()),
        "samples": sampler.samples,
    }


def growing(growth: dict[str, dict[str, Growth]]) -> list[str]:
    return [
        f"{role}: {quantity} by {found.over_run:.2f} over the run"
        for role, quantities in growth.items()
        for quantity, found in quantities.items()
        if quantity in TOLERANCE and grows(found, TOLERANCE[quantity])
    ]


def show(report: dict[str, Any]) -> None:
    requests = report["requests"]
    print(
        f"{report['minutes']} minutes, {len(report['faults'])} faults; {requests['sent']} requests sent, "
        f"{requests['answered']} answered, {requests['with_a_killed_process']} failed with a killed process, "
        f"{requests['unexplained']} without a cause; {requests['attainment']:.2%} within {SLO_MS:g} ms"
    )
    for role, quantities in report["growth"].items():
        row = "  ".join(f"{q} {g['level']:.1f} {g['over_run']:+.2f}" for q, g in quantities.items())
        print(f"  {role:14} {row}")
    for line in [*report["growing"], *requests["unexplained_first"]]:
        print(f"  ! {line}")
    for what, holds in report["verdict"].items():
        print(f"  {'yes' if holds else 'NO ':3} {what}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--fault-every-s", type=float, default=60.0)
    parser.add_argument("--warm-up-s", type=float, default=120.0, help="of each process, not looked at")
    parser.add_argument("--out", type=Path, default=REPORTS / "soak.json")
    parser.add_argument("--keep", type=Path, help="run in this directory and leave it there")
    options = parser.parse_args()
    models = [SlowSum(name, seed=seed) for seed, name in enumerate(MODELS)]
    with tempfile.TemporaryDirectory(prefix="dstack-soak-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        site = Site(folder, models, slo_ms=SLO_MS, rates=RATES[0])
        try:
            report = soak(site, options)
        finally:
            site.stop()
        if options.keep:
            rows = [json.dumps(asdict(each)) + "\n" for each in report.pop("samples")]
            (folder / "samples.jsonl").write_text("".join(rows))
    report.pop("samples", None)
    arguments = f"--minutes {options.minutes:g} --fault-every-s {options.fault_every_s:g}"
    write_report(options.out, f"perf/soak.py {arguments}", report)
    show(report)
    print(f"-> {options.out}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
