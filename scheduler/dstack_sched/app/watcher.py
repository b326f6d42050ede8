"""One look at all that a plan rests on: arrivals, attainment, run times; forecasts and drift from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dstack_sched.app import drift
from dstack_sched.app.drift import DriftSettings, DriftWatch
from dstack_sched.app.forecast import Forecast, ForecastSettings, History
from dstack_sched.app.rates import ArrivalMeter, CounterDelta, Counts, failures
from dstack_sched.domain.profile import Correction, ModelProfile, ProfileSet
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import DstackError, ServerError
from dstack_sched.ports import Clock, ModelServer


class Sources(Protocol):
    """Where looks come from besides Triton's statistics. None of them fails: what is not known is missing."""

    def waiting(self) -> Mapping[str, int]:
        """Model -> requests that wait in Triton or in the backend."""
        ...

    def arbiter_models(self) -> Mapping[str, Mapping[str, Any]]:
        """Model -> the arbiter's totals: rows, late_rows, run_ms, grants; empty without an arbiter."""
        ...

    def run_times(self, model: str) -> Sequence[Seen]: ...


@dataclass(frozen=True, slots=True)
class ModelView:
    """What one look shows of a model; None: not known (yet). attainment: rows in time over rows answered or
    failed since the look before. drift: run times over the corrected profile's; run_ms: mean of a batch."""

    arrived_per_s: float | None = None
    forecast: Forecast | None = None
    attainment: float | None = None
    drift: float | None = None
    run_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """views: of every model. refits: model -> (new correction, why)."""

    views: Mapping[str, ModelView]
    refits: Mapping[str, tuple[Correction, str]] = field(default_factory=dict)

    def forecasts(self) -> dict[str, Forecast]:
        """Of the models that have one."""
        return {model: view.forecast for model, view in self.views.items() if view.forecast is not None}


class _Model:
    """What is remembered of one model from look to look."""

    def __init__(self, window_s: float) -> None:
        self.arrivals = ArrivalMeter()
        self.history = History(window_s)
        self.deltas = {name: CounterDelta() for name in ("failed", "rows", "late_rows", "run_ms", "grants")}
        self.drift: DriftWatch | None = None
        self.profile: ModelProfile | None = None


class Watcher:
    """Remembers what forecasts and drift need. `look` once a round, in one thread."""

    def __init__(
        self,
        models: Iterable[str],
        server: ModelServer,
        sources: Sources,
        clock: Clock,
        forecasting: ForecastSettings | None = None,
        drifting: DriftSettings | None = None,
    ) -> None:
        self._server = server
        self._sources = sources
        self._clock = clock
        self._forecasting = forecasting or ForecastSettings()
        self._drifting = drifting or DriftSettings()
        self._models: dict[str, _Model] = {}
        self.follow(models)

    def follow(self, models: Iterable[str]) -> None:
        """These from now on; what is known of those that stay is kept."""
        window_s = self._forecasting.window_s
        self._models = {model: self._models.get(model) or _Model(window_s) for model in models}

    def profiled(self, profiles: ProfileSet, stored: Mapping[str, Correction]) -> None:
        """The profiles as measured, to hold runs against; `stored`: corrections from before, by model."""
        slowdown = drift.slowdowns(profiles)
        for name, model in self._models.items():
            model.profile = profiles.models.get(name)
            known = stored.get(name)
            model.drift = drift.start(model.profile, known, slowdown.get(name)) if model.profile else None

    def corrections(self) -> dict[str, Correction]:
        """The corrections in use, by model."""
        return {name: model.drift.correction for name, model in self._models.items() if model.drift}

    def corrected(self, profiles: ProfileSet) -> ProfileSet:
        """The profiles as the models run now."""
        return drift.corrected_set(profiles, self.corrections())

    def look(self) -> Look:
        """One look. A model that cannot be read (not loaded just now) shows nothing new.

        Errors: ServerError when none can be read.
        """
        waiting = self._sources.waiting()
        totals = self._sources.arbiter_models()
        views: dict[str, ModelView] = {}
        refits: dict[str, tuple[Correction, str]] = {}
        failure: DstackError | None = None
        for name, model in self._models.items():
            try:
                statistics = self._server.statistics(name)
            except ServerError as error:
                failure = error
                views[name] = ModelView(forecast=model.history.forecast(self._forecasting))
                continue
            seen, refit = self._drift(name, model)
            if refit is not None:
                refits[name] = refit
            views[name] = self._view(
                name, model, statistics, waiting.get(name, 0), totals.get(name, {}), seen
            )
        if failure is not None and all(view.arrived_per_s is None for view in views.values()):
            raise failure
        return Look(views, refits)

    def _view(
        self,
        name: str,
        model: _Model,
        statistics: Mapping[str, Any],
        waiting: int,
        totals: Mapping[str, Any],
        seen: float | None,
    ) -> ModelView:
        step = model.arrivals.step(Counts.of(statistics, name), waiting, self._clock.now_us())
        if step is not None:
            model.history.add(*step)
        failed = model.deltas["failed"].step(failures(statistics, name))
        grown = {
            key: model.deltas[key].step(int(totals.get(key, 0)))
            for key in ("rows", "late_rows", "run_ms", "grants")
        }
        rows, late, run_ms, grants = (grown[key] or 0 for key in ("rows", "late_rows", "run_ms", "grants"))
        asked = rows + (failed or 0)
        return ModelView(
            arrived_per_s=step[1] / step[0] if step else None,
            forecast=model.history.forecast(self._forecasting),
            attainment=max(0.0, (rows - late) / asked) if asked and totals else None,
            drift=seen,
            run_ms=run_ms / grants if grants else None,
        )

    def _drift(self, name: str, model: _Model) -> tuple[float | None, tuple[Correction, str] | None]:
        if model.profile is None or model.drift is None:
            return None, None
        found = drift.look(model.drift, model.profile, self._sources.run_times(name), self._drifting)
        model.drift = found.watch
        return found.drift, (found.refit, found.why) if found.refit is not None else None
