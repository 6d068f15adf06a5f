"""Questions of a rank whose tokens are one forward: logits as each alone, batches kept and dropped.

By kernels in the interpreter; products of several rows are torch's there, so not to the bit, which
`tests/test_gpu.py` asks of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orchestrator import questions
from orchestrator.evaluation.synthetic import synthetic_context
from orchestrator.model.context import DocumentContext
from orchestrator.model.decode_batch import DecodeBatch
from orchestrator.model.decoder import Decoder
from orchestrator.model.load import LoadedModel, load_model
from orchestrator.place import alone
from orchestrator.questions import Questions
from orchestrator.steps import AttentionPlan, BeginQuestion, EndQuestion, Forward, ForwardEach
from sparse_attn.kernels.backend import TritonBackend
from tests.sparse_attn.decoding import fewer_programs
from tests.tiny_model import save_tiny_model

PLANS = (
    AttentionPlan(mode="centroid", keys=24, recall_period=1, num_strata=2),
    AttentionPlan(mode="exact"),
)
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
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("model")
    return load_model(str(save_tiny_model(directory, "llama-yarn-wide-heads")))


@pytest.fixture(scope="module")
def context(model: LoadedModel) -> DocumentContext:
    return synthetic_context(
        model.cfg,
        num_tokens=130,
        segment_tokens=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def begin(model: LoadedModel, context: DocumentContext) -> Questions:
    """Questions 0 and 1, of `PLANS`."""
    place = alone(num_heads=model.cfg.num_heads, num_kv_heads=model.cfg.num_kv_heads)
    asked = Questions(model, TritonBackend(), place)
    for i, plan in enumerate(PLANS):
        action = BeginQuestion(question_id=i, document="d", attention=plan, capacity_tokens=3)
        asked.begin(action, context)
    return asked


def forward_each(asked: Questions, members: tuple[int, ...], token: int) -> list[Tensor]:
    action = ForwardEach(question_ids=members, ids=tuple(token + i for i in members))
    outcomes = asked.forward_each(action)
    found = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
    assert len(found) == len(members)
    return found


def test_one_forward_gives_each_question_its_logits(
    model: LoadedModel, context: DocumentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one, together = begin(model, context), begin(model, context)
    assert not together.is_batching
    steps = ((0, 1), (1,))
    wanted = [forward_each(one_by_one, members, 3 * i) for i, members in enumerate(steps)]
    assert one_by_one._batches == {}
    monkeypatch.setattr(Decoder, "is_fused", True)
    found = [forward_each(together, members, 3 * i) for i, members in enumerate(steps)]
    for ours, theirs in zip(found, wanted, strict=True):
        for own, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-2)
    assert list(together._batches) == [(0, 1), (1,)]
    assert [together._questions[i].position - context.num_tokens for i in (0, 1)] == [1, 2]
    recorders = [
        own.end(EndQuestion(question_id=0, reports=True)) for own in (together, one_by_one)
    ]
    assert list(together._batches) == [(1,)]
    told = [(x.attended_keys(), x.recall().mass_mean) for x in recorders if x is not None]
    assert told[0][0] == told[1][0]
    assert told[0][1] == pytest.approx(told[1][1], abs=1e-3)


def test_the_batch_used_longest_ago_goes_first(
    model: LoadedModel, context: DocumentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "MAX_BATCHES", 2)
    asked = begin(model, context)
    made = [asked._batch_of(members) for members in ((0,), (1,), (0,), (0, 1))]
    assert made[0] is made[2]
    assert list(asked._batches) == [(0,), (0, 1)]
    asked.clear()
    assert asked._batches == {}


def test_questions_whose_plans_do_not_fit_together_go_one_by_one(
    model: LoadedModel, context: DocumentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = begin(model, context)
    monkeypatch.setattr(Decoder, "is_fused", True)
    init = DecodeBatch.__init__

    def limited(self: DecodeBatch, decoder: Decoder, attentions: list[object]) -> None:
        if len(attentions) > 1:
            raise torch.OutOfMemoryError
        init(self, decoder, attentions)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeBatch, "__init__", limited)
    own = Forward(question_id=1, ids=(4,))
    wanted = begin(model, context).forward(own)
    torch.testing.assert_close(forward_each(asked, (0, 1), 3)[1], wanted, atol=1e-4, rtol=1e-4)
    assert list(asked._batches) == [(0,), (1,)]


def test_a_question_without_a_report_is_settled(
    model: LoadedModel, context: DocumentContext
) -> None:
    asked, told = begin(model, context), []
    asked.recorder_of(0).owe(lambda: told.append("settled"))
    assert asked.end(EndQuestion(question_id=0, reports=False)) is None
    assert told == ["settled"]
