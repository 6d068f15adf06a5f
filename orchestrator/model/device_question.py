"""One question on a GPU: what its forwards share, whoever else takes part in them.

Owns the question's plans and steady keys, how many tokens it has had, which of its queries are
sampled, the seed of its samples, and what is told to its recorder. Knows no decoder and no batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from orchestrator.model.context import DocumentContext
from orchestrator.model.device_plans import Plans, Tail
from orchestrator.model.recorder import Recorder
from orchestrator.recall import QuerySample
from orchestrator.steps import AttentionPlan
from sparse_attn.estimate import bound_of, recall_of
from sparse_attn.kernels.backend import TritonBackend
from sparse_attn.kernels.decode import Attended
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.centroid import lookup_bytes


class DeviceQuestion:
    """seed: [1] int64 on the device; num_past: tokens of question and answer forwarded so far."""

    def __init__(
        self,
        context: DocumentContext,
        plan: AttentionPlan,
        backend: TritonBackend,
        recorder: Recorder,
        *,
        scale: float,
        windows: tuple[int | None, ...],
        capacity_tokens: int,
    ) -> None:
        self.plan, self.recorder, self.windows = plan, recorder, windows
        self._context = context
        self.num_layers = len(context.resident.k)
        self.plans = Plans(
            context,
            plan,
            backend,
            scale=scale,
            windows=windows,
            capacity_tokens=capacity_tokens,
            evidence=[recorder.mass(place) for place in range(self.num_layers)],
        )
        self.tails = (self.plans.full, self.plans.sliding_tail)
        self._queries = QuerySample(period=plan.recall_period, seed=plan.seed)
        self.seed = torch.tensor([plan.seed], device=context.resident.device)
        self.num_past = 0

    @property
    def is_exact(self) -> bool:
        """Whether everything is read, so that nothing is sampled."""
        return self.plan.mode == "exact"

    def tail_of(self, layer_idx: int) -> Tail:
        """The steady keys of a layer's kind."""
        return self.tails[0 if self.windows[layer_idx] is None else 1]

    def sampled_queries(self, place: int, num_tokens: int) -> list[int]:
        """Which of the next num_tokens queries are sampled in a layer."""
        return [] if self.is_exact else self._queries.chosen(place, self.num_past, num_tokens)

    def sampled_layers(self, query: int) -> list[int]:
        """The layers in which a query is sampled."""
        return [] if self.is_exact else self._queries.layers_of(query, self.num_layers)

    def run_one(self, place: int, q: Tensor, t: int) -> Attended:
        """The plan of one query, for query t of a forward that comes next: q [T, H, D]."""
        plan, visible = self.plans.of(1)
        self.plans.full.show(visible, t)
        return plan.run(place, q[t : t + 1].unsqueeze(0))

    def sample(self, place: int, q: Tensor, attended: Attended, query: int) -> None:
        """Tell the recall of a query [1, H, D] that `run_one` was called with last."""
        missed = self._missed(place, q, num_strata=self.plan.num_strata)
        lse_read = attended.lse_read[0]
        recall, bound = recall_of(missed[0], missed[1]), bound_of(missed[2], lse_read)
        self.recorder.add_recall(place, [query], recall, bound)

    def audit(self, place: int, q: Tensor, t: int) -> None:
        """The true recall of query t, by a dense plan beside the one that was used."""
        dense, visible = self.plans.auditor()
        self.plans.full.show(visible, t)
        total = dense.run(place, q[t : t + 1].unsqueeze(0)).lse[0].clone()
        lse_read = self.run_one(place, q, t).lse_read[0]
        _, _, log_most = self._missed(place, q[t : t + 1].contiguous(), num_strata=1)
        recall = torch.exp(lse_read - total).clamp_(max=1.0)
        self.recorder.add_audit(place, recall, bound_of(log_most, lse_read))

    def _missed(self, place: int, q: Tensor, *, num_strata: int) -> tuple[Tensor, Tensor, Tensor]:
        plan, _ = self.plans.of(1)
        assert isinstance(plan, CentroidDecode)
        return plan.sample(place, q, seeds=self.seed, num_strata=num_strata)

    def tell_exact(self, num_tokens: int, *, num_layers: int) -> None:
        """The next num_tokens queries read everything."""
        num_body = self._context.num_tokens - self._context.num_steady
        num_keys = self._num_steady(self.num_past + num_tokens) + num_body
        self.recorder.add_exact(num_tokens, num_keys, num_layers=num_layers)

    def tell(
        self,
        counts: Tensor,
        packed_bytes: Tensor,
        num_sampled: int,
        layers: Sequence[int],
        *,
        first_query: int,
    ) -> None:
        """What T queries from first_query on read: counts [layers, T], slots over all KV heads;
        packed_bytes [], of the tables of opened clusters; num_sampled: pairs of a query and a layer
        whose recall was sampled.
        """
        num_tokens = counts.shape[1]
        self.recorder.add_selected(
            counts,
            num_steady=self._num_steady(first_query + num_tokens),
            lookup_bytes=num_tokens * sum(self._table_bytes[place] for place in layers),
            packed_bytes=packed_bytes,
            num_sampled=2 * self.plan.num_strata * num_sampled * self._context.place.num_heads,
            has_first_layer=0 in layers,
        )

    def _num_steady(self, num_queries: int) -> int:
        """Steady keys that the last of the question's first num_queries queries sees."""
        return self.plans.full.num_kept + num_queries

    @cached_property
    def _table_bytes(self) -> list[int]:
        """Of each layer, bytes of the tables that every query looks through."""
        indexes = [self._context.index(place) for place in range(self.num_layers)]
        is_deep = self.plans.kind.levels == 2
        return [lookup_bytes(index.groups if is_deep else index.clusters) for index in indexes]
