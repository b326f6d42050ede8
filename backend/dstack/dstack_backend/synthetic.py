"""Inputs made up for measuring: right in type and shape, harmless in value.

The speed of a network rarely depends on the values it sees, but a wrong token id, an empty mask or a zero
sampling rate makes some graphs fail or take a short cut. So: token ids are small, masks are ones, segment
ids are zeros, sampling rates are 16 kHz, anything of floating point is normally distributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dstack_backend.tensors import TensorSpec

SEED = 20261122
IMAGE_SIDE = 224
SEQUENCE = 128
CHANNELS = 3
FEATURES = 64


def feeds(
    specs: Sequence[TensorSpec], batch_size: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """One batch for every input that is not optional. shapes: NAME -> dimensions without the batch, or, at
    batch size 1, all of them (a model that is served without a batch dimension).

    A model whose batch is fixed runs as it is, and one run counts as one row. Errors: ValueError when it is
    asked for more, or when a shape in `shapes` does not fit.
    """
    names = [spec.name for spec in specs]
    for name in shapes:
        if name not in names:
            raise ValueError(f"no input is named {name!r}; the inputs are {', '.join(names)}")
    free = next((spec for spec in specs if spec.shape and spec.shape[0] is None), None)
    if free is None and batch_size != 1:
        raise ValueError("the batch of this model is fixed: it can only be measured at batch size 1, one run")
    rng = np.random.default_rng(SEED)
    arrays = {}
    for spec in specs:
        if spec.optional and spec.name not in shapes:
            continue
        axis = _batch_axis(spec, free)
        arrays[spec.name] = _values(spec, _dimensions(spec, axis, batch_size, shapes.get(spec.name)), rng)
    return arrays


def _batch_axis(spec: TensorSpec, free: TensorSpec | None) -> int | None:
    """The axis that counts rows: the first, if it is free; or, in a tensor that is carried along (recurrent
    state), the axis named as the batch of `free` is, else its first free one. None: it has no such axis.
    free: an input whose first axis is the free batch, None where the batch is fixed."""
    if not spec.shape or free is None:
        return None
    if spec.shape[0] is None:
        return 0
    if free.dims[0] is not None and free.dims[0] in spec.dims:
        return spec.dims.index(free.dims[0])
    return spec.shape.index(None) if None in spec.shape else None


def _dimensions(
    spec: TensorSpec, axis: int | None, batch_size: int, given: Sequence[int] | None
) -> tuple[int, ...]:
    if axis is not None and given is not None and len(given) == len(spec.shape) and batch_size == 1:
        axis = None
    rest = [i for i in range(len(spec.shape)) if i != axis]
    if given is not None and len(given) != len(rest):
        raise ValueError(f"input {spec.name!r} has {len(rest)} dimensions beside the batch, not {len(given)}")
    wanted = dict(zip(rest, given or (spec.shape[i] or _usual(spec, i) for i in rest), strict=True))
    if axis is not None:
        wanted[axis] = batch_size
    for i, fixed in enumerate(spec.shape):
        if fixed is not None and wanted[i] != fixed:
            raise ValueError(f"input {spec.name!r} has a dimension of {fixed}, {wanted[i]} does not fit")
    return tuple(wanted[i] for i in range(len(spec.shape)))


def _usual(spec: TensorSpec, axis: int) -> int:
    """A size for a free dimension that is not the batch: images 3 x 224 x 224, sequences 128 long."""
    if len(spec.shape) == 4:
        channels_last = spec.shape[-1] in (1, 3, 4)
        return CHANNELS if axis == 1 and not channels_last else IMAGE_SIDE
    return SEQUENCE if axis == 1 else FEATURES


def _values(spec: TensorSpec, dims: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    dtype, name = spec.numpy_dtype, spec.name.lower()
    if dtype == np.object_:
        return np.full(dims, "text", dtype=dtype)
    if dtype == np.bool_ or "mask" in name:
        return np.ones(dims, dtype)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(rng.standard_normal(dims), dtype)
    if name in ("sr", "sample_rate", "sampling_rate"):
        return np.full(dims, 16000, dtype)
    if "type" in name or "segment" in name:
        return np.zeros(dims, dtype)
    return np.asarray(rng.integers(1, 100, dims), dtype)
