"""A question by plans of kernels against one by operators: outputs, and what is told of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.model.attention import Attention, make_attention
from orchestrator.model.context import DocumentContext
from orchestrator.model.decoder import Placing, Room
from orchestrator.model.hf_config import config_from_hf
from orchestrator.model.recorder import Recorder
from orchestrator.steps import AttentionPlan
from sparse_attn.api import find_backend
from tests.model.tiny import CASES
from tests.sparse_attn.decoding import fewer_programs

NUM_TOKENS, CAPACITY, WINDOW = 230, 6, 40
WINDOWS = (None, WINDOW, None)
FORWARDS = (2, 1, 1)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
pytestmark = [  # logs of nothing, in what is masked
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("tests/test_gpu.py asks the same of a GPU")
    fewer_programs(monkeypatch)


@pytest.fixture(scope="module")
def context() -> DocumentContext:
    return make_context("float32")


def make_context(kv_dtype: str) -> DocumentContext:
    """A document of four segments for two full layers and a sliding one."""
    raw = json.loads(CASES["llama-yarn-wide-heads"]().to_json_string(use_diff=False))
    raw["architectures"] = ["LlamaForCausalLM"]
    cfg = replace(config_from_hf(raw, name="tiny"), num_layers=3, windows=WINDOWS)
    return synthetic_context(
        cfg,
        num_tokens=NUM_TOKENS,
        segment_tokens=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_dtype=kv_dtype,
    )


def ask(context: DocumentContext, backend: str, plan: AttentionPlan) -> tuple[Tensor, Recorder]:
    """Outputs of a question of two tokens and two answer tokens, all layers one after another."""
    recorder = Recorder(context.resident, context.place, recall_period=plan.recall_period)
    attention = make_attention(
        context,
        plan,
        find_backend(backend),
        recorder,
        scale=HEAD_DIM**-0.5,
        windows=WINDOWS,
        capacity_tokens=CAPACITY,
    )
    generator = torch.Generator().manual_seed(1)
    outs = []
    with torch.inference_mode():
        for num_tokens in FORWARDS:
            attention.prepare(num_tokens)
            for layer_idx in range(len(WINDOWS)):
                q, k, v = (
                    torch.randn(num_tokens, heads, HEAD_DIM, generator=generator)
                    for heads in (HEADS, KV_HEADS, KV_HEADS)
                )
                outs.append(attend(attention, layer_idx, 2.0 * q, k, v).flatten().clone())
            attention.advance(num_tokens)
        recorder.merge()
    return torch.cat(outs), recorder


def attend(attention: Attention, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As a decoder calls it, whose last layers write keys and values to their room themselves."""
    if not isinstance(attention, Placing) or layer_idx < 2:
        return attention(layer_idx, q, k, v)
    room = attention.room(layer_idx)
    assert isinstance(room, Room)
    rows = slice(int(room.at), int(room.at) + q.shape[0])
    room.k[:, rows], room.v[:, rows] = k.transpose(0, 1), v.transpose(0, 1)
    return attention.attend_placed(layer_idx, q)


PLANS: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "window": {"mode": "window", "keys": 0},
    "keys": {"mode": "centroid", "keys": 40, "audit": True},
    "mass": {"mode": "centroid", "keys": None, "mass": 0.6},
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_give_what_operators_give(context: DocumentContext, name: str) -> None:
    plan = AttentionPlan(**PLANS[name], recall_period=1)
    (ours, seen), (theirs, expected) = (ask(context, b, plan) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert seen.attended_keys() == pytest.approx(expected.attended_keys(), rel=1e-6)
    mass, wanted = (torch.from_numpy(x.token_mass()) for x in (seen, expected))
    torch.testing.assert_close(mass, wanted, atol=1e-3, rtol=0)
    ours_recall, theirs_recall = seen.recall(), expected.recall()
    assert ours_recall.mass_mean == pytest.approx(theirs_recall.mass_mean, abs=0.03)
    if name != "window":  # whose bound goes by groups in a plan, and by clusters elsewhere
        assert ours_recall.bound.p50 == pytest.approx(theirs_recall.bound.p50, abs=1e-3)
    if plan.audit:
        assert ours_recall.audit is not None
        assert theirs_recall.audit is not None
        assert ours_recall.audit.mass_mean == pytest.approx(theirs_recall.audit.mass_mean, abs=1e-4)
        assert ours_recall.audit.bound_violations == 0


@pytest.mark.parametrize("plan", [{"mode": "exact"}, {"mode": "centroid", "keys": 40}], ids=str)
def test_plans_of_a_document_in_fp8(context: DocumentContext, plan: dict[str, Any]) -> None:
    narrow, own = make_context("fp8"), AttentionPlan(**plan, recall_period=4)
    assert narrow.resident.k[0].dtype == torch.float8_e4m3fn
    (ours, seen), (theirs, expected) = (ask(narrow, b, own) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    mass, wanted = (torch.from_numpy(x.token_mass()) for x in (seen, expected))
    torch.testing.assert_close(mass, wanted, atol=1e-3, rtol=0)
    assert seen.recall().mass_mean == pytest.approx(expected.recall().mass_mean, abs=0.1)
    if own.mode == "exact":  # near what its bytes were made of, and not the same
        error = ours - ask(context, "torch", own)[0]
        assert 1e-3 < float(error.abs().max()) < 0.3


def test_two_levels_cover_every_key(context: DocumentContext) -> None:
    """Each query opens groups for itself here, so the selection differs; what it says must hold."""
    plan = AttentionPlan(mode="centroid", keys=24, levels=2, recall_period=1, audit=True)
    ours, seen = ask(context, "triton", plan)
    exact, _ = ask(context, "torch", AttentionPlan(mode="exact"))
    recall = seen.recall()
    assert recall.audit is not None
    assert recall.audit.bound_violations == 0
    assert abs(recall.mass_mean - recall.audit.mass_mean) < 0.05
    window, _ = ask(context, "torch", AttentionPlan(mode="window", keys=0))
    assert (ours - exact).norm() < 0.5 * (window - exact).norm()
