"""The ways to share a GPU that are compared, and how each is deployed through Triton.

All use the same backend with CUDA graphs and the pipeline, so that only the way of sharing differs:

    (a) time-sliced    no MPS: the driver takes turns between the processes
    (b) temporal       one model at a time, by the arbiter
    (c) mps-default    MPS, no limits, every backend runs when it likes
    (d) mps-static     MPS, fixed knee shares of the plan (GSLICE-like), every backend runs when it likes
    (e) best-static    as (d), with the best shares, batch sizes and instances that a search by trial finds
    (f) rate-limiter   as (d), Triton's own rate limiter with the shares as resources
    (g) one-process    all models in one stub process, a thread and a stream each
    (h) dstack         D-STACK as `dstackctl run` sets it up: MPS shares of its own plan, corrected by what
                       service shows of the profiles (learn), and the arbiter

A variant of one of them is spelled NAME+KEY=VALUE+..., e.g. dstack+levels=auto+shares=whole, and is measured
as an alternative of its own. Keys: `shares` (whole; planned: knee shares; own: of D-STACK's plan), `policy`
(the arbiter's), `mps` (on, off), `capacity` (percent promised at once, in place of the plan's), `load_factor`
(part of the capacity that is planned with), `learn` (on, off; with own shares), and every parameter of the
backend's config.pbtxt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from compare.cells import file_of, served_name
from dstack_backend.settings import PARAMETERS
from dstack_sched.engine.registry import POLICIES
from dstack_sched.errors import InputError

MAX_BATCH_SIZE = 32
RESOURCE = "GPU_PCT"
TOLD = ("capacity", "load_factor")
Shares: TypeAlias = Literal["whole", "planned", "own", "searched"]
SHARES: dict[str, Shares] = {"whole": "whole", "planned": "planned", "own": "own"}  # of variants


@dataclass(frozen=True, slots=True)
class Alternative:
    """letter: as in the issue and the tables; that of a variant is its origin's with a star. mps: with the
    MPS daemon. shares: what each process gets, the whole GPU, shares that suit all side by side (planned),
    those of D-STACK's own plan or those that a search finds. policy: the arbiter's; None: no
    arbiter, backends run when they like. parameters: of every model's config. told: what the arbiter's plan
    differs in (TOLD). learn: its plan is corrected by what service shows, before it is measured. variant_of:
    name of the alternative that it is a variant of."""

    letter: str
    name: str
    summary: str
    mps: bool = True
    shares: Shares = "whole"
    policy: str | None = None
    rate_limiter: bool = False
    one_process: bool = False
    parameters: tuple[tuple[str, str], ...] = ()
    told: tuple[tuple[str, float], ...] = ()
    learn: bool = False
    variant_of: str | None = None

    @property
    def config(self) -> dict[str, str]:
        """Parameters of every model's config."""
        return {"levels": "off", **dict(self.parameters)}

    @property
    def server(self) -> tuple[object, ...]:
        """Alternatives with equal values can take turns on one running server."""
        config = tuple(sorted(self.config.items()))
        return (self.mps, self.shares, self.learn, self.rate_limiter, self.one_process, config)

    @property
    def told_by_name(self) -> dict[str, float]:
        return dict(self.told)

    @classmethod
    def parse(cls, text: str) -> Alternative:
        """From NAME or NAME+KEY=VALUE+... Errors: InputError that names the part."""
        name, *parts = text.split("+")
        if name not in ALTERNATIVES:
            raise InputError(f"alternative {text!r}: no {name!r}; there are {', '.join(ALTERNATIVES)}")
        made = ALTERNATIVES[name]
        if not parts:
            return made
        for part in parts:
            key, separator, value = part.partition("=")
            if not separator or not value:
                raise InputError(f"alternative {text!r}: {part!r}: KEY=VALUE is wanted")
            made = _changed(made, text, key, value)
        return replace(made, name=text, letter=f"{made.letter}*", summary=", ".join(parts), variant_of=name)


