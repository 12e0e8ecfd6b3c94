"""The explicit model, searched to the end: the design holds, and each mutant of it is caught."""

from __future__ import annotations

import dataclasses

import pytest

from tests.model.interleavings import MUTANTS, Design, search

#: Each with the number of its states: a model that lost some of its moves would hold, too.
DESIGNS = {
    "an invocation": (Design(), 104),
    "an invocation that may fail in every way": (Design(has_timeout=True, cancels=(0, 1), may_rouse=True), 4_886),
    "a map that the first failure ends": (Design(children=2, may_rouse=True), 7_680),
    "a map that waits for all": (Design(children=2, fails_fast=False, has_timeout=True), 13_176),
    "a cancelled map": (Design(children=2, fails_fast=False, cancels=(0,)), 3_744),
    "a map of one child at a time": (Design(children=3, max_parallel=1, fails_fast=False), 1_666),
    "a map of one child at a time, of which the last is cancelled": (
        Design(children=3, max_parallel=1, fails_fast=False, cancels=(3,)),
        3_710,
    ),
    "a gather that the first failure ends": (Design(children=2, is_gather=True), 6_625),
    "a gather that waits for all": (Design(children=2, is_gather=True, fails_fast=False), 4_729),
}

#: By which design a mutant is caught, and what is wrong then.
CAUGHT = {
    "a run writes with any fence": ("an invocation", "a zombie has written"),
    "a claim asks for no status": ("an invocation", "a body is run for ever"),
    "the wake-up has a condition on the status": ("an invocation that may fail in every way", "a lost wake-up"),
    "a suspension does not look again": ("an invocation that may fail in every way", "a lost wake-up"),
    "an end does not wake the parent": ("an invocation", "a lost wake-up"),
    "nobody publishes again": ("an invocation", "stuck"),
    "a crash is no attempt": ("an invocation", "a body is run for ever"),
    "a decided step is decided again": ("a map that the first failure ends", "the step was decided twice"),
    "a map is decided one child too early": (
        "a map that waits for all",
        "the parent has succeeded with an open child",
    ),
    "a gather counts members that have ended": ("a gather that waits for all", "stuck"),
    "an ending child lets no sibling go": ("a map of one child at a time", "stuck"),
    "a child that was held back lets a sibling go": (
        "a map of one child at a time, of which the last is cancelled",
        "too many children in flight",
    ),
    "a cancelled parent leaves its children alone": ("a cancelled map", "a child is open under a cancelled parent"),
    "a timeout does not wake the parent": ("an invocation that may fail in every way", "a lost wake-up"),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_nothing_goes_wrong_in_any_order_and_everything_can_always_end(name: str) -> None:
    design, states = DESIGNS[name]
    found = search(design)
    assert not found.wrong, f"{found.wrong} after: {', '.join(found.path)}"
    assert found.states == states


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_design_without_one_of_its_guards_is_caught(mutant: str) -> None:
    name, wrong = CAUGHT[mutant]
    found = search(dataclasses.replace(DESIGNS[name][0], mutant=mutant))
    assert found.wrong == wrong, f"{found.wrong or 'nothing'} after {found.states} states: {', '.join(found.path)}"
