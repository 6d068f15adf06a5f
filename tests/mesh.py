"""Engines over several ranks that are threads of this process, for tests of what ranks share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from collectives import Group, parse_mesh, run_threads
from orchestrator.cluster.executor import GroupExecutor, InProcessExecutor
from orchestrator.cluster.rank import follow, identity_of, load_worker
from orchestrator.config import EngineConfig, resolve
from orchestrator.engine import Engine
from orchestrator.model.lookup import Lookup
from orchestrator.steps import Chain
from orchestrator.worker import Worker
from sparse_attn.select.centroid import Units
from sparse_attn.step import Scores
from tests.tiny_model import save_tiny_model

T = TypeVar("T")

# Nine segments of 256 tokens, the last short: every context rank of up to four holds two or more.
SEGMENT_TOKENS = 256
LONG_TEXT = "".join(f"Shelf {i} carries {i * 7919 % 1000} jars. " for i in range(70))[:2180]


def save_long_model(directory: Path, case: str = "llama") -> Path:
    """The tiny model with a context that holds LONG_TEXT and a question."""
    path = save_tiny_model(directory, case)
    config = path / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "max_position_embeddings": 4096}))
    return path


def run_mesh(
    mesh: str,
    model: Path,
    store: Path,
    work: Callable[[Engine], T],
    *,
    look: Callable[[Worker], object] = lambda _: None,
    **options: Any,
) -> T:
    """What `work` returns with an engine whose ranks are threads; `look` sees each rank's worker
    after every step.
    """
    config = replace(resolve(model=str(model), store=store, threads=1, **options), mesh=mesh)
    num_ranks = parse_mesh(mesh).num_ranks
    if num_ranks == 1:
        with Engine(config, InProcessExecutor(config)) as engine:
            return work(engine)
    return run_threads(num_ranks, lambda group: _run_rank(config, group, work, look))[0]


def _run_rank(
    config: EngineConfig,
    group: Group,
    work: Callable[[Engine], T],
    look: Callable[[Worker], object],
) -> Any:
    if group.rank == 0:
        executor = GroupExecutor(config, group)
        executor.start(ExitStack())
        with Engine(config, executor) as engine:
            result = work(engine)
            look(executor.worker)
            return result
    worker = load_worker(config, group).worker
    chain = Chain(identity_of(config, worker.model))
    while follow(worker, group, chain):
        look(worker)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One look-up on one rank: the ids of the units [G, U], how good each was for each query
    [G, T, U], and which were taken. KV heads count from `first_kv_head` of the model.
    """

    first_kv_head: int
    ids: Tensor
    sizes: Tensor
    benefit: Tensor
    taken: Tensor

    def taken_ids(self, head: int, token: int) -> set[int]:
        """Ids that one query took."""
        return set(self.ids[head][self.taken[head, token]].tolist())


class Choices:
    """Look-ups seen, or replayed, in the order in which each rank makes them.

    replayed: a single rank's choices, which every rank then makes instead of its own.
    """

    def __init__(self, replayed: list[Choice] | None = None) -> None:
        self.of_rank: dict[int, list[Choice]] = {}
        self._replayed = replayed
        self._choose = Lookup._choose

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Stand between every look-up and its result."""

        def choose(
            lookup: Lookup, units: Units, *args: Any, layer: int | None = None
        ) -> tuple[Scores, Tensor]:
            return self._see(lookup, units, args, layer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lookup, "_choose", choose)
            yield

    def _see(
        self, lookup: Lookup, units: Units, args: Any, layer: int | None
    ) -> tuple[Scores, Tensor]:
        scores, taken = self._choose(lookup, units, *args, layer=layer)
        place = lookup._context.place
        seen = self.of_rank.setdefault(place.flat.rank, [])
        if self._replayed is not None:
            theirs = self._replayed[len(seen)]
            for head, kv_head in enumerate(place.kv_heads):
                for token in range(taken.shape[1]):
                    chosen = torch.tensor(sorted(theirs.taken_ids(kv_head, token)))
                    is_unit = units.sizes[head] > 0
                    taken[head, token] = torch.isin(units.ids[head], chosen) & is_unit
        total = lookup._merge([args[2], lookup._sum_over(scores.lse)])
        ranks = lookup._backend.rank_units(scores, units, total=total)
        seen.append(
            Choice(
                first_kv_head=place.kv_heads.start,
                ids=units.ids.clone(),
                sizes=units.sizes.clone(),
                benefit=ranks.benefit.clone(),
                taken=taken.clone(),
            )
        )
        return scores, taken