def _changed(made: Alternative, text: str, key: str, value: str) -> Alternative:
    if key in TOLD:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < 1e4:
            raise InputError(f"alternative {text!r}: {key} is {value!r}; a number above 0 is wanted")
        return replace(made, told=(*made.told, (key, number)))
    if key == "shares" and value in SHARES:
        return replace(made, shares=SHARES[value], learn=made.learn and value == "own")
    if key == "mps" and value in ("on", "off"):
        return replace(made, mps=value == "on")
    if key == "learn" and value in ("on", "off") and made.shares == "own":
        return replace(made, learn=value == "on")
    if key == "policy" and value in POLICIES:
        return replace(made, policy=value)
    if key in PARAMETERS:
        others = tuple(each for each in made.parameters if each[0] != key)
        return replace(made, parameters=(*others, (key, value)))
    raise InputError(
        f"alternative {text!r}: {key}={value} is no change that is known; {'shares=' + '|'.join(SHARES)}, "
        f"mps=on|off, policy=NAME, {', '.join(TOLD)}, learn=on|off (with own shares), or a parameter of the "
        "backend"
    )


# In the order in which they are measured: when time runs out, the most telling ones are there.
ALTERNATIVES = {
    each.name: each
    for each in (
        Alternative("c", "mps-default", "MPS, no limits"),
        Alternative("h", "dstack", "D-STACK", shares="own", policy="dstack", learn=True),
        Alternative("a", "time-sliced", "no MPS, time slices", mps=False),
        Alternative("d", "mps-static", "MPS, fixed knee shares", shares="planned"),
        Alternative("b", "temporal", "one model at a time", policy="temporal"),
        Alternative("f", "rate-limiter", "Triton's rate limiter", shares="planned", rate_limiter=True),
        Alternative("g", "one-process", "one process, many streams", mps=False, one_process=True),
        Alternative("e", "best-static", "best fixed shares by search", shares="searched"),
    )
}


@dataclass(frozen=True, slots=True)
class Served:
    """How one model is deployed. gpu_percent and batch_size as in config.pbtxt; instances of it."""

    gpu_percent: float = 100.0
    batch_size: int = MAX_BATCH_SIZE
    instances: int = 1
    extra: Mapping[str, str] = field(default_factory=dict)


def write_repository(
    root: Path, models_dir: Path, served: Mapping[str, Served], alternative: Alternative, kind: str
) -> dict[str, str]:
    """Write a model repository; model -> the name to ask Triton for. kind: KIND_GPU or KIND_CPU."""
    if alternative.one_process:
        from compare.one_process.repository import write_one_process

        return write_one_process(root, models_dir, served, kind)
    names = {}
    for model, how in served.items():
        name = served_name(model)
        link(models_dir / f"{file_of(model)}.onnx", root / name / "1" / "model.onnx")
        write_config(root, model, how, alternative, kind)
        names[model] = name
    return names


def write_config(root: Path, model: str, how: Served, alternative: Alternative, kind: str) -> None:
    """(Re)write config.pbtxt of one model, by a rename: nobody reads half of it."""
    folder = root / served_name(model)
    fresh = root.parent / f"{served_name(model)}.pbtxt"
    fresh.write_text(config_text(how, alternative, kind))
    fresh.replace(folder / "config.pbtxt")


def config_text(how: Served, alternative: Alternative, kind: str) -> str:
    """config.pbtxt of one model."""
    parameters = {
        "gpu_percent": f"{how.gpu_percent:g}", "batch_size": str(how.batch_size), **how.extra,
    }  # fmt: skip
    limiter = ""
    if alternative.rate_limiter:
        resource = f'{{ name: "{RESOURCE}" global: true count: {max(1, round(how.gpu_percent))} }}'
        limiter = f" rate_limiter {{ resources [ {resource} ] }}"
        parameters["prefetch"] = "0"  # execute() ends with the batch: the limiter counts what really runs
    lines = [
        'backend: "dstack"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        f"instance_group [ {{ kind: {kind} count: {how.instances}{limiter} }} ]",
        "dynamic_batching { }",
        *(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def server_arguments(alternative: Alternative) -> tuple[str, ...]:
    """Of tritonserver, beyond the usual. Several servers are up at once, and each would ask NVML for its
    metrics while another one is measured (see gpu_watch.py)."""
    usual = ("--allow-gpu-metrics=false",)
    if not alternative.rate_limiter:
        return usual
    return (*usual, "--rate-limit=execution_count", f"--rate-limit-resource={RESOURCE}:100")


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, without a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve())
