"""Ids of roots and of children."""

from __future__ import annotations

import datetime as dt
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor_app.store.ids import as_child_id, derive_child_id, first_at, first_of_tree, new_root_id

STEPS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}", fullmatch=True)


def milliseconds(value: uuid.UUID) -> int:
    return value.int >> 80


def test_a_roots_id_is_a_uuid7_of_now_and_ids_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_root_id() for _ in range(1_000)]
    after = time.time_ns() // 1_000_000
    assert {(value.version, value.variant) for value in ids} == {(7, uuid.RFC_4122)}
    assert all(before <= milliseconds(value) <= after for value in ids)
    assert [milliseconds(value) for value in ids] == sorted(milliseconds(value) for value in ids)
    assert len(set(ids)) == 1_000
    assert all(type(value) is uuid.UUID for value in ids)


@given(st.uuids(), STEPS, st.integers(0, 2**32 - 1))
def test_a_childs_id_is_a_uuid8_with_its_parents_timestamp(parent: uuid.UUID, step: str, generation: int) -> None:
    child = derive_child_id(parent, step, generation)
    assert (child.version, child.variant) == (8, uuid.RFC_4122)
    assert milliseconds(child) == milliseconds(parent)
    assert child == derive_child_id(uuid.UUID(str(parent)), step, generation)


@given(st.uuids(), STEPS, STEPS, st.integers(0, 9), st.integers(0, 9))
def test_two_steps_or_generations_are_two_children(
    parent: uuid.UUID, one: str, other: str, first: int, second: int
) -> None:
    same = (one, first) == (other, second)
    assert (derive_child_id(parent, one, first) == derive_child_id(parent, other, second)) is same


def test_an_id_never_changes_between_releases() -> None:
    parent = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")
    assert [str(derive_child_id(parent, step, generation)) for step, generation in [("charge", 0), ("charge", 1)]] == [
        "01890a5d-ac96-81af-9920-da24d74dcb24",
        "01890a5d-ac96-8b87-8bc7-abc472330aea",
    ]


def test_grandchildren_and_siblings_do_not_collide() -> None:
    root = new_root_id()
    level = [root]
    seen = {root}
    for _ in range(4):
        level = [derive_child_id(parent, f"step-{index}") for parent in level for index in range(6)]
        seen.update(level)
    assert len(seen) == 1 + 6 + 36 + 216 + 1_296


@pytest.mark.parametrize("generation", [-1, 2**32])
def test_a_generation_is_a_small_number(generation: int) -> None:
    with pytest.raises(OverflowError):
        derive_child_id(uuid.uuid4(), "a", generation)


def test_a_childs_id_is_told_from_other_task_ids_by_its_version() -> None:
    child = derive_child_id(new_root_id(), "a")
    assert as_child_id(str(child)) == child
    for other in (str(new_root_id()), str(uuid.uuid4()), "a", "", None, 7, "x" * 14 + "8" + "x" * 21, child):
        assert as_child_id(other) is None


def test_the_first_id_of_an_instant_sorts_before_all_that_are_made_later() -> None:
    before = dt.datetime.now(dt.UTC)
    root = new_root_id()
    child = derive_child_id(root, "charge")
    after = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=2)
    assert first_at(before) < root < first_at(after)
    assert first_at(before) < child < first_at(after)
    assert first_of_tree(root) < min(root, child)
    assert first_of_tree(child) == first_of_tree(root)
