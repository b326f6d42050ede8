"""The measuring worker without a process: sampling, made-up inputs, the protocol."""

from __future__ import annotations

import argparse
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from dstack_backend import measure
from dstack_backend.measure import (
    Flight,
    Loop,
    Worker,
    drift,
    half_width,
    parse_levels,
    parse_shape,
    sample,
    serve,
    summary,
)
from dstack_backend.synthetic import feeds
from dstack_backend.tensors import TensorSpec


class Ticker:
    """A clock that runs advance; latencies come from a list, its last one for ever."""

    def __init__(self, *latencies_s: float) -> None:
        self.now_s, self.latencies_s, self.runs = 0.0, list(latencies_s), 0

    def clock(self) -> float:
        return self.now_s

    def run(self) -> None:
        self.now_s += self.latencies_s[min(self.runs, len(self.latencies_s) - 1)]
        self.runs += 1


def test_a_steady_model_is_measured_quickly() -> None:
    ticker = Ticker(5.0, 0.010)
    taken = sample(ticker.run, 1.0, ticker.clock)
    assert set(np.round(taken, 6)) == {10.0}
    assert measure.MIN_SAMPLES <= len(taken) <= 30, "0.2 s of it"
    assert ticker.now_s < 5.0 + 0.5, "the long first run (graph capture) is not on the time of measuring"


def test_warm_up_is_not_measured() -> None:
    """Clocks of an idle GPU come up during the first runs."""
    ticker = Ticker(0.9, *[0.030] * 5, 0.010)
    assert max(sample(ticker.run, 1.0, ticker.clock)) == pytest.approx(10.0)


def test_a_drifting_clock_is_waited_for() -> None:
    falling = [0.02 * 0.97**i for i in range(60)]
    ticker = Ticker(*falling, 0.002)
    taken = sample(ticker.run, 3.0, ticker.clock)
    assert np.median(taken) < 3.0, "the slow beginning does not count in the median"


def test_a_slow_model_is_measured_at_least_once_and_not_for_ever() -> None:
    ticker = Ticker(3.0)
    assert sample(ticker.run, 1.0, ticker.clock) == [3000.0]
    assert ticker.runs <= 3
    noisy = Ticker(*np.random.default_rng(1).uniform(0.001, 0.1, 500))
    assert len(sample(noisy.run, 2.0, noisy.clock)) < 100
    assert noisy.now_s < 2.3


def test_one_outlier_moves_p99_and_not_the_median() -> None:
    found = summary([10.0] * 99 + [50.0])
    assert (found["latency_ms_p50"], found["latency_ms_p99"], found["samples"]) == (10.0, 50.0, 100)
    assert half_width([10.0] * 50) == 0.0
    assert half_width(list(np.linspace(5, 15, 50))) > 0.05
    assert drift([10.0] * 10 + [5.0] * 10) == pytest.approx(0.5)


def spec(name: str, dtype: str, *dims) -> TensorSpec:
    return TensorSpec(name, dtype, tuple(dims))


def test_inputs_suit_their_names_and_types() -> None:
    made = feeds(
        [
            spec("input_ids", "tensor(int64)", "batch", "sequence"),
            spec("attention_mask", "tensor(int64)", "batch", "sequence"),
            spec("token_type_ids", "tensor(int32)", "batch", "sequence"),
            spec("image", "tensor(float16)", "batch", 3, "height", "width"),
            spec("text", "tensor(string)", "batch", 1),
            spec("sr", "tensor(int64)"),
        ],
        4,
        {"image": (3, 32, 48)},
    )
    assert made["input_ids"].shape == (4, 128)
    assert made["input_ids"].min() > 0 and made["input_ids"].max() < 100
    assert (made["attention_mask"] == 1).all()
    assert (made["token_type_ids"] == 0).all() and made["token_type_ids"].dtype == np.int32
    assert made["image"].shape == (4, 3, 32, 48) and made["image"].dtype == np.float16
    assert made["image"].std() > 0.5, "zeros can run faster than real data"
    assert made["text"].shape == (4, 1) and made["text"][0, 0] == "text"
    assert made["sr"].shape == () and made["sr"] == 16000


