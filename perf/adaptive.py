"""Rates that shift every minute: the control loop against a plan for the means and against knowing the rates.

    python perf/adaptive.py            30 minutes: each policy gets the same ten, one after the other
    python perf/adaptive.py --minutes 3 --out /tmp/a.json

The arrivals of ../shared/traces/azure_llm_2023_conv.csv, scaled and striped over three sample models, are
sent open loop to a real Triton on this machine's CPU. Every policy starts on a server of its own from the
same profiles, and is offered the very same requests at the same times. Needs a quiet machine for half an
hour.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dstack_backend import synthetic
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.perf_analyzer import input_spec
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.app.planning import CONTROL_OPTIONS
from dstack_sched.cli.demo import load_all, working_copy
from dstack_sched.cli.deployment import Deployment
from dstack_sched.cli.host import Host, HostOptions, open_host
from dstack_sched.cli.live_steps import LiveSteps
from report import REPORTS, ROOT, machine, write_report
from shifting.figures import figures, plot
from shifting.open_loop import request_bytes
from shifting.policies import POLICIES, PROFILING
from shifting.scenario import Script, make_script

# What waits in Triton's own queue has no deadline yet: there Triton refuses it, after half of the SLO.
QUEUE = """dynamic_batching {{ max_queue_delay_microseconds: 0
  default_queue_policy {{ timeout_action: REJECT default_timeout_microseconds: {wait_us} }} }}
"""
PRIORITY = "-15"
LEAD_S = 5.0  # the client imports and connects meanwhile
TAIL_S = 60.0


def main() -> None:
    arguments = parse()
    raised = raise_priority()
    began_s = time.monotonic()
    script = make_script(arguments.minutes, arguments.minute_s, arguments.scale)
    loads = {"before": machine()["load_average_1min"]}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dstack-adaptive-") as folder:
        home = Path(folder)
        source = home / "source"
        for model in script.models:
            shutil.copytree(ROOT / "model_repository" / model.name, source / model.name)
            with (source / model.name / "config.pbtxt").open("a") as config:
                config.write(QUEUE.format(wait_us=round(500 * model.slo_ms)))
        profiles = arguments.profiles or home / "profiled"
        for name in arguments.policies.split(","):
            say(f"{name}: starting")
            results[name] = run_policy(name, script, source, home / name, profiles)
            loads[name] = machine()["load_average_1min"]
            say(f"{name}: " + line(results[name]))
        if arguments.keep:
            shutil.copytree(home, arguments.keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx"))
    took_s = round(time.monotonic() - began_s, 1)
    document = {"priority_raised": raised, "seconds": took_s, "load_average_1min": loads}
    out = write_report(
        arguments.out, "make perf-adaptive", {**document, **described(script), "policies": results}
    )
    plot(script, results, out.with_suffix(".png"))
    say(f"{out} and {out.with_suffix('.png')} written")


def raise_priority() -> bool:
    """Ask the kernel to prefer this study's processes to others of the machine (Linux' autogroups, one a
    session, so each that the study starts): what is measured is a policy, not who else was there. False
    where that is not allowed."""
    try:
        Path("/proc/self/autogroup").write_text(PRIORITY)
    except OSError:
        return False
    threading.Thread(target=keep_priority, daemon=True).start()
    return True


def keep_priority() -> None:
    """Every new session of ours gets it too."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(OSError, psutil.Error):
                group = Path(f"/proc/{process.pid}/autogroup")
                if not group.read_text().rstrip().endswith(f"nice {PRIORITY}"):
                    group.write_text(PRIORITY)
        time.sleep(0.3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--minute-s", type=float, default=60.0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all rates")
    parser.add_argument("--policies", default="static,adaptive,oracle")
    parser.add_argument("--profiles", type=Path, help="a state directory with profiles to go on from")
    parser.add_argument("--keep", type=Path, help="copy logs and states there")
    parser.add_argument("--out", type=Path, default=REPORTS / "adaptive.json")
    return parser.parse_args()


