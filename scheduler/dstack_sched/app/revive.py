"""Bring a model back whose processes died, or that a restarted Triton has not loaded."""

from __future__ import annotations

from dstack_sched.errors import ServerError
from dstack_sched.ports import Clock, ModelRepository, ModelServer

READY_TIMEOUT_S = 120.0
POLL_S = 0.05


class Reviver:
    """Loads models over the control API. For one thread or several."""

    def __init__(self, repository: ModelRepository, server: ModelServer, clock: Clock) -> None:
        self._repository = repository
        self._server = server
        self._clock = clock

    def restart(self, model: str) -> None:
        """New stub processes for a model that is served, make-before-break; its config stays.

        Triton starts none for a plain load, nor for a newer config of equal content: a file of a version
        must be newer (decisions/0030). Errors: InputError where time stamps cannot be set (a read-only
        repository), ServerError where the load fails.
        """
        self._repository.make_newer(model)
        self.load(model)

    def load(self, model: str) -> None:
        """Load as it is on disk; returns when it takes requests. Errors: ServerError."""
        self._server.load(model)
        until_us = self._clock.now_us() + round(READY_TIMEOUT_S * 1e6)
        while not self._server.is_model_ready(model):
            if self._clock.now_us() > until_us:
                raise ServerError(f"{model}: not ready within {READY_TIMEOUT_S:g} s of its load")
            self._clock.sleep_s(POLL_S)
