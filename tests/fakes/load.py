"""Clients of a real Triton: they send, without pause or at a rate, check every answer and note failures."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from dstack_sched.adapters.triton_client import CHANNEL_ARGUMENTS
from fakes.onnx_models import WIDTH, SlowSum

ANSWER_WITHIN_S = 6.0  # what was inside a killed stub is never answered by Triton 2.51
AFTER_A_FAILURE_S = 0.05


@dataclass(frozen=True)
class Failure:
    """A request that got no right answer. Times of the monotonic clock."""

    model: str
    sent_s: float
    ended_s: float
    why: str


class Load:
    """`clients` threads a model, running from the start until `stop`; a context manager.

    rates: model -> requests per second of all its clients together (Poisson); a model without one is loaded
    in closed loop. It may be changed while they run. slo_ms: what counts as in time, for `in_time`.
    """

    def __init__(
        self,
        url: str,
        models: Mapping[str, SlowSum],
        *,
        clients: int = 3,
        rates: Mapping[str, float] | None = None,
        answer_within_s: float = ANSWER_WITHIN_S,
        slo_ms: float = 250.0,
    ) -> None:
        self.url = url
        self.models = models
        self.rates = dict(rates or {})
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.in_time: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._clients = clients
        self._answer_within_s = answer_within_s
        self._slo_s = slo_ms / 1000
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(name, seed), name=f"client-{name}-{seed}")
            for name in models
            for seed in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns when every client has its last answer. Fails where a request hangs."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._answer_within_s + 5)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def counts(self) -> dict[str, int]:
        """Right answers by model, zeros included."""
        with self._lock:
            return {name: self.answered[name] for name in self.models}

    def total(self) -> int:
        """Right answers so far."""
        return sum(self.counts().values())

    def wait_for(self, answers: int, within_s: float = 120.0) -> None:
        """Until so many right answers have come."""
        wait_until(f"{answers} answers", lambda: self.total() >= answers, within_s)

    def failed(self, *names: str, sent_after_s: float = 0.0) -> list[str]:
        """Why requests to these models (none: all) failed."""
        with self._lock:
            return [
                f"{each.model}: {each.why}"
                for each in self.failures
                if each.model in (names or self.models) and each.sent_s >= sent_after_s
            ]

    def _client(self, name: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        gaps = random.Random(f"{name} {seed}")
        tensor = grpcclient.InferInput(f"x_{name}", [1, WIDTH], "FP32")
        with grpcclient.InferenceServerClient(self.url, channel_args=CHANNEL_ARGUMENTS) as client:
            while not self._stop.wait(self._pause_s(name, gaps)):
                x = rng.standard_normal((1, WIDTH)).astype(np.float32)
                tensor.set_data_from_numpy(x)
                sent_s, why = time.monotonic(), ""
                with self._lock:
                    self.sent[name] += 1
                try:
                    answer = client.infer(name, [tensor], client_timeout=self._answer_within_s)
                    if not np.allclose(
                        answer.as_numpy(f"y_{name}"), self.models[name].expected(x), atol=1e-3
                    ):
                        why = "wrong answer"
                except InferenceServerException as error:
                    why = str(error)
                self._ended(name, sent_s, why)
                if why:
                    self._stop.wait(AFTER_A_FAILURE_S)

    def _pause_s(self, name: str, gaps: random.Random) -> float:
        rate = self.rates.get(name)
        return gaps.expovariate(rate / self._clients) if rate else 0.0

    def _ended(self, name: str, sent_s: float, why: str) -> None:
        now_s = time.monotonic()
        with self._lock:
            if why:
                self.failures.append(Failure(name, sent_s, now_s, why))
                return
            self.answered[name] += 1
            self.in_time[name] += now_s - sent_s <= self._slo_s


def wait_until(what: str, holds: Callable[[], object], within_s: float = 15.0) -> float:
    """Seconds it took. Fails with `what` where it does not come true."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def all_grow(
    count: Callable[[], Mapping[str, int]], by: int = 5, names: Collection[str] | None = None
) -> Callable[[], bool]:
    """A condition: every one of these counts is `by` more than now."""
    before = dict(count())
    wanted: Iterable[str] = before if names is None else names

    def grown() -> bool:
        now = count()
        return all(now.get(name, 0) >= before.get(name, 0) + by for name in wanted)

    return grown
