"""`dstackctl adopt`: models of Triton's onnxruntime backend become dstack models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dstack_sched.adapters.model_look import DiskModelLook
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.adopt import Adoption
from dstack_sched.app.edits import Done
from dstack_sched.cli import app
from dstack_sched.cli.attached import Attached, at_work
from dstack_sched.cli.common import (
    JsonOption,
    StateOption,
    connects,
    print_json,
    print_table,
    say,
    state_dir,
)
from dstack_sched.domain.adoption import Verdict
from dstack_sched.errors import InfeasibleError, InputError, PlanRefusedError

RepositoryArgument = Annotated[Path, typer.Argument(metavar="REPO", help="Model repository.")]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME", help="Only this one; may be given again. Default: all."),
]
DiffOption = Annotated[bool, typer.Option("--diff", help="Only show what would change.")]
ACTIONS = {"adopt": "adopted", "already": "unchanged", "leave": "left alone", "revert": "reverted"}


@app.command()
@connects
def adopt(
    repo: RepositoryArgument,
    state: StateOption,
    connection: ConnectionOptions | None,
    model: ModelsOption = None,
    diff: DiffOption = False,
    without_accelerators: Annotated[
        bool,
        typer.Option("--without-accelerators", help="Also models that run on TensorRT or OpenVINO now."),
    ] = False,
    no_load: Annotated[
        bool, typer.Option("--no-load", help="Change files only; the Triton attached loads nothing.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Turn the suitable models of a repository into dstack models; list what is left alone, and why.

    Suitable: backend "onnxruntime", platform "onnxruntime_onnx", or neither and a model.onnx, whose files and
    config the dstack backend can serve. Only `backend` changes, and a parameter is added where the config
    asks something of onnxruntime's CUDA provider; all else stays byte for byte. The originals are kept in
    REPO/.dstack-adopted.json, for `dstackctl revert`.

    With --url, or a Triton at the usual port that serves REPO, and explicit model control, the models are
    loaded one at a time; if one fails, all configs go back and the old versions serve on.

    Example: dstackctl adopt model_repository --diff
    """
    repository = DiskRepository(repo)
    names = chosen(repository, repository.models(), model)
    adoption = Adoption(repository, DiskModelLook(repository))
    if diff:
        verdicts = adoption.judge(names, without_accelerators=without_accelerators)
        show(repo, verdicts, (), "", json_output, planned=True)
        refuse_named(verdicts, model)
        return
    with at_work(connection, repository, state_dir(state)) as (site, edits):
        verdicts = adoption.judge(names, without_accelerators=without_accelerators)
        refuse_named(verdicts, model)
        site.check_serves((each.model for each in verdicts if each.changes), repo)
        load = site.server is not None and not no_load
        try:
            done = adoption.adopt(verdicts, edits, site.states, load=load)
        except PlanRefusedError as error:
            raise with_mend(error) from error
    show(repo, verdicts, done, advice(site, load), json_output)
    if not any(each.decision in ("adopt", "already") for each in verdicts):
        raise InfeasibleError(f"{repo}: none of its models can be adopted")


def chosen(repository: DiskRepository, models: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The models named, in order; all where none is. Errors: InputError for one that is not there."""
    for name in wanted or ():
        repository.model_dir(name)
    return list(dict.fromkeys(wanted or models))


def refuse_named(verdicts: Iterable[Verdict], named: Sequence[str] | None) -> None:
    """Errors: InfeasibleError where a model that was asked for by name is left alone."""
    for each in verdicts:
        if named and each.decision == "leave":
            raise InfeasibleError(f"{each.model} cannot be adopted: {each.why}")


def with_mend(error: PlanRefusedError) -> InputError:
    """The error, with what to do about it."""
    if "backend library for backend 'dstack'" in str(error):
        return InputError(f"{error}; `dstackctl backend install DIR` puts it into Triton's backends")
    return InputError(f"{error}; mend {error.model}, or name the others with --model")


def advice(site: Attached, load: bool) -> str:
    """What is still to be done so that the files come into force."""
    if site.advice or load:
        return site.advice
    return "the models were not loaded (--no-load): load them to put the configs in force"


def show(
    repo: Path,
    verdicts: Sequence[Verdict],
    done: Sequence[Done],
    next_step: str,
    json_output: bool,
    *,
    planned: bool = False,
) -> None:
    """What was done (planned: what would be), and for whom."""
    outcomes = {each.model: each for each in done}
    if json_output:
        print_json(
            {
                "version": 1,
                "repository": str(repo),
                "planned": planned,
                "models": [_row(each, outcomes.get(each.model), planned) for each in verdicts],
                "next": next_step or None,
            }
        )
        return
    if planned:
        for each in verdicts:
            print(_diff(each), end="")  # noqa: T201
    print_table(
        "would be done" if planned else "done",
        ["model", "action", "why"],
        [[each.model, ACTIONS[each.decision], each.why or None] for each in verdicts],
    )
    for each in verdicts:
        for note in each.notes:
            say(f"{each.model}: {note}")
    for outcome in done:
        if outcome.error:
            say(f"{outcome.model}: its original is back, but Triton does not load it: {outcome.error}")
    if next_step and any(each.changes for each in verdicts):
        say(next_step)


def _row(verdict: Verdict, done: Done | None, planned: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": verdict.model,
        "action": ACTIONS[verdict.decision],
        "why": verdict.why or None,
        "notes": list(verdict.notes),
    }
    if planned:
        row["diff"] = _diff(verdict)
    elif done is not None:
        row |= {"load_s": done.load_s, "old_stubs_gone": done.old_stubs_gone, "error": done.error or None}
    return row


def _diff(verdict: Verdict) -> str:
    """A unified diff of one config; /dev/null where there is no file."""
    if verdict.old_text == verdict.new_text:
        return ""
    name = f"{verdict.model}/config.pbtxt"
    lines = difflib.unified_diff(
        (verdict.old_text or "").splitlines(keepends=True),
        (verdict.new_text or "").splitlines(keepends=True),
        "/dev/null" if verdict.old_text is None else f"a/{name}",
        "/dev/null" if verdict.new_text is None else f"b/{name}",
    )
    text = "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
