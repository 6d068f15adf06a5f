"""The whole path on one GPU against the CPU: `make test-gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.answering import Session
from orchestrator.engine import Engine
from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.ingest import IngestOptions
from orchestrator.model import step_tally
from orchestrator.model.attention import make_attention
from orchestrator.model.recorder import Recorder
from orchestrator.model.sampler import find_greatest
from orchestrator.model.shapes import shape_config
from orchestrator.model.streams import Beside
from orchestrator.steps import AttentionPlan, Forward, ForwardEach
from orchestrator.types import Answer, AskOptions, Mode, Sampling
from sparse_attn import reference, torch_backend
from sparse_attn.api import find_backend
from tests.sparse_attn.inputs import SCALE, random_qkv
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

pytestmark = pytest.mark.gpu

NAME = "boxes"
OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)


def first_logits(root: Path, device: str, dtype: str, mode: Mode) -> torch.Tensor:
    """Logits after the question, from a document ingested on the same device."""
    store = root / f"store-{device}-{dtype}"
    backend = "torch" if device == "cuda" else "native"  # heads too small for kernels
    options = {"store": store, "device": device, "dtype": dtype, "backend": backend}
    with Engine.load(str(root / "model"), **options) as engine:
        engine.ingest(text=TEXT, name=NAME, options=OPTIONS)
        # Everything is read, through clusters: which of two near ties is read may differ by device.
        budget = "100%" if mode == "centroid" else None
        asked = AskOptions(mode=mode, budget=budget)
        with engine.begin(NAME, QUESTION, asked, num_answer_tokens=4) as session:
            return session.forward(session.question_ids).cpu()


@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", ["exact", "window", "centroid"])
def test_float32_agrees_with_the_cpu(tmp_path: Path, case: str, mode: Mode) -> None:
    save_tiny_model(tmp_path / "model", case)
    ours, theirs = (first_logits(tmp_path, d, "float32", mode) for d in ("cuda", "cpu"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["llama-yarn-wide-heads", "qwen3-wide-heads", "gemma3-wide-heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_answer_as_torch_does(tmp_path: Path, case: str, dtype: str) -> None:
    save_tiny_model(tmp_path / "model", case)
    asked: list[dict[str, Any]] = [
        {"mode": "exact"},
        {"mode": "window"},
        {"mode": "centroid", "budget": "25%"},
        {"mode": "centroid", "budget": "25%", "levels": 2, "audit": True},
        {"mode": "centroid", "mass": 0.8, "audit": True},
    ]
    answers: dict[str, list[Answer]] = {}
    for backend in ("torch", "triton"):
        options = {"store": tmp_path, "device": "cuda", "dtype": dtype, "backend": backend}
        with Engine.load(str(tmp_path / "model"), **options) as engine:
            engine.ingest(text=TEXT, name=NAME, options=OPTIONS)
            answers[backend] = [
                engine.ask(NAME, QUESTION, max_tokens=8, **options) for options in asked
            ]
    for theirs, ours in zip(answers["torch"], answers["triton"], strict=True):
        if dtype == "float32":
            assert ours.text == theirs.text
            tolerance = 0.02 if ours.selection.levels == 2 else 1e-3
            assert ours.recall.mass_mean == pytest.approx(theirs.recall.mass_mean, abs=0.03)
            ours_mean, theirs_mean = (x.usage.attended_keys_mean for x in (ours, theirs))
            assert ours_mean == pytest.approx(theirs_mean, rel=tolerance)
            assert [x.start_char for x in ours.evidence[:1]] == [
                x.start_char for x in theirs.evidence[:1]
            ]
        if ours.recall.audit is not None:
            assert abs(ours.recall.mass_mean - ours.recall.audit.mass_mean) < 0.1
            assert ours.recall.audit.bound_violations == 0


def test_bfloat16_answers_with_recall_and_evidence(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama-yarn-wide-heads")
    with Engine.load(str(tmp_path / "model"), store=tmp_path, device="cuda") as engine:
        engine.ingest(text=TEXT, name=NAME, options=OPTIONS)
        for levels in (1, 2):
            answer = engine.ask(
                NAME,
                QUESTION,
                mode="centroid",
                budget="25%",
                levels=levels,
                max_tokens=4,
                audit=True,
            )
            assert answer.recall.audit is not None
            assert abs(answer.recall.mass_mean - answer.recall.audit.mass_mean) < 0.1
            assert answer.recall.audit.bound_violations == 0


ASKED: tuple[dict[str, Any], ...] = (
    {"mode": "exact"},
    {"mode": "centroid", "budget": 256},
    {"mode": "centroid", "budget": 256, "seed": 4},
    {"mode": "window"},
    {"mode": "centroid", "budget": 256, "levels": 2},
    {"mode": "centroid", "mass": 0.8},
    {"mode": "exact"},
)
MANY = ASKED * 3  # more rows than one tile of a product has


def begin_all(engine: Engine, stack: ExitStack) -> list[Session]:
    """The questions of `MANY` on two documents, read and no more."""
    begun = []
    for i, given in enumerate(MANY):
        seed = Sampling(seed=given.get("seed", 0))
        options = {name: value for name, value in given.items() if name != "seed"}
        session = stack.enter_context(
            engine.begin(
                f"{NAME}{i % 2}",
                QUESTION,
                AskOptions(**options, sampling=seed),
                num_answer_tokens=8,
            )
        )
        session.forward(session.question_ids)
        begun.append(session)
    return begun


def told(session: Session) -> tuple[object, ...]:
    """Everything that the question's recorder says."""
    recorder = session.end()
    mass = recorder.token_mass().tolist()
    return mass, recorder.attended_keys(), recorder.bytes_read(), recorder.recall()


