"""Several questions in one forward: each row, and all that is told of it, as if it were alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.model.context import DocumentContext
from orchestrator.model.device_attention import DeviceAttention
from orchestrator.model.device_question import DeviceQuestion
from orchestrator.model.hf_config import config_from_hf
from orchestrator.model.recorder import Recorder
from orchestrator.model.step_attention import StepAttention, kind_of
from orchestrator.steps import AttentionPlan
from sparse_attn.kernels.backend import TritonBackend
from tests.model.tiny import CASES
from tests.sparse_attn.decoding import fewer_programs

WINDOWS = (None, 40)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
pytestmark = [  # logs of nothing, in what is masked
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
BY_KEYS = {"mode": "centroid", "keys": 24, "num_strata": 4}
PLANS: tuple[dict[str, Any], ...] = (
    {"mode": "exact"},
    BY_KEYS,
    {**BY_KEYS, "seed": 5, "audit": True},
    {"mode": "centroid", "keys": None, "mass": 0.6, "num_strata": 4},
    {"mode": "exact", "seed": 1},
    {"mode": "window", "keys": 0, "num_strata": 4},
)
DOCUMENTS = (0, 0, 1, 1, 1, 0)
CAPACITIES = (3, 5, 3, 70, 4, 3)


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("tests/test_gpu.py asks the same of a GPU")
    fewer_programs(monkeypatch)


@pytest.fixture(scope="module")
def contexts() -> list[DocumentContext]:
    """Documents of two lengths for a full layer and a sliding one."""
    raw = json.loads(CASES["llama-yarn-wide-heads"]().to_json_string(use_diff=False))
    raw["architectures"] = ["LlamaForCausalLM"]
    cfg = replace(config_from_hf(raw, name="tiny"), num_layers=2, windows=WINDOWS)
    return [
        synthetic_context(
            cfg,
            num_tokens=num_tokens,
            segment_tokens=64,
            dtype=torch.float32,
            device=torch.device("cpu"),
            seed=num_tokens,
        )
        for num_tokens in (150, 110)
    ]


class Asked:
    """The questions of `PLANS`, one time over; which tokens each has had."""

    def __init__(self, contexts: list[DocumentContext]) -> None:
        backend = TritonBackend()
        self.recorders, self.questions = [], []
        for document, given, capacity in zip(DOCUMENTS, PLANS, CAPACITIES, strict=True):
            context, plan = contexts[document], AttentionPlan(**given, recall_period=1)
            recorder = Recorder(context.resident, context.place, recall_period=1)
            question = DeviceQuestion(
                context,
                plan,
                backend,
                recorder,
                scale=HEAD_DIM**-0.5,
                windows=WINDOWS,
                capacity_tokens=capacity,
            )
            self.recorders.append(recorder)
            self.questions.append(question)
        self.outs: list[list[Tensor]] = [[] for _ in PLANS]

    def step(self, members: Sequence[int], attention: StepAttention | DeviceAttention) -> None:
        """A forward of one token of these questions."""
        attention.prepare(1)
        for layer_idx in range(len(WINDOWS)):
            rows = [self._row(i, layer_idx) for i in members]
            q, k, v = (torch.cat(own) for own in zip(*rows, strict=True))
            out = attention(layer_idx, 2.0 * q, k, v)
            for i, own in zip(members, out, strict=True):
                self.outs[i].append(own.clone())
        attention.advance(1)

    def _row(self, i: int, layer_idx: int) -> list[Tensor]:
        seed = 1000 * i + 10 * self.questions[i].num_past + layer_idx
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(1, heads, HEAD_DIM, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]

    def told(self, i: int) -> tuple[object, ...]:
        """Everything that a question's recorder says."""
        recorder = self.recorders[i]
        recorder.merge()
        mass = recorder.token_mass().tolist()
        return mass, recorder.attended_keys(), recorder.bytes_read(), recorder.recall()


def test_each_is_as_it_would_be_alone(contexts: list[DocumentContext]) -> None:
    """Questions of all kinds on two documents; one joins in the second step, two leave before."""
    together, alone = Asked(contexts), Asked(contexts)
    with torch.inference_mode():
        for joined in ((0, 1, 2, 4, 5), (1, 2, 3)):
            questions = together.questions
            members = sorted(joined, key=lambda i: repr(kind_of(questions[i])))
            together.step(members, StepAttention([questions[i] for i in members]))
            for i in joined:
                alone.step([i], DeviceAttention(alone.questions[i]))
    for i, given in enumerate(PLANS):
        for own, wanted in zip(together.outs[i], alone.outs[i], strict=True):
            assert torch.equal(own, wanted), given
        assert together.told(i) == alone.told(i), given
    recalls = [recorder.recall() for recorder in together.recorders]
    assert recalls[1].mass_mean != recalls[2].mass_mean
    assert recalls[2].audit is not None
    assert all(0.0 < recall.mass_mean < 1.0 for recall in (recalls[1], recalls[3], recalls[5]))
