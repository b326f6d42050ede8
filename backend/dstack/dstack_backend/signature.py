"""From the graph's inputs and outputs to Triton's config, and the check of a config against the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstack_backend.errors import BackendError, ModelError
from dstack_backend.session import Session
from dstack_backend.tensors import Array, TensorSpec

DEFAULT_MAX_BATCH_SIZE = 64
PROBE_ROWS = (2, 3)


@dataclass(frozen=True, slots=True)
class Completion:
    """What auto-complete sets: max_batch_size, and inputs and outputs as Triton's config writes them."""

    max_batch_size: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]


def is_complete(config: Mapping[str, Any]) -> bool:
    """True where a config says all that auto-complete could: the graph need not be opened."""
    tensors = [*config.get("input", ()), *config.get("output", ())]
    return (
        int(config.get("max_batch_size", 0)) > 0
        and bool(config.get("input"))
        and bool(config.get("output"))
        and all(each.get("dims") and each.get("data_type") != "TYPE_INVALID" for each in tensors)
    )


def complete(config: Mapping[str, Any], session: Session) -> Completion:
    """Fill what a config leaves open. What it states is kept, so narrower dims than the graph's stay.

    max_batch_size: as given; 0 where the config's dims already hold the batch dimension; else
    DEFAULT_MAX_BATCH_SIZE where the graph's first dimensions are one batch dimension, 0 otherwise.
    """
    max_batch_size = int(config.get("max_batch_size", 0))
    if not max_batch_size and not _states_whole_shapes(config, session):
        max_batch_size = DEFAULT_MAX_BATCH_SIZE if batches(session) else 0
    return Completion(
        max_batch_size,
        _missing(config.get("input", ()), _offered(session.inputs), max_batch_size),
        _missing(config.get("output", ()), session.outputs, max_batch_size),
    )


def batches(session: Session) -> bool:
    """True where rows of the inputs are rows of the outputs.

    Every first dimension must be dynamic. Where inputs and outputs name it alike, that decides; where names
    differ or lack (some exporters number them), two small runs do: outputs must have as many rows as inputs.
    """
    inputs = [spec for spec in session.inputs if not spec.optional]
    tensors = [*inputs, *session.outputs]
    if not inputs or any(not spec.dims or isinstance(spec.dims[0], int) for spec in tensors):
        return False
    names = {spec.dims[0] for spec in tensors}
    if len(names) == 1 and None not in names:
        return True
    return all(_keeps_rows(session, inputs, rows) for rows in PROBE_ROWS)


def check_config(config: Mapping[str, Any], session: Session, model: str) -> None:
    """Raise ModelError where a config cannot be served by this graph."""
    max_batch_size = int(config.get("max_batch_size", 0))
    for what, stated, specs in (
        ("input", config.get("input", ()), session.inputs),
        ("output", config.get("output", ()), session.outputs),
    ):
        by_name = {spec.name: spec for spec in specs}
        for tensor in stated:
            spec = by_name.get(tensor["name"])
            if spec is None:
                raise ModelError(
                    f"model {model!r}: config names {what} {tensor['name']!r}, the graph has "
                    f"{', '.join(sorted(by_name)) or 'none'}"
                )
            _check_tensor(f"model {model!r}: {what} {spec.name!r}", tensor, spec, max_batch_size)
    stated_names = {tensor["name"] for tensor in config.get("input", ())}
    for spec in session.inputs:
        if not spec.optional and spec.name not in stated_names:
            raise ModelError(
                f"model {model!r}: the graph needs input {spec.name!r}, which the config does not name; "
                f"add it, or leave out all inputs to have them filled in"
            )


def _check_tensor(where: str, tensor: Mapping[str, Any], spec: TensorSpec, max_batch_size: int) -> None:
    if tensor["data_type"] != spec.triton_dtype:
        raise ModelError(
            f"{where}: config says {tensor['data_type']}, the graph {spec.triton_dtype}; correct data_type"
        )
    stated = _graph_dims(tensor)
    shape: list[int | None] = list(spec.shape)
    if max_batch_size:
        if not shape:
            raise ModelError(f"{where}: a scalar cannot be batched; set max_batch_size: 0")
        if shape[0] is not None and not shape[0] == max_batch_size == 1:
            raise ModelError(
                f"{where}: the graph fixes its first dimension at {shape[0]}; set max_batch_size: 0"
                f"{' or 1' if shape[0] == 1 else ''}"
            )
        shape = shape[1:]
    elif not shape and stated == [1]:  # a scalar: the pipeline sees to it
        return
    fits = len(stated) == len(shape) and all(
        want is None or have in (-1, want) for have, want in zip(stated, shape, strict=True)
    )
    if not fits:
        wanted = [-1 if dim is None else dim for dim in shape]
        raise ModelError(
            f"{where}: config says dims {stated}, the graph {wanted}"
            f"{' after the batch dimension' if max_batch_size else ''}; correct dims or max_batch_size"
        )


def _offered(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Inputs that auto-complete names. Weights listed as graph inputs (old exporters) are not among them:
    a graph default counts as an optional input only where its first dimension is dynamic."""
    return tuple(
        spec for spec in inputs if not spec.has_default or (spec.dims and not isinstance(spec.dims[0], int))
    )


def _missing(
    stated: Sequence[Mapping[str, Any]], specs: Sequence[TensorSpec], max_batch_size: int
) -> tuple[dict[str, Any], ...]:
    whole = {each["name"] for each in stated if each.get("dims") and each.get("data_type") != "TYPE_INVALID"}
    tensors = []
    for spec in specs:
        if spec.name in whole:
            continue
        dims = [-1 if dim is None else dim for dim in spec.shape[1 if max_batch_size else 0 :]]
        tensor: dict[str, Any] = {"name": spec.name, "data_type": spec.triton_dtype, "dims": dims}
        if not dims:  # Triton has no empty dims: clients see [1]
            tensor["dims"] = [1]
            if max_batch_size:
                tensor["reshape"] = {"shape": []}
        if spec.optional:
            tensor["optional"] = True
        tensors.append(tensor)
    return tuple(tensors)


def _states_whole_shapes(config: Mapping[str, Any], session: Session) -> bool:
    """True where a stated tensor has as many dims as the graph's: the batch dimension is one of them."""
    rank = {spec.name: len(spec.dims) for spec in [*session.inputs, *session.outputs]}
    stated = [*config.get("input", ()), *config.get("output", ())]
    return any(each.get("dims") and len(_graph_dims(each)) == rank.get(each["name"]) for each in stated)


def _graph_dims(tensor: Mapping[str, Any]) -> list[int]:
    """Dims of a stated tensor as the graph sees them: after its reshape, where it has one."""
    return [int(dim) for dim in (tensor.get("reshape") or {"shape": tensor["dims"]}).get("shape", ())]


def _keeps_rows(session: Session, inputs: Sequence[TensorSpec], rows: int) -> bool:
    feeds = {spec.name: sample(spec, rows) for spec in inputs}
    try:
        return all(out.ndim and len(out) == rows for out in session.run(feeds))
    except BackendError:
        return False


def sample(spec: TensorSpec, rows: int) -> Array:
    """An input of zeros or empty strings: `rows` rows where the first dimension is dynamic, other dynamic
    dimensions 1."""
    shape = [1 if dim is None else dim for dim in spec.shape]
    if spec.shape[:1] == (None,):
        shape[0] = rows
    return np.full(shape, "" if spec.numpy_dtype == np.object_ else 0, dtype=spec.numpy_dtype)