def test_recurrent_state_takes_the_batch_where_it_is_named_so() -> None:
    inputs = [spec("input", "tensor(float)", "n", 576), spec("state", "tensor(float)", 2, "n", 128)]
    made = feeds(inputs, 3, {})
    assert made["state"].shape == (2, 3, 128)
    whole = feeds(inputs, 1, {"input": (1, 576), "state": (2, 1, 128)})
    assert whole["state"].shape == (2, 1, 128), "a config without a batch dimension gives whole shapes"


def test_what_does_not_fit_is_said() -> None:
    fixed = [spec("x", "tensor(float)", 4, 8)]
    assert feeds(fixed, 1, {})["x"].shape == (4, 8), "one run of a fixed batch counts as one row"
    with pytest.raises(ValueError, match="the batch of this model is fixed"):
        feeds(fixed, 2, {})
    free = [spec("x", "tensor(float)", None, 8)]
    with pytest.raises(ValueError, match="no input is named 'z'"):
        feeds(free, 2, {"z": (8,)})
    with pytest.raises(ValueError, match="has a dimension of 8, 9 does not fit"):
        feeds(free, 2, {"x": (9,)})
    with pytest.raises(ValueError, match="has 1 dimensions beside the batch, not 3"):
        feeds(free, 2, {"x": (1, 2, 3)})


class FakeSession:
    inputs = (spec("x", "tensor(float)", "batch", 8),)

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.fail = False
        self.open = 0  # batches staged and not closed yet

    def allocate(self, shape, dtype):
        return np.empty(shape, dtype)

    def stage(self, batch):
        self.open += 1
        return SimpleNamespace(batch=batch, close=self.closed)

    def launch(self, staged, **share):
        self.run(staged.batch, None, **share)
        return SimpleNamespace(wait=lambda: None, outputs=list, close=self.closed)

    def closed(self) -> None:
        self.open -= 1

    def run(self, batch, outputs):
        if self.fail:
            self.open -= 1  # a launch that fails uses its batch up
            raise RuntimeError("device lost\nat line 3")
        self.rows.append(batch["x"].shape[0])

    def warm_up(self, batch_sizes) -> None:
        """As a CPU session: nothing to prepare."""

    def forget(self) -> None:
        """As a CPU session: nothing kept."""


def talk(session: FakeSession, *commands) -> list[dict]:
    worker = Worker(session, {}, lambda: 123, lambda: 456)
    answers = io.StringIO()
    serve(
        worker,
        io.StringIO("".join(f"{c if isinstance(c, str) else json.dumps(c)}\n" for c in commands)),
        answers,
    )
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_the_protocol_measures_and_ends_with_its_input() -> None:
    session = FakeSession()
    measured, used = talk(session, {"do": "measure", "batch_size": 3, "cap_s": 0.01}, {"do": "used"})
    assert measured["samples"] >= 1 and measured["latency_ms_p50"] > 0 and measured["memory_bytes"] == 123
    assert set(session.rows) == {3} and not session.open
    assert used == {"device_used_bytes": 456}
    assert talk(FakeSession(), {"do": "exit"}, {"do": "used"}) == []


class BucketSession(FakeSession):
    """As the CUDA session: what a batch size needs is made by warm_up() and kept until forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.story: list[object] = []

    def warm_up(self, batch_sizes) -> None:
        self.story.append(list(batch_sizes))

    def forget(self) -> None:
        self.story.append("forget")


def test_sizes_made_ready_are_kept_and_others_are_forgotten() -> None:
    session = BucketSession()
    sizes = (4, 1, 16, 8)
    talk(
        session,
        {"do": "prepare", "batch_sizes": [4, 1]},
        *({"do": "measure", "batch_size": size, "cap_s": 0.01} for size in sizes),
    )
    assert session.story == [[1, 4], [4], [1], [16], "forget", [8], "forget"]


class LevelSession(FakeSession):
    """As a session with levels: a run takes the share it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[dict] = []

    def run(self, batch, outputs, **share):
        self.shares.append(share)


