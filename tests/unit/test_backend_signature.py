"""Graph -> config: what auto-complete fills in, what it must leave alone, what cannot be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from dstack_backend.errors import ModelError, RunError
from dstack_backend.signature import (
    DEFAULT_MAX_BATCH_SIZE,
    batches,
    check_config,
    complete,
    is_complete,
)
from dstack_backend.tensors import TensorSpec

FLOAT = "tensor(float)"


class FakeSession:
    """A graph of given inputs and outputs; `rows` maps rows in to rows out when it is probed."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], rows: Any = None):
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._rows = rows

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        if self._rows is None:
            raise RunError("does not like zeros")
        count = self._rows(len(next(iter(feeds.values()))))
        return [np.zeros((count, 1), np.float32) for _ in self.outputs]

    def warm_up(self, batch_sizes: Sequence[int]) -> None: ...
    def close(self) -> None: ...


def spec(name: str, *dims: int | str | None, dtype: str = FLOAT, **options: bool) -> TensorSpec:
    return TensorSpec(name, dtype, dims, **options)


IMAGES = FakeSession([spec("x", "N", 3, "H", "W")], [spec("y", "N", 10)])


def test_bare_config_is_filled() -> None:
    got = complete({}, IMAGES)
    assert got.max_batch_size == DEFAULT_MAX_BATCH_SIZE
    assert got.inputs == ({"name": "x", "data_type": "TYPE_FP32", "dims": [3, -1, -1]},)
    assert got.outputs == ({"name": "y", "data_type": "TYPE_FP32", "dims": [10]},)


def test_what_the_config_states_is_kept() -> None:
    """Narrower dims than the graph's are the owner's choice; only what is missing is added."""
    config = {"max_batch_size": 8, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3, 224, 224]}]}
    got = complete(config, IMAGES)
    assert got.max_batch_size == 8
    assert got.inputs == ()
    assert [each["name"] for each in got.outputs] == ["y"]


def test_dims_with_a_batch_dimension_mean_no_batching() -> None:
    config = {"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3, 224, 224]}]}
    got = complete(config, IMAGES)
    assert got.max_batch_size == 0
    assert got.outputs[0]["dims"] == [-1, 10]


def test_reshaped_dims_with_a_batch_dimension_mean_no_batching() -> None:
    """Guards configs without max_batch_size whose clients leave out a dimension of the graph's."""
    tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [3, 224, 224]}
    assert complete({"input": [tensor]}, IMAGES).max_batch_size == DEFAULT_MAX_BATCH_SIZE
    whole = {**tensor, "reshape": {"shape": [1, 3, 224, 224]}}
    assert complete({"input": [whole]}, IMAGES).max_batch_size == 0


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "wanted"),
    [
        ([spec("x", "N", 3)], [spec("y", "N", 3)], None, True),
        ([spec("x", 1, 3)], [spec("y", 1, 3)], None, False),  # fixed
        ([spec("x", "N", 3)], [spec("y", 2, "K")], None, False),  # the output's first dimension is no batch
        ([spec("x", "N", 3)], [spec("y", "found", 7)], lambda rows: 0, False),  # detections, not rows
        ([spec("x", "a", 3), spec("z", "b", 3)], [spec("y", "c", 3)], lambda rows: rows, True),  # numbered
        ([spec("x", None, 3)], [spec("y", None, 3)], lambda rows: rows, True),  # nameless
        ([spec("x", None, 3)], [spec("y", None, 3)], lambda rows: 2, False),  # 2 rows by chance, not 3
        ([spec("x", None, 3)], [spec("y", None, 3)], None, False),  # cannot be tried: safe side
        ([spec("x")], [spec("y")], None, False),  # scalars
        ([], [spec("y", "N")], None, False),
    ],
)
def test_when_rows_in_are_rows_out(inputs: Any, outputs: Any, rows: Any, wanted: bool) -> None:
    assert batches(FakeSession(inputs, outputs, rows)) is wanted


def test_optional_inputs_are_marked_and_listed_weights_are_not_offered() -> None:
    session = FakeSession(
        [
            spec("x", "N", 3),
            spec("mask", "N", 3, optional=True),
            spec("scale", "N", 3, optional=True, has_default=True),
            spec("weight", 3, 3, optional=True, has_default=True),
        ],
        [spec("y", "N", 3)],
    )
    assert [(each["name"], each.get("optional", False)) for each in complete({}, session).inputs] == [
        ("x", False), ("mask", True), ("scale", True),
    ]  # fmt: skip


def test_a_number_a_row_is_seen_as_a_row_of_one() -> None:
    """Triton refuses empty dims."""
    session = FakeSession([spec("x", "N", 3)], [spec("y", "N")])
    assert complete({}, session).outputs == (
        {"name": "y", "data_type": "TYPE_FP32", "dims": [1], "reshape": {"shape": []}},
    )


def test_complete_configs_need_no_look_at_the_graph() -> None:
    tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [3]}
    assert is_complete({"max_batch_size": 4, "input": [tensor], "output": [tensor]})
    assert not is_complete({"max_batch_size": 0, "input": [tensor], "output": [tensor]})
    assert not is_complete({"max_batch_size": 4, "input": [tensor], "output": [{**tensor, "dims": []}]})


def config_of(
    max_batch_size: int, dims: list[int], kind: str = "TYPE_FP32", name: str = "x"
) -> dict[str, Any]:
    return {
        "max_batch_size": max_batch_size,
        "input": [{"name": name, "data_type": kind, "dims": dims}],
        "output": [],
    }


@pytest.mark.parametrize(
    ("session", "config", "words"),
    [
        (IMAGES, config_of(8, [3, 9, 9], name="z"), "config names input 'z', the graph has x"),
        (IMAGES, config_of(8, [3, 9, 9], "TYPE_FP16"), "config says TYPE_FP16, the graph TYPE_FP32"),
        (IMAGES, config_of(8, [4, 9, 9]), "config says dims [4, 9, 9], the graph [3, -1, -1]"),
        (IMAGES, config_of(0, [3, 9, 9]), "config says dims [3, 9, 9], the graph [-1, 3, -1, -1]"),
        (IMAGES, {"max_batch_size": 8}, "the graph needs input 'x', which the config does not name"),
        (
            FakeSession([spec("x", 1, 3)], []),
            config_of(8, [3]),
            "fixes its first dimension at 1; set",
        ),
        (
            FakeSession([spec("x", 4, 3)], []),
            config_of(4, [3]),
            "fixes its first dimension at 4; set",
        ),
        (FakeSession([spec("x")], []), config_of(4, [1]), "a scalar cannot be batched"),
    ],
)
def test_configs_that_the_graph_cannot_serve(session: Any, config: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_config(config, session, "m")
    assert words in str(caught.value)
    assert "model 'm'" in str(caught.value)


def test_configs_that_fit() -> None:
    check_config(config_of(8, [3, 224, 224]), IMAGES, "m")
    check_config(config_of(8, [-1, -1, -1]), IMAGES, "m")
    check_config(config_of(1, [3]), FakeSession([spec("x", 1, 3)], []), "m")
    check_config(config_of(0, [1]), FakeSession([spec("x")], []), "m")