def run_policy(name: str, script: Script, source: Path, home: Path, profiles: Path) -> dict[str, Any]:
    """One policy from a fresh start to its figures."""
    state = home / "state"
    state.mkdir(parents=True)
    copy = working_copy(DiskRepository(source), home / "models")
    with tempfile.TemporaryDirectory(prefix="dstack-a-") as private:
        options = HostOptions(
            repository=copy.root, log_dir=home / "logs", http_port=0, grpc_port=0, metrics_port=0,
            socket=Path(private) / "arbiter.sock",
        )  # fmt: skip
        with open_host(options) as host, TritonClient(host.triton.grpc_url) as server:
            load_all(host)
            deployment = Deployment(copy, server, state, options.socket)
            profile_once(deployment, script, profiles)
            with POLICIES[name](host, deployment, script) as ready:
                sent = drive(host, server, script, home, ready.set)
    entries = FileDecisionLog(state).last(10_000)
    return figures(script, sent, entries)


def profile_once(deployment: Deployment, script: Script, profiles: Path) -> None:
    """Measured before the first policy, reused by all."""
    if profiles.is_dir():
        shutil.copytree(profiles / "profiles", deployment.state / "profiles")
        return
    wanted = script.workload(script.mean_rates())
    LiveSteps(deployment, lambda: wanted, PROFILING, CONTROL_OPTIONS).profile(m.name for m in script.models)
    shutil.copytree(deployment.state / "profiles", profiles / "profiles")


def drive(
    host: Host, server: TritonClient, script: Script, home: Path, started: Any
) -> dict[str, np.ndarray]:
    """Send the script; what became of every request."""
    begin_s = time.time() + LEAD_S
    arrays: dict[str, Any] = {"url": host.triton.grpc_url, "begin_s": begin_s}
    arrays["names"] = np.array([model.name for model in script.models])
    for model in script.models:
        arrays[f"{model.name}.times_s"] = script.times_s[model.name]
        arrays[f"{model.name}.request"] = np.frombuffer(example(server, model.name, model.rows), np.uint8)
    np.savez(home / "plan.npz", **arrays)
    command = [sys.executable, "-m", "shifting.open_loop", str(home / "plan.npz"), str(home / "sent.npz")]
    client = subprocess.Popen(command, cwd=Path(__file__).resolve().parent)
    try:
        time.sleep(max(0.0, begin_s - time.time()))
        started()
        status = client.wait(script.seconds + TAIL_S)
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
    if status != 0:
        raise RuntimeError(f"the open-loop client ended with status {status}")
    return dict(np.load(home / "sent.npz"))


def example(server: TritonClient, model: str, rows: int) -> bytes:
    """One request of so many rows, its inputs made up as the profiler makes them up."""
    config = server.config(model)
    specs = [input_spec(each, config["max_batch_size"] > 0) for each in config["input"]]
    types = {each["name"]: each["data_type"].removeprefix("TYPE_") for each in config["input"]}
    return request_bytes(model, synthetic.feeds(specs, rows, {}), types)


def described(script: Script) -> dict[str, Any]:
    """What was asked."""
    return {
        "trace": "azure_llm_2023_conv.csv: timing only, striped over the models, scaled minute by minute",
        "minutes": script.minutes,
        "minute_s": script.minute_s,
        "order": "each policy gets the whole script, one after the other, on a server of its own",
        "static_plan_for": "the mean rates of the script",
        "models": {
            model.name: {
                "rows_per_request": model.rows,
                "slo_ms": model.slo_ms,
                "on_late": "reject",
                "requests": int(script.times_s[model.name].size),
                "rows_per_s": [round(script.minute_rates(k)[model.name], 1) for k in range(script.minutes)],
            }
            for model in script.models
        },
    }


def line(result: dict[str, Any]) -> str:
    return (
        f"attainment {result['attainment']:.2%}, goodput {result['goodput_rows_per_s']:.1f} rows/s, "
        f"{result['reloads']} reloads"
    )


def say(text: str) -> None:
    print(time.strftime("%T"), text, flush=True)


if __name__ == "__main__":
    main()
