"""What a model's graph asks of the device: one record a kernel, as functions of the batch size."""

from __future__ import annotations

from dataclasses import dataclass

# `op` of the record for what the host copies to and from the device: its bytes count, its rows are 0.
HOST_COPY = "HostCopy"


@dataclass(frozen=True, slots=True)
class KernelWork:
    """One kernel of the graph (an operator with the elementwise ones fused behind it).

    A matrix product (convolutions as implicit ones) has `groups` independent outputs of rows x columns, each
    element a sum over `depth` products. Anything else has depth 0 and rows x columns output elements.
    Rows and groups are linear in the batch size b: rows_fixed + rows_per_row b, and the like. Bytes are all
    tensors read and written once; the weights are in bytes_fixed.
    """

    op: str
    rows_fixed: float
    rows_per_row: float
    columns: int
    depth: int
    groups_fixed: float
    groups_per_row: float
    bytes_fixed: float
    bytes_per_row: float
