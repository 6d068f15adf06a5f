"""Plans of one document share its look-up tables, for as long as the document is there."""

from __future__ import annotations

from weakref import ref

import torch

from sparse_attn.api import find_backend
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.kernels.decode import DecodeDocument, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit
from tests.sparse_attn.inputs import SCALE, hold, make_layer

HEADS = Heads(num_documents=1, num_queries=1, num_kv_heads=2, per_group=3, head_dim=16)


def make_plan(backend: TritonBackend, document: DecodeDocument, levels: int) -> CentroidDecode:
    return backend.plan_selected(
        HEADS,
        [document],
        torch.tensor([document.steady_k[0].shape[1]]),
        limit=Limit(keys=8),
        levels=levels,
        scale=SCALE,
        estimates=True,
    )


def test_tables_are_made_once_and_go_with_their_document() -> None:
    backend = find_backend("triton")
    assert isinstance(backend, TritonBackend)
    layer = hold(make_layer([40, 33]))
    document = DecodeDocument(
        runs=layer.runs,
        k=[layer.k],
        v=[layer.v],
        steady_k=[layer.steady_k.contiguous()],
        steady_v=[layer.steady_v.contiguous()],
        indexes=[layer.index],
    )
    plans = [make_plan(backend, document, levels) for levels in (1, 2)]
    assert plans[0]._clusters is plans[1]._clusters
    clusters = ref(layer.index.clusters)
    del layer, document
    assert clusters() is not None  # a plan holds addresses of it
    plans.clear()
    assert clusters() is None
