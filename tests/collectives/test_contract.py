"""One rank and threads obey the contract of a Group; processes do so in `test_distributed.py`."""

from __future__ import annotations

import pytest

from collectives import Group, SoloGroup, run_threads
from tests.collectives.contract import CHECKS, Check, check_contract


@pytest.mark.parametrize("check", CHECKS)
def test_one_rank(check: Check) -> None:
    group: Group = SoloGroup()
    check_contract(group, check)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_threads(check: Check, size: int) -> None:
    def work(group: Group) -> int:
        check_contract(group, check)
        return group.rank

    assert run_threads(size, work) == list(range(size))
