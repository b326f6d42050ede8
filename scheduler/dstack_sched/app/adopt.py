"""Take over models of Triton's onnxruntime backend as a repository has them, and give them back.

Adopting changes `backend` and, where the config asks something of onnxruntime that we have a parameter for,
adds that parameter; all else stays byte for byte. The original of each config is kept before the first file
is touched, so that it can be restored byte for byte at any time, also after plans have rewritten the config
or a crash came in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dstack_sched.app.edits import ConfigEdits, Done, Step
from dstack_sched.app.suitability import suitability
from dstack_sched.domain.adoption import Suitability, Verdict
from dstack_sched.domain.change import ConfigEdit
from dstack_sched.domain.model_config import BACKEND, ConfigChange
from dstack_sched.errors import InputError
from dstack_sched.ports import AdoptableRepository, ModelLook

EDITED = "edited since its adoption"


class Adoption:
    """Decides for one repository; changes go through ConfigEdits, whose lock is held meanwhile."""

    def __init__(self, repository: AdoptableRepository, look: ModelLook) -> None:
        self._repository = repository
        self._look = look

    # -- adopt ------------------------------------------------------------------------------------------

    def judge(self, models: Iterable[str], *, without_accelerators: bool = False) -> tuple[Verdict, ...]:
        """What would become of each model; nothing is touched. A config that does not parse is a verdict."""
        return tuple(self._judge(model, without_accelerators) for model in models)

    def _judge(self, model: str, without_accelerators: bool) -> Verdict:
        try:
            facts = self._look.facts(model)
            found = suitability(facts, without_accelerators=without_accelerators)
            if found.decision == "adopt":
                self._repository.check_writable(model)
                self._look.check(facts, found)
                return self._adopting(model, facts.text, found)
        except InputError as error:
            return Verdict(model, "leave", str(error))
        return Verdict(model, found.decision, found.why, found.notes, facts.text, facts.text)

    def _adopting(self, model: str, text: str | None, found: Suitability) -> Verdict:
        new_text = self._repository.edited(model, ConfigChange(BACKEND, dict(found.parameters)))
        return Verdict(model, "adopt", "", found.notes, text, new_text)

    def adopt(
        self, verdicts: Sequence[Verdict], edits: ConfigEdits, states: Mapping[str, str] | None, *, load: bool
    ) -> list[Done]:
        """Adopt those models whose verdict says so, one at a time, all or nothing.

        states: model -> its state on the server; None: there is none. load: the server loads each.
        Raises InputError with all as it was before.
        """
        wanted = [verdict for verdict in verdicts if verdict.decision == "adopt"]
        if not wanted:
            return []
        loaded = {
            verdict.model: states.get(verdict.model) == "READY" if states is not None else None
            for verdict in wanted
        }
        self._repository.keep_originals(
            {verdict.model: (verdict.old_text, loaded[verdict.model]) for verdict in wanted}
        )
        steps = [
            Step(
                ConfigEdit(
                    verdict.model,
                    verdict.old_text,
                    verdict.new_text,
                    bool(loaded[verdict.model]),
                    "load" if load else "nothing",
                ),
                "becomes a dstack model",
                is_ours,
            )
            for verdict in wanted
        ]
        return edits.put_in_force(steps, "its adoption")

    # -- revert -----------------------------------------------------------------------------------------

    def judge_back(self, models: Iterable[str], *, force: bool = False) -> tuple[Verdict, ...]:
        """What would become of each model; nothing is touched. force: edited configs are given up, too."""
        return tuple(self._judge_back(model, force) for model in models)

    def _judge_back(self, model: str, force: bool) -> Verdict:
        original = self._repository.original(model)
        text = self._repository.read_config(model)
        if original is None:
            return Verdict(model, "already", "it was not adopted", (), text, text)
        if original.edited and not force:
            return Verdict(model, "leave", EDITED, (), text, original.text)
        notes = ("what was edited by hand since its adoption goes",) if original.edited else ()
        return Verdict(model, "revert", "", notes, text, original.text)

    def revert(
        self, verdicts: Sequence[Verdict], edits: ConfigEdits, states: Mapping[str, str] | None
    ) -> list[Done]:
        """Restore the originals of those models whose verdict says so.

        A model that the server served before its adoption is loaded from its original, one that it did not is
        unloaded; without states the server is left alone. An original that does not load is back on disk all
        the same, and the adopted version serves on: Done.error tells.
        """
        steps = [
            Step(self._edit_back(verdict, states), "goes back", lambda config: not is_ours(config))
            for verdict in verdicts
            if verdict.decision == "revert"
        ]
        return edits.put_in_force(steps, "its way back")

    def _edit_back(self, verdict: Verdict, states: Mapping[str, str] | None) -> ConfigEdit:
        original = self._repository.original(verdict.model)
        ready = states is not None and states.get(verdict.model) == "READY"
        then: Any = "nothing"
        if ready:
            then = "unload" if original is not None and original.was_loaded is False else "load"
        return ConfigEdit(verdict.model, verdict.old_text, verdict.new_text, ready, then, keep=True)


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a config as Triton reports it is one of a dstack model."""
    return bool(config.get("backend") == BACKEND)
