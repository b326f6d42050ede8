"""A deployment under study: `dstackctl serve` as users start it, over a repository that is made here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import onnx
import psutil
import tritonclient.grpc as grpc
from onnx import TensorProto, helper
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import np_to_triton_dtype

from dstack_sched.adapters.mps import PIPE_VARIABLE
from dstack_sched.adapters.stub_processes import STUB_NAME, LocalStubProcesses
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.errors import MachineError

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
GONE_LIMIT_S = 30.0
INFER_LIMIT_S = 20.0
METRICS_PERIOD_S = 1.2  # the backend publishes once a second
SEED_MODEL = "seed"  # serve wants one model to begin with; this one stays on the CPU
TRITON = "tritonserver"
FLOOR_MODEL = Path(__file__).with_name("floor_model.py")
MPS_CONTROL, MPS_SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"
CLIENT_VARIABLES = (PIPE_VARIABLE, "CUDA_MPS_LOG_DIRECTORY")


class Server:
    """A context manager. Models are added and loaded one by one; `close` ends all and removes its files.

    provider: "cuda" puts models on KIND_GPU instances, "cpu" on KIND_CPU ones. Errors: MachineError.
    """

    def __init__(self, directory: Path, provider: str, *, arguments: Iterable[str] = ()) -> None:
        self.provider = provider
        self.logs = directory / "logs"
        self._runtime = Path(tempfile.mkdtemp(prefix="dp-", dir="/tmp"))  # sockets need short paths
        self.repository = self._runtime / "models"
        self.socket = self._runtime / "arbiter.sock"
        shutil.rmtree(self.logs, ignore_errors=True)
        self._place(SEED_MODEL, 'backend: "dstack"\ninstance_group [ { kind: KIND_CPU } ]\n')
        save_seed(self.repository / SEED_MODEL / "1" / "model.onnx")
        ports = [word for use in ("http", "grpc", "metrics") for word in (f"--{use}-port", "0")]
        command = [sys.executable, "-m", "dstack_sched", "serve", str(self.repository), *ports, "--json"]
        command += ["--state", str(directory), "--socket", str(self.socket), *arguments]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(self._runtime)}
        environment[PIPE_VARIABLE] = str(self._runtime / "no-other-daemon")
        self.logs.mkdir(parents=True, exist_ok=True)
        self._said = self._runtime / "serve.json"
        with self._said.open("w") as out, (self.logs / "serve.err").open("w") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
            )
        self.shm_pattern = f"dstack_{self._process.pid}_*"  # triton_process names its regions by its process
        try:
            self._started()
        except BaseException:
            self.close()
            raise

    def _started(self) -> None:
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                said = json.loads(self._said.read_text())
                break
            except ValueError:
                pass
            if self._process.poll() is not None or time.monotonic() > until:
                raise MachineError(f"dstackctl serve did not start: {last_line(self.logs / 'serve.err')}")
            time.sleep(0.05)
        self.grpc_url, self.metrics_url = said["urls"]["grpc"], said["urls"]["metrics"]
        self.client = TritonClient(self.grpc_url)
        self.stubs = LocalStubProcesses(self.grpc_url)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ctrl-C, as a user would; what does not end is killed, and that is an error."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise MachineError(f"dstackctl serve did not stop within {STOP_LIMIT_S:g} s of Ctrl-C") from None
        finally:
            shutil.rmtree(self._runtime, ignore_errors=True)

    # -- models ------------------------------------------------------------------------------------------

    def add(
        self, name: str, path: Path, *, batch_size: int, count: int = 1, max_batch_size: int = 0, **more: str
    ) -> None:
        """Put a model file (by link) into the repository. more: parameters of the backend, as texts."""
        kind = "KIND_GPU" if self.provider == "cuda" else "KIND_CPU"
        parameters = {"batch_size": str(batch_size), **more}
        if self.provider == "cuda":  # inputs in CUDA shared memory come as GPU tensors
            parameters.setdefault("FORCE_CPU_ONLY_INPUT_TENSORS", "no")
        self._place(
            name,
            f'backend: "dstack"\nmax_batch_size: {max_batch_size or batch_size}\n'
            f"instance_group [ {{ kind: {kind} count: {count} }} ]\n"
            + "".join(
                f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
                for key, value in parameters.items()
            ),
        )
        link = self.repository / name / "1" / "model.onnx"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())

    def add_floor(self, name: str, like: str, *, batch_size: int, busy_us: int = 0) -> None:
        """A model with the tensors of a loaded one that answers after busy_us, on a CPU instance of
        Triton's Python backend: all that a request costs without us (floor_model.py)."""
        text = f'parameters {{ key: "busy_us" value {{ string_value: "{busy_us}" }} }}\n'
        self._add_python(name, like, f"max_batch_size: {batch_size}\n{text}", "KIND_CPU")
        shutil.copy(FLOOR_MODEL, self.repository / name / "1" / "model.py")

    def add_backend(self, name: str, like: str, path: Path, backend: Path, *, batch_size: int) -> None:
        """The model of a loaded one again, served by another backend directory, an older one, say."""
        more = f'parameters {{ key: "batch_size" value {{ string_value: "{batch_size}" }} }}\n'
        more += 'parameters { key: "model_file" value { string_value: "model.onnx" } }\n'
        if self.provider == "cuda":
            more += 'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }\n'
        kind = "KIND_GPU" if self.provider == "cuda" else "KIND_CPU"
        self._add_python(name, like, f"max_batch_size: {batch_size}\n{more}", kind)
        folder = self.repository / name / "1"
        shutil.copytree(backend, folder, dirs_exist_ok=True)
        (folder / "model.onnx").symlink_to(path.resolve())

    def _add_python(self, name: str, like: str, more: str, kind: str) -> None:
        """A config of Triton's own Python backend with the tensors of a loaded model."""
        config = self.client.config(like)
        tensors = "".join(
            f'{kind} [ {{ name: "{each["name"]}" data_type: {each["data_type"]} dims: {each["dims"]} }} ]\n'
            for kind in ("input", "output")
            for each in config[kind]
        )
        head = f'backend: "python"\ndynamic_batching {{ }}\ninstance_group [ {{ kind: {kind} count: 1 }} ]\n'
        self._place(name, head + more + tensors)

    def _place(self, name: str, config: str) -> None:
        """Write a config; replaced by a rename, so that nobody reads half of it."""
        folder = self.repository / name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        fresh = self._runtime / f"{name}.pbtxt"
        fresh.write_text(config)
        fresh.replace(folder / "config.pbtxt")

    def load(self, *names: str) -> dict[str, float]:
        """Load together; seconds by model. Errors: the first that fails, in Triton's words."""
        return self._together(self.client.load, names)

    def unload(self, *names: str) -> dict[str, float]:
        """Unload together and wait until their processes are gone; seconds by model."""
        return self._together(self._unload, names)

    def _unload(self, name: str) -> None:
        pids = self.stubs.pids(name) or frozenset()
        self.client.unload(name)
        until = time.monotonic() + GONE_LIMIT_S
        while self.stubs.alive(pids):
            if time.monotonic() > until:
                raise MachineError(f"{name}: its processes outlive unloading by {GONE_LIMIT_S:g} s")
            time.sleep(0.02)

    def _together(self, call: Any, names: Iterable[str]) -> dict[str, float]:
        def timed(name: str) -> float:
            started = time.monotonic()
            call(name)
            return round(time.monotonic() - started, 3)

        names = list(names)
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            return dict(zip(names, pool.map(timed, names), strict=True))

    def infer(self, model: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One request, its outputs by name."""
        with grpc.InferenceServerClient(self.grpc_url) as client:
            answer = client.infer(model, request_inputs(feeds), client_timeout=INFER_LIMIT_S)
        return outputs_of(answer)

    # -- what it uses and says ---------------------------------------------------------------------------

    def triton(self) -> psutil.Process | None:
        """The server process that runs now: serve starts another when one dies. None: none does."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        return next((each for each in below if Path((cmdline(each) or [""])[0]).name == TRITON), None)

    def client_environment(self) -> dict[str, str]:
        """Our environment with what a CUDA client needs to reach the MPS daemon that Triton uses."""
        triton = self.triton()
        theirs = triton.environ() if triton else {}
        return {**os.environ, **{key: theirs[key] for key in CLIENT_VARIABLES if key in theirs}}

    def processes(self) -> list[psutil.Process]:
        """serve and all below it that are no stubs: what stays when every model is unloaded."""
        top = psutil.Process(self._process.pid)
        return [each for each in [top, *top.children(recursive=True)] if not is_stub(each)]

    def mps_processes(self) -> dict[int, str]:
        """The MPS daemon and servers of this deployment: process id -> "daemon" or "server".

        Found by their environment: whose children they are is MPS's own affair. The daemon is the control
        program that stays (-f, -d), not one that puts a question to it.
        """
        found = {}
        for process in psutil.process_iter():
            words = cmdline(process)
            name = Path(words[0]).name if words else ""
            if name == MPS_SERVER or (name == MPS_CONTROL and {"-f", "-d"} & set(words[1:])):
                try:
                    ours = str(self._runtime) in str(process.environ().get(PIPE_VARIABLE))
                except psutil.Error:
                    continue
                if ours:
                    found[process.pid] = "server" if name == MPS_SERVER else "daemon"
        return found

    def stub_pids(self) -> frozenset[int]:
        """The stubs of all models, but the seed's."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        return frozenset(
            each.pid for each in below if is_stub(each) and f"/{SEED_MODEL}/" not in str(cmdline(each))
        )

    def say_where(self) -> None:
        """Have every stub of the dstack backend write the stacks of its threads into Triton's log."""
        for pid in self.stub_pids():
            with contextlib.suppress(ProcessLookupError):
                caught = next(
                    int(line.split()[1], 16)
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if line.startswith("SigCgt")
                )
                if caught >> (signal.SIGUSR1 - 1) & 1:
                    os.kill(pid, signal.SIGUSR1)

    def metrics(self) -> dict[tuple[str, str, str], float]:
        """Triton's metrics, fresh: (name, model, stage or instance) -> value, summed over the rest."""
        time.sleep(METRICS_PERIOD_S)
        with urlopen(f"http://{self.metrics_url}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        values: dict[tuple[str, str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = sample.labels
                key = (sample.name, labels.get("model", ""), labels.get("stage", labels.get("instance", "")))
                values[key] = values.get(key, 0.0) + sample.value
        return values


def request_inputs(feeds: Mapping[str, np.ndarray]) -> list[grpc.InferInput]:
    """Arrays as tritonclient wants them."""
    inputs = []
    for name, array in feeds.items():
        tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def outputs_of(answer: grpc.InferResult) -> dict[str, np.ndarray]:
    return {each.name: answer.as_numpy(each.name) for each in answer.get_response().outputs}


def save_seed(path: Path) -> None:
    """y = x, for one number."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], SEED_MODEL, [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def is_stub(process: psutil.Process) -> bool:
    return any(word.endswith(STUB_NAME) for word in cmdline(process)[:1])


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
