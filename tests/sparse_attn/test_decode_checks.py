"""What a decode plan refuses, and how it says so: before anything is launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn.errors import AttentionError, ShapeMismatch
from sparse_attn.folds import NUM_FOLDS, Runs
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.decode_checks import check_keys
from sparse_attn.kernels.pieces import split_runs
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit
from tests.sparse_attn.inputs import SCALE, hold, make_layer

HEADS = Heads(num_documents=1, num_queries=1, num_kv_heads=2, per_group=3, head_dim=16)


@pytest.fixture(scope="module")
def document() -> DecodeDocument:
    layer = hold(make_layer([40, 33]))
    return DecodeDocument(
        runs=layer.runs,
        k=[layer.k],
        v=[layer.v],
        steady_k=[layer.steady_k.contiguous()],
        steady_v=[layer.steady_v.contiguous()],
        indexes=[layer.index],
    )


def plans(document: DecodeDocument, heads: Heads = HEADS) -> list[DenseDecode | CentroidDecode]:
    visible = torch.tensor([document.steady_k[0].shape[1]])
    selected = CentroidDecode(
        heads, [document], visible, limit=Limit(keys=8), levels=1, scale=SCALE
    )
    return [DenseDecode(heads, [document], visible, scale=SCALE), selected]


def query(**changes: Any) -> Tensor:
    return torch.zeros(changes.pop("shape", (1, 1, 6, 16)), **changes)


@pytest.mark.parametrize(
    ("layer", "q", "said"),
    [
        (1, query(), "layer 1; limit 0 to 0"),
        (-1, query(), "layer -1"),
        (0, query(shape=(1, 2, 6, 16)), r"q: \(1, 2, 6, 16\)"),
        (0, query(shape=(1, 1, 16, 6)).transpose(2, 3), "contiguous"),
        (0, query(dtype=torch.float16), "torch.float16 on cpu; limit torch.float32"),
        (0, query(device="meta"), "on meta; limit torch.float32 on cpu"),
    ],
)
def test_a_step_that_was_not_planned_is_refused(
    document: DecodeDocument, layer: int, q: Tensor, said: str
) -> None:
    for plan in plans(document):
        with pytest.raises(AttentionError, match=said):
            plan.run(layer, q)


def test_documents_that_do_not_fit_are_refused(document: DecodeDocument) -> None:
    k, steady = document.k[0], document.steady_k[0]
    wrong: list[tuple[DecodeDocument, Heads, str]] = [
        (replace(document, v=[k[:-1]]), HEADS, r"v: \(\d+, 16\)"),
        (replace(document, k=[k.double()]), HEADS, "k: torch.float64"),
        (replace(document, k=[k.half()]), HEADS, "k: torch.float16"),
        (replace(document, v=[k.t().contiguous().t()]), HEADS, "contiguous"),
        (replace(document, steady_v=[steady[:1]]), HEADS, r"steady_v: \(1, "),
        (document, replace(HEADS, head_dim=32), r"limit \[\d+, 32\]"),
        (document, replace(HEADS, num_documents=2), "1 documents"),
    ]
    for made, heads, said in wrong:
        with pytest.raises(AttentionError, match=said):
            plans(made, heads)


@pytest.mark.parametrize(("head_dim", "per_group"), [(8, 1), (48, 1), (64, 0), (64, 17)])
def test_shapes_without_a_kernel_are_named(head_dim: int, per_group: int) -> None:
    with pytest.raises(ShapeMismatch, match="choose --backend torch"):
        replace(HEADS, head_dim=head_dim, per_group=per_group)


def test_slots_must_fit_their_numbers() -> None:
    x = torch.empty((2**31, 16), device="meta")
    with pytest.raises(ShapeMismatch, match="2147483648 slots; limit 2147483647"):
        check_keys("k", x, x, (None, 16))


def test_a_share_of_a_document_is_cut_as_the_whole_is() -> None:
    """Bits follow how keys are cut: that must not depend on how many callers share them."""
    per_fold, num_kv_heads = 16, 8
    starts = torch.arange(num_kv_heads * NUM_FOLDS * per_fold) * 8192
    heads = torch.arange(num_kv_heads).unsqueeze(1) * NUM_FOLDS
    whole = Runs(
        first=starts,
        count=torch.full_like(starts, 8192),
        bounds=(heads + torch.arange(NUM_FOLDS + 1)) * per_fold,
    )
    few = Runs(first=starts[:1], count=whole.count[:1], bounds=torch.tensor([[0] + [1] * 8]))
    for runs, num_keys in ((whole, None), (few, whole.num_keys)):
        assert set(split_runs(runs, num_keys)[0][:, 1].tolist()) == {4096}
    assert set(split_runs(few)[0][:, 1].tolist()) == {256}
