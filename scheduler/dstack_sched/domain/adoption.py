"""Records of taking models over from Triton's onnxruntime backend, and of giving them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# adopt: it becomes a dstack model; already: it is one; leave: it stays as it is, `why` says why.
# revert: it becomes again what it was before its adoption.
Decision = Literal["adopt", "already", "leave", "revert"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as it lies in a repository. config: what config.pbtxt states, as plain values, with defaults.

    first_files: the files in the first subdirectory by name, where Triton looks to tell a model's backend.
    versions: the numbered directories. other_configs: names in configs/, for --model-config-name.
    """

    name: str
    config: Mapping[str, Any]
    text: str | None
    first_files: frozenset[str] = frozenset()
    versions: tuple[int, ...] = ()
    other_configs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Suitability:
    """Whether a model can become a dstack model; `why` not, where it cannot.

    parameters: ours that keep the meaning of what its config asks of onnxruntime. notes: what will differ.
    versions: those that Triton would serve.
    """

    decision: Decision
    why: str = ""
    notes: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with a model. Texts of None: no config file."""

    model: str
    decision: Decision
    why: str = ""
    notes: tuple[str, ...] = ()
    old_text: str | None = None
    new_text: str | None = None

    @property
    def changes(self) -> bool:
        return self.decision in ("adopt", "revert")


@dataclass(frozen=True, slots=True)
class Original:
    """A config as it was before its model was adopted.

    was_loaded: whether Triton served the model then; None where no server was asked. edited: someone else
    has changed the adopted config since.
    """

    text: str | None
    was_loaded: bool | None
    edited: bool
