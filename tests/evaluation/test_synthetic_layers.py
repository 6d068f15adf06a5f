"""Made-up layers are what plans take: every slot in one run and one unit, statistics true."""

from __future__ import annotations

import torch

from orchestrator.evaluation.synthetic_layers import LayerShape, make_document
from sparse_attn.folds import NUM_FOLDS

SHAPE = LayerShape(
    num_tokens=192,
    num_kv_heads=2,
    head_dim=16,
    segment_tokens=64,
    keys_per_cluster=4,
    clusters_per_group=3,
    num_steady=8,
)


def test_every_slot_is_in_one_unit_of_each_level() -> None:
    document = make_document(SHAPE, num_layers=2, dtype=torch.float32, device=torch.device("cpu"))
    num_slots = SHAPE.num_kv_heads * SHAPE.num_tokens
    spans = [s for g in range(2) for f in range(NUM_FOLDS) for s in document.runs.of_fold(g, f)]
    assert sorted(slot for span in spans for slot in range(span.start, span.stop)) == list(
        range(num_slots)
    )
    for index, k in zip(document.indexes, document.k, strict=True):
        for units in (index.clusters, index.groups):
            slots = [
                slot
                for start, size in zip(
                    units.starts.flatten().tolist(), units.sizes.flatten().tolist(), strict=True
                )
                for slot in range(start, start + size)
            ]
            assert slots == list(range(num_slots))
            assert units.bounds[:, -1].tolist() == [units.num_units] * 2
        first, size = int(index.clusters.starts[1, 2]), int(index.clusters.sizes[1, 2])
        mean = k[first : first + size].mean(dim=0)
        torch.testing.assert_close(
            index.clusters.centroids[1, 2].float(), mean, atol=1e-3, rtol=1e-3
        )
        assert int(index.group_counts.sum()) == index.clusters.sizes.numel()
    assert not torch.equal(document.k[0], document.k[1])
