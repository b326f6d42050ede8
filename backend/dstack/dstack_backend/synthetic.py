"""Inputs made up for measuring: right in type and shape, harmless in value.

The speed of a network rarely depends on the values it sees, but a wrong token id, an empty mask or a zero
sampling rate makes some graphs fail or take a short cut. So: token ids are small, masks are ones, segment
ids are zeros, sampling rates are 16 kHz, anything of floating point is normally distributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SEED = 20261122
IMAGE_SIDE = 224
SEQUENCE = 128
CHANNELS = 3
FEATURES = 64

_DTYPES: dict[str, type] = {
    "float": np.float32,
    "float32": np.float32,
    "fp32": np.float32,
    "float16": np.float16,
    "fp16": np.float16,
    "double": np.float64,
    "float64": np.float64,
    "fp64": np.float64,
    "bool": np.bool_,
    "string": np.object_,
    **{f"{sign}int{bits}": getattr(np, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class TensorSpec(NamedTuple):
    """An input: its name, its ONNX type ("tensor(float)" or "float") and its shape, None where it is free."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def feeds(
    specs: Sequence[TensorSpec], batch_size: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """One batch for every input. shapes: NAME -> dimensions without the batch, for inputs with free ones.

    Errors: ValueError when the model's batch is fixed at another size, a type is unknown, or a shape in
    `shapes` does not fit the input.
    """
    unknown = set(shapes) - {spec.name for spec in specs}
    if unknown:
        raise ValueError(
            f"no input is named {sorted(unknown)[0]!r}; the inputs are {', '.join(s.name for s in specs)}"
        )
    free_batch = any(spec.shape and spec.shape[0] is None for spec in specs)
    rng = np.random.default_rng(SEED)
    return {
        spec.name: _values(spec, _dimensions(spec, batch_size, shapes.get(spec.name), free_batch), rng)
        for spec in specs
    }


def _dimensions(
    spec: TensorSpec, batch_size: int, given: Sequence[int] | None, free_batch: bool
) -> tuple[int, ...]:
    if not spec.shape:
        return ()
    axis = _batch_axis(spec.shape, free_batch)
    if axis is None and not free_batch and spec.shape[0] != batch_size:
        raise ValueError(
            f"input {spec.name!r} has a fixed batch of {spec.shape[0]}, {batch_size} rows do not fit"
        )
    rest = [i for i in range(len(spec.shape)) if i != (axis if axis is not None or free_batch else 0)]
    if given is not None and len(given) != len(rest):
        raise ValueError(
            f"input {spec.name!r} takes {len(rest)} dimensions without the batch, {len(given)} were given"
        )
    dims = [batch_size if i == axis else (d or 0) for i, d in enumerate(spec.shape)]
    for place, i in enumerate(rest):
        fixed = spec.shape[i]
        wanted = given[place] if given is not None else fixed or _usual(spec, i)
        if fixed is not None and wanted != fixed:
            raise ValueError(f"input {spec.name!r} has dimension {fixed} where {wanted} was given")
        dims[i] = wanted
    return tuple(dims)


def _batch_axis(shape: tuple[int | None, ...], free_batch: bool) -> int | None:
    """Axis 0 where it is free; else, beside inputs batched so, the first free axis (recurrent state)."""
    if shape[0] is None:
        return 0
    return shape.index(None) if free_batch and None in shape else None


def _usual(spec: TensorSpec, axis: int) -> int:
    """A size for a free dimension that is not the batch: images 3 x 224 x 224, sequences 128 long."""
    if len(spec.shape) == 4:
        channels_last = spec.shape[-1] in (1, 3, 4)
        return CHANNELS if axis == 1 and not channels_last else IMAGE_SIDE
    return SEQUENCE if axis == 1 else FEATURES


def _values(spec: TensorSpec, dims: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    kind = spec.dtype.removeprefix("tensor(").removesuffix(")").lower()
    if kind not in _DTYPES:
        raise ValueError(
            f"input {spec.name!r} is of type {spec.dtype}, which cannot be made up; use another model"
        )
    dtype, name = _DTYPES[kind], spec.name.lower()
    if dtype is np.object_:
        return np.full(dims, "text", dtype=np.object_)
    if dtype is np.bool_ or "mask" in name:
        return np.ones(dims, dtype)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(rng.standard_normal(dims), dtype)
    if name in ("sr", "sample_rate", "sampling_rate"):
        return np.full(dims, 16000, dtype)
    if "type" in name or "segment" in name:
        return np.zeros(dims, dtype)
    if dtype is np.uint8:
        return np.asarray(rng.integers(0, 256, dims), dtype)
    return np.asarray(rng.integers(1, 100, dims), dtype)
