"""The queue and the making of batches: order, likeness, chunks, nothing lost or doubled."""

from __future__ import annotations

import numpy as np
import pytest

from dstack_backend.batching import Batch, Item, RequestQueue, assemble, check_rows, outputs_of
from dstack_backend.errors import RequestError, RunError
from dstack_backend.staging import ALIGNMENT, MAX_KEYS, Staging
from fakes.backend import FakeRequest


def item(x=1.0, deadline_us: int = 100, batched: bool = True, **options) -> Item:
    request = FakeRequest(x, **options)
    return Item(request, request.feeds(), batched, 0, deadline_us)


def queue_of(*items: Item) -> RequestQueue:
    queue = RequestQueue()
    for each in items:
        queue.push(each)
    return queue


def taken(batch: Batch | None) -> list[tuple[Item, int, int]]:
    return [(part.item, part.start, part.stop) for part in batch.parts] if batch else []


def deliver(batch: Batch, y: np.ndarray, **others: np.ndarray) -> None:
    """Hand a batch's outputs to its requests, as the executor does."""
    outputs = {"y": y, **others}
    check_rows(batch, outputs)
    for part in batch.parts:
        part.item.parts[part.start] = outputs_of(batch, part, outputs)


def test_earliest_deadline_first_then_arrival() -> None:
    late, soon, also_soon = item(deadline_us=900), item(deadline_us=100), item(deadline_us=100)
    queue = queue_of(late, soon, also_soon)
    assert queue.earliest_deadline_us() == 100
    batch = queue.take(2)
    assert [part.item for part in batch.parts] == [soon, also_soon]
    assert (queue.rows, queue.earliest_deadline_us()) == (1, 900)
    assert [part.item for part in queue.take(8).parts] == [late]
    assert queue.take(8) is None
    assert (queue.rows, queue.requests, queue.earliest_deadline_us()) == (0, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.ones((1, 5), np.float32)},  # another shape
        {"x": np.ones((1, 1), np.float64)},  # another type
        {"x": 1.0, "others": {"mask": np.ones((1, 1), np.float32)}},  # another input present
    ],
)
def test_only_likes_share_a_batch(other) -> None:
    first, odd, third = item(1.0, 100), item(deadline_us=200, **other), item(3.0, 300)
    queue = queue_of(first, odd, third)
    assert [part.item for part in queue.take(8).parts] == [first, third]
    assert [part.item for part in queue.take(8).parts] == [odd]


def test_a_request_that_does_not_fit_waits_for_the_next_batch_whole() -> None:
    """Splitting it would make its answer wait for two batches."""
    small, three = item([1, 2], 100), item([3, 4, 5], 200)
    queue = queue_of(small, three)
    assert taken(queue.take(4)) == [(small, 0, 2)]
    assert taken(queue.take(4)) == [(three, 0, 3)]


def test_a_request_larger_than_a_batch_comes_in_chunks_and_its_rest_is_filled_up() -> None:
    big, small = item(range(10), 100), item([1], 200)
    queue = queue_of(big, small)
    assert taken(queue.take(4)) == [(big, 0, 4)]
    assert queue.rows == 7
    assert taken(queue.take(4)) == [(big, 4, 8)]
    assert taken(queue.take(4)) == [(big, 8, 10), (small, 0, 1)]
    assert (queue.rows, queue.requests) == (0, 0)


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_give_back_restores_the_queue(batches: int) -> None:
    big, small = item(range(10), 100), item([1], 200)
    queue = queue_of(big, small)
    for batch in reversed([queue.take(4) for _ in range(batches)]):
        queue.give_back(batch)
    assert (queue.rows, queue.requests, queue.earliest_deadline_us()) == (11, 2, 100)
    again = [taken(queue.take(4)) for _ in range(3)]
    assert again == [[(big, 0, 4)], [(big, 4, 8)], [(big, 8, 10), (small, 0, 1)]]


