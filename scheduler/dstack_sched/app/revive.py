"""Bring a model back whose processes died, or that a restarted Triton has not loaded."""

from __future__ import annotations

from dstack_sched.errors import InputError, ServerError
from dstack_sched.ports import Clock, ModelRepository, ModelServer

READY_TIMEOUT_S = 120.0
POLL_S = 0.05


class Reviver:
    """Loads models over the control API. For one thread or several.

    half_done: models that were unloaded on the way and have not been loaded again.
    """

    def __init__(self, repository: ModelRepository, server: ModelServer, clock: Clock) -> None:
        self._repository = repository
        self._server = server
        self._clock = clock
        self.half_done: set[str] = set()

    def restart(self, model: str) -> str:
        """New stub processes for a model that is served; its config stays. Says how it was done.

        Triton starts none for a plain load, nor for a newer config of equal content: a file of a version
        must be newer (decisions/0030). Where time stamps cannot be set (a read-only repository) the model is
        unloaded first: those of its instances that still live then refuse requests for a moment, too.
        Errors: ServerError where the load fails.
        """
        try:
            self._repository.make_newer(model)
        except InputError as error:
            self.half_done.add(model)
            self._server.unload(model)
            self.load(model)
            return f"unloaded and loaded again, with new stub processes ({error})"
        self.load(model)
        return "loaded again, with new stub processes"

    def load(self, model: str) -> None:
        """Load as it is on disk; returns when it takes requests. Errors: ServerError."""
        self._server.load(model)
        until_us = self._clock.now_us() + round(READY_TIMEOUT_S * 1e6)
        while not self._server.is_model_ready(model):
            if self._clock.now_us() > until_us:
                raise ServerError(f"{model}: not ready within {READY_TIMEOUT_S:g} s of its load")
            self._clock.sleep_s(POLL_S)
        self.half_done.discard(model)
