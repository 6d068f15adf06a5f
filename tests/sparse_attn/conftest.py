"""Where the tests of decode plans run: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparse_attn.kernels import decode
from tests.sparse_attn.decoding import Kind, fewer_programs


@pytest.fixture(
    params=[
        pytest.param(Kind(device="cpu", dtype=torch.float32, out=1e-3, lse=1e-3), id="interpreter"),
        pytest.param(
            Kind(device="cuda", dtype=torch.bfloat16, out=1e-2, lse=1e-3),
            id="gpu",
            marks=pytest.mark.gpu,
        ),
    ]
)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    found: Kind = request.param
    if found.is_exact and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    if found.is_exact:
        fewer_programs(monkeypatch)
        # A product of 16 rows and 64 columns has other bits in numpy than one of more rows.
        options = {"BLOCK_N": 128, "STAGES": 1, "num_warps": 4}
        monkeypatch.setattr(decode, "dense_options", lambda head_dim: options)
    return found