@pytest.mark.parametrize("case", ["llama-yarn-wide-heads", "gemma3-wide-heads"])
def test_questions_in_one_forward_have_the_bits_that_each_has_alone(
    tmp_path: Path, case: str
) -> None:
    """Eager, captured and replayed steps of many, then of some that another one joins."""
    save_tiny_model(tmp_path / "model", case)
    options = {"store": tmp_path, "device": "cuda", "dtype": "bfloat16", "backend": "triton"}
    with Engine.load(str(tmp_path / "model"), **options) as engine, ExitStack() as stack:
        for i in (0, 1):
            engine.ingest(text=TEXT[: 1800 - 400 * i], name=f"{NAME}{i}", options=OPTIONS)
        assert engine.executor.worker.questions.is_batching
        together, alone = begin_all(engine, stack), begin_all(engine, stack)
        all_but_one = tuple(i for i in range(len(MANY)) if i != 5)
        steps = [all_but_one] * 3 + [(1, 2, 4, 5, 6)] * 3 + [(5,)]
        for step, members in enumerate(steps):
            ids = tuple(together[i].question.question_id for i in members)
            tokens = tuple((11 * i + step) % 200 for i in members)
            outcomes = engine.executor.run(ForwardEach(question_ids=ids, ids=tokens))
            found = [outcome.clone() for outcome in outcomes]
            for i, token, own in zip(members, tokens, found, strict=True):
                step_alone = Forward(question_id=alone[i].question.question_id, ids=(token,))
                assert torch.equal(own, engine.executor.run(step_alone)), (step, MANY[i])
        for i, given in enumerate(MANY):
            assert told(together[i]) == told(alone[i]), given


