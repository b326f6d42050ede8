"""`dstackctl doctor`: is all that is needed here? What is missing, and how to mend it."""

from __future__ import annotations

import dataclasses

import typer

from dstack_sched.adapters.machine_checks import Check, run_checks
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, TritonServerOption, print_json, print_table, say


@app.command()
def doctor(tritonserver: TritonServerOption = None, json_output: JsonOption = False) -> None:
    """Check every part that is needed on this machine; exit 1 when one is missing.

    Example: dstackctl doctor --tritonserver /opt/tritonserver
    """
    checks = run_checks(tritonserver)
    missing = [each for each in checks if each.needed and not each.ok]
    if json_output:
        print_json({"version": 1, "ok": not missing, "checks": [dataclasses.asdict(each) for each in checks]})
    else:
        print_table("doctor", ["part", "state", "found"], [[c.name, word(c), c.found] for c in checks])
        for each in checks:
            if not each.ok and each.mend:
                say(f"{each.name}: {each.mend}")
    if missing:
        raise typer.Exit(1)


def word(check: Check) -> str:
    """ok, MISSING (needed), or none."""
    return "ok" if check.ok else "MISSING" if check.needed else "no"
