"""What plans of kernels are predicted to take, against the tensors that they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.evaluation.synthetic_layers import LayerShape, make_document
from orchestrator.planner.plan_buffers import (
    PlanSizes,
    dense_plan_bytes,
    question_plan_bytes,
    selected_plan_bytes,
)
from orchestrator.planner.workload import Reading
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit

SHAPE = LayerShape(num_tokens=32_768, num_kv_heads=2, head_dim=32, segment_tokens=4096)
NUM_LAYERS, PER_GROUP = 2, 3


@pytest.fixture(scope="module")
def document() -> DecodeDocument:
    return make_document(
        SHAPE, num_layers=NUM_LAYERS, dtype=torch.float32, device=torch.device("cpu")
    )


def sizes_of(document: DecodeDocument) -> PlanSizes:
    index = document.indexes[0]
    return PlanSizes(
        num_layers=NUM_LAYERS,
        num_kv_heads=SHAPE.num_kv_heads,
        per_group=PER_GROUP,
        head_dim=SHAPE.head_dim,
        item_bytes=4,
        keys=SHAPE.num_tokens,
        segments=SHAPE.num_segments,
        steady=SHAPE.num_steady,
        columns=index.clusters.num_units,
        groups=index.groups.num_units,
    )


def held_bytes(plan: Any) -> int:
    """Of every tensor that a plan made for itself, each storage once, not document and tables."""
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for own in value:
                look(own)
        elif hasattr(value, "__dict__") or hasattr(value, "__slots__"):
            names = getattr(value, "__slots__", None) or vars(value)
            if type(value).__module__.startswith("sparse_attn.kernels") and not isinstance(
                value, DecodeDocument
            ):
                for name in names:
                    look(getattr(value, name, None))

    skipped = ("_kept", "_clusters", "_first", "_evidence", "_visible")
    for name, value in vars(plan).items():
        if name not in skipped:
            look(value)
    return sum(found.values())


def make_plan(document: DecodeDocument, num_queries: int, reading: Reading) -> Any:
    heads = Heads(
        num_documents=1,
        num_queries=num_queries,
        num_kv_heads=SHAPE.num_kv_heads,
        per_group=PER_GROUP,
        head_dim=SHAPE.head_dim,
    )
    visible = torch.tensor([100])
    num_slots = document.k[0].shape[0]
    masses = [torch.zeros(num_slots) for _ in range(NUM_LAYERS)]
    evidence = [masses] if num_queries == 1 else None
    if reading.mode == "exact":
        return DenseDecode(heads, [document], visible, scale=1.0, evidence=evidence)
    return CentroidDecode(
        heads,
        [document],
        visible,
        limit=Limit(keys=reading.keys),
        levels=reading.levels,
        scale=1.0,
        evidence=evidence,
    )


@pytest.mark.parametrize("num_queries", [1, 16])
@pytest.mark.parametrize(
    "reading",
    [
        Reading(mode="exact"),
        Reading(mode="centroid", keys=2048, levels=1),
        Reading(mode="centroid", keys=2048, levels=2),
        Reading(mode="centroid", keys=6000, levels=2),
    ],
    ids=str,
)
def test_plans_take_what_is_predicted(
    document: DecodeDocument, reading: Reading, num_queries: int
) -> None:
    predict = dense_plan_bytes if reading.mode == "exact" else selected_plan_bytes
    predicted = predict(sizes_of(document), reading, num_queries)
    assert predicted == pytest.approx(
        held_bytes(make_plan(document, num_queries, reading)), rel=0.05
    )


def test_a_question_has_a_plan_for_each_size_of_tile(document: DecodeDocument) -> None:
    sizes, reading = sizes_of(document), Reading(mode="centroid", keys=2048, levels=2)
    alone, tile, rest = (selected_plan_bytes(sizes, reading, n) for n in (1, 16, 5))
    assert question_plan_bytes(sizes, reading, 1) == alone
    assert question_plan_bytes(sizes, reading, 32) == alone + tile
    assert question_plan_bytes(sizes, reading, 37) == alone + tile + rest
