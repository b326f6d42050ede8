"""Every verb explains itself: a sentence, its options, an example that uses it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dstack_sched.cli import VERBS, app, register


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str) -> None:
    register([verb])
    answer = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "110"})
    assert answer.exit_code == 0, answer.output
    assert f"Example: dstackctl {verb}" in " ".join(answer.output.split())