def test_shedding_takes_the_rest_of_what_has_begun() -> None:
    begun, waiting, later = item(range(8), 100), item([1], 150), item([2], 300)
    queue = queue_of(begun, later)
    chunk = queue.take(4)
    queue.push(waiting)
    assert queue.remove_before(200) == [begun, waiting]
    assert (queue.rows, queue.requests, queue.earliest_deadline_us()) == (1, 1, 300)
    queue.give_back(chunk)  # it could not run after all: nobody waits for it any more
    assert (queue.rows, queue.requests) == (1, 1)
    assert taken(queue.take(4)) == [(later, 0, 1)]


def test_dropping_the_rest_of_a_failed_request() -> None:
    big, small = item(range(8), 100), item([1], 200)
    queue = queue_of(big, small)
    queue.take(4)
    queue.drop(big)
    assert (queue.rows, queue.requests) == (1, 1)
    queue.drop(big)  # twice is harmless
    assert taken(queue.take(4)) == [(small, 0, 1)]


def test_models_without_batch_dimension_run_one_by_one() -> None:
    one, two = item([[1, 2], [3, 4]], batched=False), item([[1, 2], [3, 4]], batched=False)
    queue = queue_of(one, two)
    assert queue.rows == 2
    assert taken(queue.take(8)) == [(one, 0, 1)]
    assert taken(queue.take(8)) == [(two, 0, 1)]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"mask": np.ones((3, 1), np.float32)}, "share their first"),
        ({"scalar": np.float32(1)[()] * np.ones(())}, "share their first"),
    ],
)
def test_rows_that_disagree_are_refused(others, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        item([1, 2], others=others)


def test_no_rows_are_refused() -> None:
    with pytest.raises(RequestError, match="0 rows"):
        item(np.zeros((0, 3), np.float32))


def test_outputs_go_to_their_requests_and_chunks_together_again() -> None:
    big, small = item(range(5), 100), item([9], 200)
    queue = queue_of(big, small)
    first, second = queue.take(3), queue.take(3)
    deliver(second, np.array([[3], [4], [9]]))  # answered out of order: still in row order
    deliver(first, np.array([[0], [1], [2]]))
    assert assemble(big)["y"].ravel().tolist() == [0, 1, 2, 3, 4]
    assert assemble(small)["y"].ravel().tolist() == [9]


def test_outputs_whose_rows_do_not_follow_are_an_error() -> None:
    batch = queue_of(item([1, 2])).take(4)
    with pytest.raises(RunError, match=r"'y' has shape .1, 3. for a batch of 2 rows.*max_batch_size: 0"):
        check_rows(batch, {"y": np.ones((1, 3))})


def test_only_wanted_outputs_run_and_go_back() -> None:
    batch = queue_of(item(1.0, wanted=["z"]), item(2.0, wanted=["y"])).take(4)
    assert batch.outputs_wanted(["y", "unasked", "z"]) == ["y", "z"]
    deliver(batch, np.ones((2, 1)), z=np.zeros((2, 1)))
    assert [set(assemble(part.item)) for part in batch.parts] == [{"z"}, {"y"}]


def test_gathering_reuses_aligned_buffers() -> None:
    staging = Staging(4)
    queue = queue_of(item([1, 2]), item([3]))
    batch = queue.take(4)
    buffers = staging.lease(batch)
    feeds = staging.fill(batch, buffers)
    assert feeds["x"].ravel().tolist() == [1, 2, 3]
    assert feeds["x"].ctypes.data % ALIGNMENT == 0
    staging.release(batch, buffers)
    assert staging.lease(batch) is buffers


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.float16, np.float64, np.object_])
@pytest.mark.parametrize("shape", [(2, 3), (1, 0), (3, 1, 2)])
def test_gathering_a_lone_request_of_any_kind(batched: bool, dtype, shape) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    batch = queue_of(item(x, batched=batched)).take(4)
    staging = Staging(2)
    fed = staging.fill(batch, staging.lease(batch))["x"]
    assert fed.dtype == x.dtype
    assert np.array_equal(fed, x)
    assert not np.shares_memory(fed, x)


def test_buffers_of_many_shapes_stay_bounded() -> None:
    staging = Staging(2)
    for width in range(1, 3 * MAX_KEYS):
        batch = queue_of(item(np.ones((1, width))), item(np.ones((1, width)))).take(2)
        buffers = staging.lease(batch)
        staging.fill(batch, buffers)
        staging.release(batch, buffers)
    assert len(staging._free) == MAX_KEYS
