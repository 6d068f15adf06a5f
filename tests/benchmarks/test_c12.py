"""Row C12: which tests it runs, and how they are shared out."""

from __future__ import annotations

import pytest

from benchmarks.bars.c12 import KERNELS, collect_tests, share_out


def test_every_file_of_kernels_has_tests_that_need_a_gpu() -> None:
    files = [f"tests/sparse_attn/test_kernel_{name}.py" for name in KERNELS]
    names = collect_tests(files)
    assert {name.partition("::")[0] for name in names} == set(files)
    with pytest.raises(SystemExit, match="test_kernel_sample"):
        collect_tests(["tests/sparse_attn/test_kernel_sample.py"])


@pytest.mark.parametrize(("num_tests", "num_shares"), [(1, 14), (14, 14), (15, 4), (226, 14)])
def test_shares_are_neighbours_and_none_is_empty(num_tests: int, num_shares: int) -> None:
    tests = [str(i) for i in range(num_tests)]
    shares = share_out(tests, num_shares)
    assert [test for share in shares for test in share] == tests
    assert 0 < len(shares) <= num_shares
    assert all(shares)
