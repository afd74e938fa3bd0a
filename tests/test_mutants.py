"""Every deliberate bug of tests/mutants.py still applies to the code: one that does not shows nothing any more."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_applies(name):
    mutant = MUTANTS[name]
    text = (ROOT / mutant.file).read_text()
    assert [old for old, new in mutant.changes.items() if text.count(old) != 1 or old == new] == []
    assert all((ROOT / tests).exists() for tests in mutant.tests.split())
