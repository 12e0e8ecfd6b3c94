"""The mutants fit the sources; running them is another matter (``python -m tests.mutants``)."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import ROOT
from tests.mutants.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_fits_the_sources_and_names_tests_that_exist(mutant: Mutant) -> None:
    text = (ROOT / "conductor_app" / mutant.file).read_text()
    compile(mutant.applied(text), mutant.file, "exec")
    assert all((ROOT / test).is_file() for test in mutant.tests)


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_fits_no_more_says_so() -> None:
    with pytest.raises(ValueError, match=r"stands 0 times in conductor_app/transitions/steps\.py"):
        Mutant("none", "transitions/steps.py", "no such text", "", ()).check(ROOT)