def test_a_share_travels_to_every_run_and_is_left_out_where_none_is_named() -> None:
    session = LevelSession()
    share = {"gpu_percent": 25.0, "sm_groups": 15}
    talk(
        session,
        {"do": "measure", "batch_size": 2, "cap_s": 0.01, **share},
        {"do": "loop", "batch_size": 2, **share},
        {"do": "stop"},
    )
    assert session.shares and all(each == share for each in session.shares)
    session.shares.clear()
    talk(session, {"do": "measure", "batch_size": 2, "cap_s": 0.01})
    assert session.shares and not any(session.shares)


@pytest.mark.parametrize("text", ["", "25,", "half"])
def test_levels_are_percentages_by_comma(text: str) -> None:
    assert parse_levels("12.5,25") == (12.5, 25.0)
    with pytest.raises(argparse.ArgumentTypeError, match="wanted GPU percentages by comma"):
        parse_levels(text)


def test_every_failure_is_one_line_and_the_worker_goes_on() -> None:
    session = FakeSession()
    session.fail = True
    answers = talk(
        session,
        {"do": "measure", "batch_size": 1},
        "not json",
        {"do": "dance"},
        {"do": "stop"},
        {"do": "used"},
    )
    assert [next(iter(a)) for a in answers] == ["error"] * 4 + ["device_used_bytes"]
    assert answers[0]["error"] == "RuntimeError: device lost at line 3"
    assert "stop: no loop is running" in answers[3]["error"]


def test_a_loop_counts_from_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    ticker = Ticker(0.01)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=ticker.clock))
    loop = Loop(SimpleNamespace(run=ticker.run), 8)
    ticker.latencies_s = [0.5]
    loop.step()
    loop.mark()
    ticker.latencies_s = [0.02]
    for _ in range(10):
        assert loop.step()
    result = loop.result()
    assert result["latency_ms_p50"] == pytest.approx(20.0)
    assert result["throughput_per_s"] == pytest.approx(400.0)
    assert result["samples"] == 10


def test_a_loop_that_fails_says_so_when_asked() -> None:
    session = FakeSession()
    loop = Loop(Flight(session, {"x": np.zeros((1, 8))}, {}, ahead=1), 1)
    session.fail = True
    assert loop.step() is False
    with pytest.raises(RuntimeError, match="device lost"):
        loop.result()
    loop.flight.close()
    assert not session.open


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_flight_launches_as_far_ahead_as_told(ahead: int) -> None:
    story: list[str] = []
    session = FakeSession()
    launch = session.launch

    def told(staged, **share):
        number = len(session.rows)
        story.append(f"launch {number}")
        running = launch(staged, **share)
        running.wait = lambda: story.append(f"wait {number}")
        return running

    session.launch = told
    flight = Flight(session, {"x": np.zeros((2, 8), np.float32)}, {}, ahead)
    for _ in range(3):
        flight.run()
    assert story == (
        ["launch 0", "wait 0", "launch 1", "wait 1", "launch 2", "wait 2"]
        if not ahead
        else ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1"]
    )
    flight.close()
    assert not session.open


@pytest.mark.parametrize(
    ("text", "wanted"), [("x:3,224,224", ("x", (3, 224, 224))), ("a:b:5", ("a:b", (5,)))]
)
def test_shapes_on_the_command_line(text: str, wanted) -> None:
    assert parse_shape(text) == wanted


@pytest.mark.parametrize("text", ["x", ":3", "x:3,y", "x:0"])
def test_bad_shapes_on_the_command_line(text: str) -> None:
    with pytest.raises(Exception, match="NAME:D1,D2"):
        parse_shape(text)
