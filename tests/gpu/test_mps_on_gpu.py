"""The real MPS daemon: what it tells, what it bounds, and `dstackctl serve` when it or a client dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from dstack_sched.adapters.machine_checks import run_checks
from dstack_sched.adapters.mps import MpsDaemon
from dstack_sched.adapters.mps_console import PIPE_VARIABLE, MpsConsole
from dstack_sched.adapters.mps_percent import granularity, measure_percentages
from dstack_sched.adapters.nvml import NvmlInventory
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.domain.mps import clients_by_gpu
from dstack_sched.errors import ServerError
from fakes.gpu_site import GpuSite, mps_processes, note, private_runtime
from fakes.load import Load, all_grow, wait_until

CLIENT = Path(__file__).parents[1] / "fakes" / "cuda_client.py"
OUT_OF_MEMORY = 2
RECOVERS_WITHIN_S = 60.0
MANY_LOADS = 20


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    """An environment in which no other daemon is found."""
    with private_runtime() as private:
        yield {**os.environ, **private}


@pytest.fixture
def daemon(environ: dict[str, str], tmp_path: Path) -> Iterator[MpsDaemon]:
    daemon = MpsDaemon(tmp_path / "daemon.log", environ)
    yield daemon
    daemon.stop()


class Client:
    """A process of fakes/cuda_client.py."""

    def __init__(self, environment: dict[str, str], *command: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT), *map(str, command)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def line(self) -> str:
        said = pipe(self.process.stdout).readline().strip()
        assert said, f"the client ended: {pipe(self.process.stderr).read()}"
        return said

    def say(self) -> None:
        pipe(self.process.stdin).write("go\n")
        pipe(self.process.stdin).flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


# -- the daemon ---------------------------------------------------------------------------------------------


def test_own_daemon_starts_answers_and_leaves_nothing(
    daemon: MpsDaemon, environ: dict[str, str], tmp_path: Path
) -> None:
    before = set(mps_processes())
    environment = daemon.start()
    assert daemon.owned and daemon.running() and daemon.servers() == ()
    assert MpsDaemon(tmp_path / "mps.log", environ).start()[PIPE_VARIABLE] == environment[PIPE_VARIABLE]
    assert set(mps_processes()) > before
    daemon.stop()
    assert set(mps_processes()) == before
    assert not Path(environment[PIPE_VARIABLE]).exists()


def test_the_daemon_tells_its_server_and_its_clients(daemon: MpsDaemon, environ: dict[str, str]) -> None:
    environment = {**environ, **daemon.start()}
    client = Client(environment, 0, "hold")
    try:
        assert client.line() == "ready"
        console = MpsConsole(Path(environment[PIPE_VARIABLE]), environ)
        words = ("get_server_list", "ps", "get_default_active_thread_percentage")
        raw = {word: console.ask(word) for word in words}
        servers = daemon.servers()
        for server in servers or ():
            for word in ("get_server_status", "get_client_list"):
                raw[f"{word} {server.pid}"] = console.ask(f"{word} {server.pid}")
        note("mps_console", raw=raw, servers=servers, processes=mps_processes())
        assert servers is not None and len(servers) == 1, raw
        assert servers[0].status == "ACTIVE", raw
        assert client.process.pid in {each.pid for each in servers[0].clients}, raw
        uuids = tuple(gpu.uuid for gpu in NvmlInventory().read())
        assert client.process.pid in clients_by_gpu(servers, uuids)[0], raw
        if len(uuids) > 1 and servers[0].clients[0].device:
            assert client.process.pid not in clients_by_gpu(servers, uuids)[1], raw
        assert console.default_percent() == 100.0, raw
    finally:
        client.end()


def test_percentages_give_what_they_say(daemon: MpsDaemon, environ: dict[str, str]) -> None:
    environment = {**environ, **daemon.start()}
    table = measure_percentages(environment, 0)
    note("mps_percentages", table={f"{p:g}": sms for p, sms in table.items()}, step=granularity(table))
    ordered = [table[p] for p in sorted(table)]
    assert ordered == sorted(ordered) and ordered[0] >= 1
    step = granularity(table)
    assert step is not None
    for percent, sms in table.items():
        assert abs(sms - percent / 100 * table[100]) <= 2 * step, table


def test_a_client_cannot_take_more_memory_than_its_limit(daemon: MpsDaemon, environ: dict[str, str]) -> None:
    environment = {**environ, **daemon.start()}
    outcome = {}
    for limit_mib, wanted_mib in (("2048", 256), ("2048", 4096), ("", 4096)):
        client = Client({**environment, "LIMIT_MIB": limit_mib}, 0, "allocate", wanted_mib)
        outcome[limit_mib, wanted_mib] = int(client.line())
        client.end()
    note("mps_memory_limit", outcome={f"limit {a or 'none'}, asked {b}": s for (a, b), s in outcome.items()})
    assert outcome["2048", 256] == 0
    assert outcome["2048", 4096] == OUT_OF_MEMORY
    assert outcome["", 4096] == 0, "without a limit there is room"


# -- serve --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuSite]:
    """Two models on GPU 0 under one `dstackctl serve`, which each test leaves as sound as it was. What serve
    and Triton said goes to $OUT."""
    folder = tmp_path_factory.mktemp("mps-site")
    with private_runtime() as private:
        site = GpuSite(folder, ("one", "two"), private, gpus="gpus: [ 0 ]")
        try:
            site.start_serve()
            yield site
        finally:
            try:
                site.stop()
            finally:
                logs = [folder / "serve.err", *sorted((site.state / "logs").glob("*.log"))]
                tails = {
                    each.name: each.read_text(errors="replace")[-8000:] for each in logs if each.exists()
                }
                note("mps_logs", decisions=site.decisions(), **tails)


def well(site: GpuSite, known: int) -> set[str]:
    """The models that came back, by the decision log from entry `known` on."""
    return {e["subject"] for e in site.decisions()[known:] if e["what"] == "healed"}


def heal(site: GpuSite, load: Load, name: str, killed_s: float) -> None:
    """Both models answer again, and nobody was answered wrongly; figures are kept."""
    wait_until("both models answer again", all_grow(load.counts, by=20), RECOVERS_WITHIN_S)
    recovered_s = time.monotonic() - killed_s
    failed = load.failed()
    note(
        name,
        recovered_s=recovered_s,
        failed=len(failed),
        answered=load.total(),
        reasons=sorted(set(failed))[:20],
    )
    assert not [why for why in failed if "wrong answer" in why], failed[:5]


def test_serve_brings_mps_and_takes_it_away(tmp_path: Path) -> None:
    before = set(mps_processes())
    with private_runtime() as private:
        site = GpuSite(tmp_path, ("one",), private, gpus="gpus: [ 0 ]")
        try:
            site.start_serve()
            assert set(mps_processes()) > before
            with Load(site.url, site.models) as load:
                load.wait_for(20)
            assert not load.failed()
            pids = {client.pid for server in console(site).servers() or () for client in server.clients}
            assert set(site.stubs()) <= pids, "the models' processes are clients of the daemon"
        finally:
            site.stop()
    assert set(mps_processes()) == before


def console(site: GpuSite) -> MpsConsole:
    return MpsConsole(Path(site.env["XDG_RUNTIME_DIR"]) / "dstack" / "mps", os.environ)


def test_a_model_over_its_memory_limit_does_not_load_and_says_so(site: GpuSite) -> None:
    """64 MiB do not hold a CUDA context; the old version serves on."""
    config = site.repository / "one" / "config.pbtxt"
    good = config.read_text()
    limit = 'parameters { key: "process_memory_limit_mb" value { string_value: "64" } }\n'
    with TritonClient(site.url) as client, Load(site.url, site.models) as load:
        load.wait_for(20)
        config.write_text(good + limit)
        with pytest.raises(ServerError) as error:
            client.load("one")
        note("mps_memory_limit", refused=str(error.value))
        config.write_text(good + limit.replace('"64"', '"4096"'))
        client.load("one")
        load.wait_for(load.total() + 50)
        assert not [why for why in load.failed() if "wrong answer" in why]


def test_a_killed_daemon_under_load_is_healed_and_nobody_gets_a_wrong_answer(site: GpuSite) -> None:
    with Load(site.url, site.models) as load:
        load.wait_for(50)
        before = site.stubs()
        killed_s = time.monotonic()
        site.daemon().send_signal(signal.SIGKILL)
        wait_until(
            "the old processes have ended", lambda: not set(before) & set(site.stubs()), RECOVERS_WITHIN_S
        )
        heal(site, load, "mps_daemon_killed", killed_s)
    assert set(site.stubs()) <= {c.pid for s in console(site).servers() or () for c in s.clients}


def test_idle_models_notice_a_dead_daemon_before_a_request_comes(site: GpuSite) -> None:
    with Load(site.url, site.models) as load:
        load.wait_for(20)
    before, known = site.stubs(), len(site.decisions())
    killed_s = time.monotonic()
    site.daemon().send_signal(signal.SIGKILL)
    both = set(site.models)
    wait_until(
        "both models have new processes",
        lambda: not set(before) & set(site.stubs()) and set(site.stubs().values()) == both,
        RECOVERS_WITHIN_S,
    )
    wait_until("both are well again", lambda: well(site, known) >= both, RECOVERS_WITHIN_S)
    note("mps_daemon_killed_idle", recovered_s=time.monotonic() - killed_s)
    with Load(site.url, site.models) as load:
        load.wait_for(50)
    assert not load.failed()


def test_a_client_that_crashes_on_the_gpu_takes_nobody_down_for_good(site: GpuSite) -> None:
    """A fatal error of one MPS client breaks the contexts of all on its GPU: they come back."""
    rogue = Client({**os.environ, PIPE_VARIABLE: str(console(site).pipe_dir)}, 0, "crash")
    try:
        with Load(site.url, site.models) as load:
            load.wait_for(50)
            assert rogue.line() == "ready"
            killed_s = time.monotonic()
            rogue.say()
            status = int(rogue.line())
            assert status, "the bad kernel did no harm"
            rogue.end()
            time.sleep(1.0)
            heal(site, load, "mps_client_crashed", killed_s)
            note("mps_client_crashed", status=status)
    finally:
        rogue.end()


def test_a_triton_whose_own_context_died_with_the_daemon_is_started_again(site: GpuSite) -> None:
    """It loads on for a while: the driver has streams in reserve."""
    repository = DiskRepository(site.repository)
    loads, known = 0, len(site.decisions())
    site.daemon().send_signal(signal.SIGKILL)
    wait_until("both are well again", lambda: well(site, known) >= set(site.models), RECOVERS_WITHIN_S)
    with TritonClient(site.url) as client, Load(site.url, site.models) as load:
        load.wait_for(20)
        with pytest.raises(ServerError, match="lost its own CUDA context"):
            while loads < MANY_LOADS:
                repository.make_newer("one")
                client.load("one")
                loads += 1
        lost_s = time.monotonic()
        wait_until("serve has noticed", lambda: not client.is_ready(), RECOVERS_WITHIN_S)
        heal(site, load, "triton_without_gpu", lost_s)
        note("triton_without_gpu", loads_before=loads)
        repository.make_newer("one")
        client.load("one")


def test_doctor_sees_the_gpu_mps_and_the_cuda_provider() -> None:
    checks = {each.name: each for each in run_checks()}
    for name in ("GPU", "MPS", "onnxruntime"):
        assert checks[name].ok, checks[name]
    assert "CUDA" in checks["onnxruntime"].found
