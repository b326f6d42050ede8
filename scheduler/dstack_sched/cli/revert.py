"""`dstackctl revert`: adopted models become again what they were."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.model_look import DiskModelLook
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.adopt import Adoption
from dstack_sched.cli import app
from dstack_sched.cli.adopt import (
    DiffOption,
    ModelsOption,
    RepositoryArgument,
    chosen,
    show,
)
from dstack_sched.cli.attached import at_work
from dstack_sched.cli.common import JsonOption, StateOption, connects, say, state_dir
from dstack_sched.domain.adoption import Verdict
from dstack_sched.errors import InfeasibleError


@app.command()
@connects
def revert(
    repo: RepositoryArgument,
    state: StateOption,
    connection: ConnectionOptions | None,
    model: ModelsOption = None,
    diff: DiffOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also configs that someone edited since their adoption.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Restore the configs of adopted models byte for byte, whatever plans have made of them since.

    A config that was made by the adoption is removed. One that someone edited by hand since is not touched
    without --force. With --url, or a Triton at the usual port that serves REPO, and explicit model control,
    models that it served before their adoption are loaded from their originals, the others unloaded. An
    original that does not load is back on disk all the same (exit 1), and the dstack model serves on.

    Example: dstackctl revert model_repository --diff
    """
    repository = DiskRepository(repo)
    present = [name for name in repository.adopted() if (repository.root / name).is_dir()]
    for name in set(repository.adopted()) - set(present):
        say(f"{name}: was adopted, but is not in {repo} any more; its original stays in .dstack-adopted.json")
    names = chosen(repository, present, model)
    adoption = Adoption(repository, DiskModelLook(repository))
    if diff:
        show(repo, adoption.judge_back(names, force=True), (), "", json_output, planned=True)
        return
    with at_work(connection, repository, state_dir(state)) as (site, edits):
        verdicts = adoption.judge_back(names, force=force)
        refuse_edited(verdicts, repo)
        site.check_serves((each.model for each in verdicts if each.changes), repo)
        done = adoption.revert(verdicts, edits, site.states)
    if verdicts or json_output:
        show(repo, verdicts, done, site.advice, json_output)
    else:
        say(f"{repo}: no model of it is adopted")
    if any(each.error for each in done):
        raise typer.Exit(1)


def refuse_edited(verdicts: Iterable[Verdict], repo: Path) -> None:
    """Errors: InfeasibleError where something that a person wrote would be lost."""
    edited = [each.model for each in verdicts if each.decision == "leave"]
    if edited:
        raise InfeasibleError(
            f"{repo}: the config of {', '.join(edited)} was edited since its adoption; nothing was changed. "
            "--diff shows what would go, --force lets it go, --model NAME reverts others"
        )