def test_what_goes_beside_a_forward_changes_no_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager, captured and replayed steps on two streams and on one; told of in between."""
    monkeypatch.setattr(step_tally, "MAX_STEPS", 2)
    save_tiny_model(tmp_path / "model", "llama-yarn-wide-heads")
    options = {"store": tmp_path, "device": "cuda", "dtype": "bfloat16", "backend": "triton"}
    with Engine.load(str(tmp_path / "model"), **options) as engine, ExitStack() as stack:
        for i in (0, 1):
            engine.ingest(text=TEXT[: 1800 - 400 * i], name=f"{NAME}{i}", options=OPTIONS)
        found = []
        for streams in (2, 1):
            if streams == 1:
                monkeypatch.setattr(Beside, "fork", lambda *_: nullcontext())
                monkeypatch.setattr(Beside, "join", lambda _: None)
            sessions = begin_all(engine, stack)
            ids = tuple(session.question.question_id for session in sessions)
            logits = []
            for step in range(7):
                tokens = tuple((11 * i + step) % 200 for i in range(len(ids)))
                outcomes = engine.executor.run(ForwardEach(question_ids=ids, ids=tokens))
                logits.append(torch.stack(outcomes).clone())
            found.append((torch.stack(logits), [told(session) for session in sessions]))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]


def test_concurrent_questions_answer_as_each_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama-yarn-wide-heads")
    options = {"store": tmp_path, "device": "cuda", "dtype": "bfloat16", "backend": "triton"}

    def ask(i: int) -> dict[str, Any]:
        answer = engine.ask(NAME, QUESTION, max_tokens=24 + i, audit=i == 1, **ASKED[i]).to_json()
        return {name: answer[name] for name in ("answer", "usage", "recall", "evidence")}

    with Engine.load(str(tmp_path / "model"), **options) as engine:
        engine.ingest(text=TEXT, name=NAME, options=OPTIONS)
        alone = [ask(i) for i in range(len(ASKED))]
        with ThreadPoolExecutor(len(ASKED)) as pool:
            assert list(pool.map(ask, range(len(ASKED)))) == alone


def test_the_greatest_logit_is_the_first_of_equals() -> None:
    logits = torch.randn(16, 128_256, generator=torch.Generator().manual_seed(2)).round()
    values, ids = find_greatest(logits.cuda())
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert ids.tolist() == expected
    assert torch.equal(values.cpu(), logits.amax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 9, 65])
def test_attention_on_the_gpu_is_the_definition(dtype: torch.dtype, num_tokens: int) -> None:
    q, k, v = (x.to("cuda", dtype) for x in random_qkv(num_tokens, 257))
    ours = torch_backend.attend(q, k, v, scale=SCALE)
    expected = reference.attend(q, k, v, scale=SCALE)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.out, expected.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.lse, expected.lse, atol=tolerance, rtol=0)


@pytest.mark.parametrize("plan", [{"mode": "exact"}, {"mode": "centroid", "keys": 10**6}], ids=str)
def test_plans_read_a_body_in_fp8_as_its_numbers(plan: dict[str, Any]) -> None:
    cfg = shape_config("shape:llama-3.1-8b@1")
    context = synthetic_context(
        cfg,
        num_tokens=20_000,
        segment_tokens=8192,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        kv_dtype="fp8",
    )
    own = AttentionPlan(**plan)
    attention = make_attention(
        context,
        own,
        find_backend("triton"),
        Recorder(context.resident, context.place, recall_period=own.recall_period),
        scale=cfg.attention_scale,
        windows=cfg.windows,
        capacity_tokens=4,
    )
    generator = torch.Generator("cuda").manual_seed(5)
    q, k, v = (
        torch.randn(1, heads, cfg.head_dim, generator=generator, device="cuda").bfloat16()
        for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    )
    with torch.inference_mode():
        found = attention(0, q, k, v).float()
    keys, values = (
        torch.stack(
            [
                torch.cat([context.resident.wide_head(name, 0, g, 20_000), new[0, g : g + 1]])
                for g in range(cfg.num_kv_heads)
            ]
        ).float()
        for name, new in (("k", k), ("v", v))
    )
    expected = reference.attend(q.float(), keys, values, scale=cfg.attention_scale).out
    assert float((found - expected).norm() / expected.norm()) < 2e-2
