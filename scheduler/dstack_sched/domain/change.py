"""Records of changes to a deployment: what is under way, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["unchanged", "told", "loaded", "reloaded"]


@dataclass(frozen=True, slots=True)
class ConfigEdit:
    """One model's rewrite under way. A text of None means: no config file.

    Kept in the journal from before the file is touched until the new version is known to serve. then: what
    the server is to do. keep: the new text stays on disk even where the server refuses it.
    """

    model: str
    old_text: str | None
    new_text: str | None
    was_ready: bool
    then: Literal["load", "unload", "nothing"] = "load"
    keep: bool = False

    @property
    def load(self) -> bool:
        return self.then == "load"


@dataclass(frozen=True, slots=True)
class ModelOutcome:
    """What was done for one model. told: its instances were told, the file states it, nothing was loaded.
    `old_stubs_gone` is None where they cannot be seen (a remote Triton)."""

    model: str
    action: Action
    gpu_percent: float
    batch_size: int
    load_s: float = 0.0
    old_stubs_gone: bool | None = None


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """A plan in force. `notes` are lines for people: what could not be checked, what was recovered."""

    outcomes: tuple[ModelOutcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def reloads(self) -> int:
        return sum(outcome.action == "reloaded" for outcome in self.outcomes)

    @property
    def loads(self) -> int:
        return sum(outcome.action in ("loaded", "reloaded") for outcome in self.outcomes)
