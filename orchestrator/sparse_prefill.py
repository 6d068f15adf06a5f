"""How `ingest --prefill sparse` attends to sealed segments: some blocks exactly, all others by
estimate.

Owns what of the sealed segments is read exactly, and the statistics of their blocks. Refuses to
know the open segment, the chunk itself (`prefill.py` attends to both exactly) and how a block is
chosen or read (`sparse_attn`).

A chunk's queries go by tiles. Each tile and KV head reads, of the blocks of `block_slots` slots in
stored order, the first (sinks) and those to which one of its queries is estimated to give the
greatest share of attention, until the budget is spent; every other block is one estimated term of
the same softmax, so no key is left out. Tokens that begin a segment have nothing near them in the
open segment: for them the segment before it is read whole.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kv_store import ResidentDocument
from orchestrator.errors import UsageError
from orchestrator.place import Place
from orchestrator.selection import parse_budget, state_budget
from sparse_attn.api import Backend
from sparse_attn.blocks import BlockUnits, block_units
from sparse_attn.state import Part

_SINK_BLOCKS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseParams:
    """What decides what is read; named in a document's manifest.

    budget: keys of each tile and KV head, or their share of those among which it chooses; at least
    `min_keys`, up to which nothing is chosen. block_slots: 64 or 128; tile_tokens: 16 or 64;
    local_tokens: a token with fewer before it in its own segment reads the whole segment before.
    """

    budget: str = "10%"
    min_keys: int = 1024
    block_slots: int = 128
    tile_tokens: int = 64
    local_tokens: int = 1024

    @classmethod
    def of(cls, budget: str | int | None) -> SparseParams:
        """With a budget as a user states it. Raises UsageError."""
        return cls() if budget is None else cls(budget=state_budget(budget))

    def budget_keys(self, num_keys: int) -> int:
        """Keys that a tile reads of num_keys among which it chooses."""
        asked = parse_budget(self.budget.removesuffix(" keys"), num_keys)
        return max(asked, self.min_keys)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def describe(self) -> str:
        """One line for the manifest: equal if two ingests read the same."""
        facts = " ".join(f"{name}={value}" for name, value in self.to_dict().items())
        return f"sparse {facts}"


def check_place(place: Place) -> None:
    """Raise UsageError where segments are shared out over ranks: a tile chooses among all."""
    if place.context.size > 1:
        raise UsageError(
            f"prefill sparse on mesh {place.mesh} would choose among the segments of one of "
            f"{place.context.size} context ranks; limit 1 context rank; give --mesh with heads "
            "alone, such as 2x1, or --prefill exact"
        )


class SealedBlocks:
    """Attention to the sealed segments of a resident document by blocks. Call `append` after each
    segment that the document has taken in.
    """

    def __init__(
        self,
        resident: ResidentDocument,
        backend: Backend,
        place: Place,
        params: SparseParams,
        *,
        scale: float,
    ) -> None:
        """place: of a rank that holds every segment of its KV heads (`check_place`)."""
        assert place.context.size == 1
        self._resident, self._backend, self._params = resident, backend, params
        self._scale = scale
        # Of each full-attention layer, all sealed segments, and all but the last of them.
        self._units: list[BlockUnits] = []
        self._far_units: list[BlockUnits] = []

    def append(self) -> None:
        """Take in the statistics of the segment that was sealed last."""
        last = self._last_segment()
        self._far_units, self._units = self._units, []
        for layer in range(len(self._resident.k)):
            k, v = self._sealed(layer)
            own = block_units(k[:, last], v[:, last], block=self._params.block_slots)
            far = self._far_units[layer].followed_by(own) if self._far_units else own
            self._units.append(far)

    def attend(self, full_layer: int, q: Tensor, *, num_before: int) -> list[Part]:
        """Disjoint parts of q [T, H, D] over all sealed keys; num_before: tokens of the open
        segment before the first query.
        """
        k, v = self._sealed(full_layer)
        if num_before >= self._params.local_tokens:
            return [self._choose(q, k, v, self._units[full_layer])]
        last = self._last_segment()
        near = self._backend.attend(q, k[:, last], v[:, last], scale=self._scale)
        if not last.start:
            return [near]
        far = slice(0, last.start)
        return [self._choose(q, k[:, far], v[:, far], self._far_units[full_layer]), near]

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, units: BlockUnits) -> Part:
        params, budget_keys = self._params, self._params.budget_keys(k.shape[1])
        if budget_keys >= k.shape[1]:
            return self._backend.attend(q, k, v, scale=self._scale)
        blocks = self._backend.blocks
        selection = blocks.select_blocks(
            q,
            units,
            budget_keys=budget_keys,
            tile_tokens=params.tile_tokens,
            scale=self._scale,
            num_always=_SINK_BLOCKS,
        )
        return blocks.attend_blocks(q, k, v, selection, scale=self._scale, tail=units)

    def _sealed(self, full_layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, S, D] of the sealed segments, which lie in order in each head."""
        resident, heads = self._resident, self._resident.num_kv_heads
        k, v = (
            x.view(heads, -1, x.shape[1]) for x in (resident.k[full_layer], resident.v[full_layer])
        )
        sealed = slice(0, resident.num_sealed)
        return k[:, sealed], v[:, sealed]

    def _last_segment(self) -> slice:
        """Slots of the segment that was sealed last, in each head."""
        stop, length = self._resident.num_sealed, self._resident.layout.segment_tokens
        return slice((stop - 1) // length * length, stop)
