"""SM groups against counting by hand: disjoint while there are enough, else as little shared as can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dstack_sched.engine.sm_groups import SmGroups, blocks, groups_for

SIZES = st.integers(1, 64)


@st.composite
def held(draw: st.DrawFn) -> tuple[SmGroups, list[int]]:
    """A device on which sets of groups were held and some of them released again."""
    sm = SmGroups(draw(SIZES))
    masks = draw(st.lists(st.integers(1, 2**sm.groups - 1), max_size=10))
    for mask in masks:
        sm.hold(mask)
    kept = []
    for mask in masks:
        if draw(st.booleans()):
            sm.release(mask)
        else:
            kept.append(mask)
    return sm, kept


def loads(groups: int, masks: list[int]) -> list[int]:
    return [sum(mask >> group & 1 for mask in masks) for group in range(groups)]


@given(held())
def test_what_is_held_is_counted(state: tuple[SmGroups, list[int]]) -> None:
    sm, masks = state
    assert [sm.holders(group) for group in range(sm.groups)] == loads(sm.groups, masks)


@given(held(), st.data())
def test_the_choice_shares_as_little_as_any_could(
    state: tuple[SmGroups, list[int]], data: st.DataObject
) -> None:
    sm, masks = state
    count = data.draw(st.integers(1, sm.groups))
    before = tuple(data.draw(st.lists(st.integers(1, 2**sm.groups - 1), max_size=3)))
    chosen = sm.choose(count, before)
    assert chosen.bit_count() == count and chosen < 1 << sm.groups
    by_group = loads(sm.groups, masks)
    shared = sum(load for group, load in enumerate(by_group) if chosen >> group & 1)
    assert shared == sum(sorted(by_group)[:count])


@given(held(), st.data())
def test_a_set_it_had_before_is_kept_where_it_is_as_good(
    state: tuple[SmGroups, list[int]], data: st.DataObject
) -> None:
    sm, _ = state
    count = data.draw(st.integers(1, sm.groups))
    first = sm.choose(count)
    other = data.draw(st.integers(1, 2**sm.groups - 1))
    assert sm.choose(count, (first,)) == first
    if other.bit_count() != count:
        assert sm.choose(count, (other, first)) == first


@given(SIZES, st.lists(st.floats(1, 100), max_size=12))
def test_batches_that_fit_beside_one_another_are_disjoint(groups: int, percents: list[float]) -> None:
    sm, used = SmGroups(groups), 0
    for percent in percents:
        count = groups_for(percent, groups)
        if used.bit_count() + count > groups:
            break
        mask = sm.choose(count)
        assert not mask & used
        sm.hold(mask)
        used |= mask


@given(SIZES, st.floats(0.1, 100))
def test_a_share_is_the_nearest_number_of_groups(groups: int, percent: float) -> None:
    count = groups_for(percent, groups)
    assert 1 <= count <= groups
    assert abs(count - percent * groups / 100) <= 0.5 + 1e-9 or count == 1


def test_powers_of_two_are_blocks_of_neighbours_at_their_multiples() -> None:
    """Few different sets: a backend keeps a CUDA graph for each it was ever told."""
    sm = SmGroups(16)
    assert [sm.choose(8), blocks(4, 16)[:4]] == [0x00FF, (0x000F, 0x00F0, 0x0F00, 0xF000)]
    sm.hold(0x000F)
    assert sm.choose(8) == 0xFF00
    assert sm.choose(4) == 0x00F0
