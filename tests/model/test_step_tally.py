"""What steps tell recorders, and when: figures are made up, no kernel runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.model.context import DocumentContext
from orchestrator.model.device_question import DeviceQuestion
from orchestrator.model.recorder import Recorder
from orchestrator.model.shapes import shape_config
from orchestrator.model.step_attention import StepAttention
from orchestrator.model.step_tally import MAX_STEPS
from orchestrator.model.streams import Beside
from orchestrator.steps import AttentionPlan
from sparse_attn.estimate import Missed, bound_of, recall_of
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.kernels.decode import Attended, DenseDecode
from sparse_attn.kernels.selected import CentroidDecode

NUM_LAYERS = 3
PERIOD = 2


class Log(list[str]):
    """What was called, in order."""

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, written down."""

        def call(*args: Any, **options: Any) -> Any:
            self.append(name)
            return function(*args, **options)

        return call


def seen(query: int, question: int, layer: int) -> float:
    """What the query of a question saw in a layer."""
    return 1.0 + query + 0.1 * layer + 0.01 * question


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Plans whose figures are `seen`, of questions that are known by their seed."""
    if torch.cuda.is_available():
        pytest.skip("figures are made up on a CPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    log = Log()

    def run(self: Any, layer: int, q: Tensor) -> Attended:
        attended: Attended = self._rows.result
        attended.out.zero_()
        attended.lse_read.zero_()
        if isinstance(self, CentroidDecode):
            self.slot_bounds[layer, :, 8] = (10 * q[:, 0, 0, 0]).int().repeat_interleave(8)
        return attended

    def sample(
        self: Any, layer: int, q: Tensor, *, seeds: Tensor, chosen: Tensor, out: Missed, **_: Any
    ) -> Missed:
        for b in torch.nonzero(chosen).flatten().tolist():
            out.mean[b] = seen(int(q[b, 0, 0]), int(seeds[b]), layer)
            out.variance[b] = 0.0
            out.log_most[b] = -out.mean[b]
        return out

    for plan in (CentroidDecode, DenseDecode):
        monkeypatch.setattr(plan, "run", log.around("run", run))
        monkeypatch.setattr(plan, "spread", log.around("spread", lambda *_: None))
    monkeypatch.setattr(CentroidDecode, "sample", log.around("sample", sample))
    monkeypatch.setattr(Beside, "join", log.around("join", Beside.join))
    monkeypatch.setattr(Beside, "fork", log.around("fork", Beside.fork))
    return log


@pytest.fixture(scope="module")
def context() -> DocumentContext:
    return synthetic_context(
        shape_config(f"shape:llama-3.1-8b@{NUM_LAYERS}"),
        num_tokens=150,
        segment_tokens=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def ask(context: DocumentContext, num_questions: int, mode: str = "centroid") -> list[Any]:
    """Questions and their recorders."""
    backend, asked = TritonBackend(), []
    for seed in range(num_questions):
        keys = 24 if mode == "centroid" else None
        plan = AttentionPlan(mode=mode, keys=keys, recall_period=PERIOD, seed=seed)
        recorder = Recorder(context.resident, context.place, recall_period=PERIOD)
        asked.append(
            DeviceQuestion(
                context,
                plan,
                backend,
                recorder,
                scale=1.0,
                windows=(None,) * NUM_LAYERS,
                capacity_tokens=64,
            )
        )
    return asked


@torch.inference_mode()
def step(attention: StepAttention, questions: Sequence[DeviceQuestion]) -> None:
    """A forward whose queries hold their number."""
    heads = questions[0].plans.of(1)[0].heads
    queries = torch.tensor([float(question.num_past) for question in questions])
    q = queries.view(-1, 1, 1).repeat(1, heads.num_heads, heads.head_dim)
    attention.prepare(1)
    for layer_idx in range(NUM_LAYERS):
        attention.attend_placed(layer_idx, q)
    attention.finish()
    attention.advance(1)


def test_what_a_plan_overwrites_is_read_before(context: DocumentContext, log: Log) -> None:
    questions = ask(context, 2)
    with torch.inference_mode():
        attention = StepAttention(questions)
    log.clear()
    step(attention, questions)
    layer = ["join", "run", "fork", "spread", "sample"]
    assert log == ["join", *layer * NUM_LAYERS, "join", "join", "fork"]


def test_recorders_are_told_when_they_are_asked(
    context: DocumentContext, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ask(context, 2)
    told: list[int] = []
    monkeypatch.setattr(DeviceQuestion, "tell", lambda *_, first_query: told.append(first_query))
    with torch.inference_mode():
        attention = StepAttention(questions)
    for _ in range(MAX_STEPS):
        step(attention, questions)
    assert told == []
    step(attention, questions)  # there is no more room
    assert told == [query for query in range(MAX_STEPS) for _ in questions]
    questions[1].recorder.bytes_read_here()
    assert told[2 * MAX_STEPS :] == [MAX_STEPS] * 2
    questions[0].recorder.bytes_read_here()
    assert len(told) == 2 * MAX_STEPS + 2


def test_steps_with_others_and_alone_are_told_in_their_order(
    context: DocumentContext, log: Log
) -> None:
    """Question 0 goes on alone in between; what is sampled then is chosen anew."""
    questions = ask(context, 2)
    with torch.inference_mode():
        together, alone = StepAttention(questions), StepAttention(questions[:1])
    for _ in range(3):
        step(together, questions)
        step(alone, questions[:1])
        step(together, questions)
    for b, num_queries in ((0, 9), (1, 6)):
        recorder = questions[b].recorder
        recorder.merge()
        own, sampled = list(range(num_queries)), questions[b].sampled_layers
        samples = {i: [t for t in own if i in sampled(t)] for i in range(NUM_LAYERS)}
        assert sorted(recorder._pairs) == [(i, t) for i in samples for t in samples[i]]
        for i, queries in samples.items():
            mean = torch.tensor([seen(t, b, i) for t in queries])
            rows = torch.cat(recorder._recalls[i])
            torch.testing.assert_close(rows[:, 0], recall_of(mean, torch.zeros_like(mean)))
            assert torch.equal(rows, rows[:, :1].expand_as(rows))
        mean = torch.tensor([seen(t, b, i) for i, t in recorder._pairs])
        bounds = torch.cat(recorder._bounds)[:, 0]
        torch.testing.assert_close(bounds, bound_of(-mean, torch.zeros_like(mean)))
        counts = [keys.tolist() for keys, _, _ in recorder._keys]
        assert counts == [[80 * t] * NUM_LAYERS for t in own]
        num_kept = questions[b].plans.full.num_kept
        assert [steady for _, _, steady in recorder._keys] == [num_kept + t + 1 for t in own]


def test_a_step_tells_of_many_questions_in_as_many_operators(
    context: DocumentContext, log: Log
) -> None:
    counts = []
    for num_questions in (2, 12):
        questions = ask(context, num_questions)
        with torch.inference_mode():
            attention = StepAttention(questions)
        step(attention, questions)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            attention.advance(1)
            attention.prepare(1)
        counts.append(len([e for e in profiler.events() if e.name.startswith("aten::")]))
    # One place of the next token for each question, moved on by one launch on a GPU.
    assert counts[1] - counts[0] <= 12 - 2
    assert counts[0] < 40


def test_a_question_that_ended_is_let_go_of(context: DocumentContext, log: Log) -> None:
    """Also by those that took its steps with it."""
    questions = ask(context, 2)
    with torch.inference_mode():
        attention = StepAttention(questions)
    step(attention, questions)
    del attention
    recorder, ended = questions[1].recorder, weakref.ref(questions.pop())
    assert ended() is not None
    recorder.settle()
    gc.collect()
    assert ended() is None
