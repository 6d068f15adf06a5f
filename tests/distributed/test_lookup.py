"""The global choice is one rank's choice, whoever holds what; the proportional one is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from orchestrator.types import AskOptions
from tests.mesh import LONG_TEXT, SEGMENT_TOKENS, Choice, Choices, run_mesh, save_long_model

QUESTION = "How many jars are on shelf 9?"
MODES: dict[str, dict[str, Any]] = {
    "keys": {"budget": "12.5%"},
    "mass": {"mass": 0.9},
    "two levels": {"budget": "12.5%", "levels": 2},
}


class Case:
    def __init__(self, root: Path) -> None:
        self.model, self.store = save_long_model(root / "model"), root / "store"

        def ingest(engine: Engine) -> None:
            options = IngestOptions(segment_tokens=SEGMENT_TOKENS)
            engine.ingest(text=LONG_TEXT, name="shelves", options=options)

        run_mesh("1x1", self.model, self.store, ingest)

    def choices(
        self, mesh: str, mode: str, replayed: list[Choice] | None = None, **options: Any
    ) -> tuple[Tensor, dict[int, list[Choice]]]:
        """Logits of the question and every look-up of every rank."""
        choices = Choices(replayed)
        asked = AskOptions(mode="centroid", **MODES[mode], **options)
        with choices.watch():
            logits = run_mesh(mesh, self.model, self.store, first_logits(asked))
        return logits, choices.of_rank


def first_logits(options: AskOptions) -> Callable[[Engine], Tensor]:
    def work(engine: Engine) -> Tensor:
        with engine.begin("shelves", QUESTION, options, num_answer_tokens=1) as session:
            return session.forward(session.question_ids)

    return work


def together(of_rank: dict[int, list[Choice]], i: int, head: int, token: int) -> set[int]:
    """What all ranks took for one query in the i-th look-up."""
    taken: set[int] = set()
    for choices in of_rank.values():
        own = choices[i].taken_ids(head, token)
        assert not taken & own
        taken |= own
    return taken


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("lookup"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", ["1x2", "1x3", "1x4"])
def test_all_ranks_together_take_what_one_rank_takes(case: Case, mesh: str, mode: str) -> None:
    _, one = case.choices("1x1", mode)
    _, many = case.choices(mesh, mode)
    num_differing = 0
    for i, choice in enumerate(one[0]):
        for head in range(choice.ids.shape[0]):
            for token in range(choice.taken.shape[1]):
                ours, theirs = together(many, i, head, token), choice.taken_ids(head, token)
                num_differing += ours != theirs
                for unit in ours ^ theirs:
                    assert is_at_the_cut(choice, head, token, unit)
    if mesh != "1x3":
        assert num_differing == 0


def is_at_the_cut(choice: Choice, head: int, token: int, unit: int) -> bool:
    """Whether a unit's benefit is within 1e-5 of that of the last unit taken."""
    benefit, taken = choice.benefit[head, token], choice.taken[head, token]
    own = benefit[choice.ids[head] == unit]
    return bool((own - benefit[taken].min()).abs() <= 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", ["1x3", "2x1", "2x2"])
def test_with_one_ranks_choice_replayed_the_logits_agree(case: Case, mesh: str, mode: str) -> None:
    wanted, one = case.choices("1x1", mode)
    logits, many = case.choices(mesh, mode, replayed=one[0])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert all(len(choices) == len(one[0]) for choices in many.values())


def test_a_replayed_choice_is_really_made(case: Case) -> None:
    wanted, one = case.choices("1x1", "keys")
    nothing = [replace(choice, taken=torch.zeros_like(choice.taken)) for choice in one[0]]
    logits, many = case.choices("1x3", "keys", replayed=nothing)
    assert not any(choice.taken.any() for choices in many.values() for choice in choices)
    assert not torch.allclose(logits, wanted, atol=1e-3)


@pytest.mark.parametrize("mesh", ["1x2", "1x4"])
def test_a_proportional_choice_keeps_to_each_ranks_share(case: Case, mesh: str) -> None:
    _, one = case.choices("1x1", "keys")
    _, many = case.choices(mesh, "keys", choice="proportional")
    num_ranks = len(many)
    budget = max(read_keys(choice) for choice in one[0])
    own = [read_keys(choice) for choices in many.values() for choice in choices]
    # A rank's share follows the keys that it holds: 9 segments do not divide evenly.
    assert max(own) <= 1.4 * budget / num_ranks
    assert min(own) > 0
    differing = sum(
        together(many, i, 0, 0) != choice.taken_ids(0, 0) for i, choice in enumerate(one[0])
    )
    assert differing > 0


def read_keys(choice: Choice) -> int:
    """Most keys that a query of the look-up took, over KV heads."""
    return int((choice.taken * choice.sizes.unsqueeze(1)).sum(dim=2).max())
