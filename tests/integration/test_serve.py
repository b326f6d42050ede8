"""`dstackctl serve` as a user runs it: up, a killed arbiter back, Ctrl-C, nothing left; and bad input."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from dstack_sched.adapters.arbiter_process import ArbiterProcess
from fakes.feature_models import plus, save
from fakes.site import Served, serve_command

TIMEOUT_S = 60.0


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"timed out: {what}"
        time.sleep(0.05)


def add_model(repository: Path, name: str, number: float) -> None:
    save(plus(number), repository / name / "1" / "model.onnx")
    (repository / name / "config.pbtxt").write_text('backend: "dstack"\n')


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Served]:
    add_model(tmp_path / "repository", "one", 1.0)
    add_model(tmp_path / "repository", "two", 2.0)
    running = Served(tmp_path / "repository", tmp_path)
    yield running
    running.stop()


def ask(url: str, model: str) -> list[float]:
    x = triton.InferInput("x", [1, 4], "FP32")
    x.set_data_from_numpy(np.zeros((1, 4), np.float32))
    with triton.InferenceServerClient(url) as client:
        return list(client.infer(model, [x]).as_numpy("y")[0])


def test_serve_heals_its_arbiter_and_ctrl_c_leaves_nothing(serving: Served, tmp_path: Path) -> None:
    printed = serving.printed
    assert printed["models"] == {"one": True, "two": True}
    url = printed["urls"]["grpc"]
    assert ask(url, "one") == [1.0] * 4 and ask(url, "two") == [2.0] * 4

    arbiter = next(each for each in serving.descendants() if "arbiter" in each.cmdline()[3:4])
    arbiter.kill()
    assert ask(url, "one") == [1.0] * 4, "requests go on without the arbiter"
    wait_for(lambda: "starting it again" in serving.said(), "the death is reported")
    again = ArbiterProcess(tmp_path / "arbiter.sock", tmp_path / "unused.log")
    wait_for(again.answers, "it answers again")
    assert ask(url, "two") == [2.0] * 4

    everything = serving.descendants()
    assert len(everything) >= 6, "two keepers, arbiter, Triton, two stubs"
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(TIMEOUT_S) == 0
    assert not [each for each in everything if each.is_running()]
    assert not (tmp_path / "arbiter.sock").exists()
    assert not list(Path("/dev/shm").glob(f"dstack_{serving.process.pid}_*"))
    for use_url in printed["urls"].values():
        host, _, port = use_url.partition(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


def test_kill_9_of_serve_leaves_nothing_either(serving: Served) -> None:
    everything = serving.descendants()
    serving.process.kill()
    serving.process.wait()
    wait_for(lambda: not [each for each in everything if each.is_running()], "all processes end")
    wait_for(lambda: not list(Path("/dev/shm").glob(f"dstack_{serving.process.pid}_*")), "regions go")


@pytest.mark.slow
def test_a_triton_that_keeps_dying_ends_serve_with_a_reason(serving: Served) -> None:
    everything = serving.descendants()
    while serving.process.poll() is None:
        triton_process = serving.triton()
        if triton_process is not None:
            triton_process.kill()
            everything += serving.descendants()
        time.sleep(0.2)
    assert serving.process.returncode == 2
    said = serving.said()
    assert said.count("Triton ended with status 137") >= 5
    assert "restarts did not help" in said.splitlines()[-1]
    wait_for(lambda: not [each for each in everything if each.is_running()], "all processes end")


def test_a_model_that_does_not_load_is_named_and_the_others_are_served(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    add_model(repository, "good", 1.0)
    add_model(repository, "bad", 1.0)
    (repository / "bad" / "1" / "model.onnx").write_bytes(b"\x08\x09 truncated")
    running = Served(repository, tmp_path)
    try:
        assert running.printed["models"] == {"bad": False, "good": True}
        assert "bad: not served: " in running.said()
        assert ask(running.printed["urls"]["grpc"], "good") == [1.0] * 4
    finally:
        running.stop()


def refusal(arguments: Sequence[str], **environ: str) -> str:
    """The one line with which a command ends, with exit status 2."""
    run = subprocess.run(
        arguments, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environ}
    )
    lines = run.stderr.splitlines()
    assert (run.returncode, run.stdout, len(lines)) == (2, "", 1), run.stderr
    return lines[0]


def test_bad_input_is_one_line_and_exit_2(tmp_path: Path) -> None:
    empty, missing, file = tmp_path / "empty", tmp_path / "missing", tmp_path / "file"
    empty.mkdir()
    file.touch()
    assert f"model repository {missing}: no such directory" in refusal(serve_command(missing, tmp_path))
    assert f"model repository {empty}: empty" in refusal(serve_command(empty, tmp_path))
    assert f"model repository {file}: not a directory" in refusal(serve_command(file, tmp_path))

    repository = tmp_path / "repository"
    add_model(repository, "one", 1.0)
    nothing = refusal(serve_command(repository, tmp_path, "--tritonserver", str(tmp_path)))
    assert f"--tritonserver {tmp_path}: no Triton there" in nothing
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refusal(serve_command(repository, tmp_path, "--grpc-port", port))
        assert f"port {port} (grpc) on 127.0.0.1 is taken" in said and "--grpc-port" in said
    assert "state directory" in refusal(serve_command(repository, tmp_path, "--state", str(file)))
    assert not (tmp_path / "arbiter.sock").exists()
