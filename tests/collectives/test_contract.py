"""One rank and threads obey the contract of a Group; processes do so in `test_distributed.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from collectives import Group, SoloGroup, run_threads
from tests.collectives.contract import CHECKS, CHECKS_ONCE, Check, check_contract


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


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS_ONCE)
def test_bytes_control_and_subgroups(check: Callable[[Group], None], size: int) -> None:
    if size == 0:
        check(SoloGroup())
    else:
        run_threads(size, check)


def test_subgroups_of_threads_obey_the_contract() -> None:
    def work(group: Group) -> None:
        part = group.subgroup([0, 2, 3])
        if part is not None:
            for check in CHECKS:
                check(part, (3, 5), torch.float32)

    run_threads(4, work)
