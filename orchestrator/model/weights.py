"""Where weights go: fused tensors allocated once, and views of them that a file's tensors fill.

Owns allocation, the meaning of each part and the checks that every part arrives once and in its
shape; a shard takes some rows of each matrix and has room for no others. Loading copies each tensor
of a file straight into its place, so that memory never holds the model twice. Refuses to know file
formats: `hf_weights.py`, `gguf_weights.py` and `shapes.py` bring
a table of names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import ModelDamaged
from orchestrator.model.config import ModelConfig
from orchestrator.model.layers import LayerWeights, ModelWeights
from orchestrator.model.shard import ModelShard, whole_model

Names = Mapping[str, str]
"""Part name to the file's tensor name without `.weight` or `.bias`; `{}` stands for the layer."""

_NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for one tensor of a file: a view to copy into, and the shape the file must bring.

    rows: those of the file's tensor that are held; the others are not needed here. `target` has
    more rows than that where one norm serves many heads; copying broadcasts.
    """

    part: str
    target: Tensor
    shape: tuple[int, ...]
    rows: slice

    @property
    def is_whole(self) -> bool:
        """Whether every row is held."""
        return self.rows == slice(0, self.shape[0])


class WeightSink:
    """Allocates a model's weights, or a shard of them, and hands out each place once.

    `source` is how errors call the model.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        names: Names,
        *,
        dtype: torch.dtype,
        device: torch.device,
        source: str,
        shard: ModelShard | None = None,
    ) -> None:
        held = shard or whole_model(cfg)
        self._weights = allocate(cfg, held, dtype=dtype, device=device)
        self._waiting = dict(_slots(cfg, held, self._weights, names))
        self._source = source

    @property
    def waiting(self) -> Mapping[str, Slot]:
        """Tensor names that have not arrived, with their places."""
        return self._waiting

    def take(self, name: str, shape: tuple[int, ...]) -> Slot:
        """Return the place of tensor `name`, which the caller fills; each name is given once."""
        slot = self._waiting.pop(name, None)
        if slot is None:
            raise ModelDamaged(
                f"tensor {name} of {self._source} is unexpected; its configuration has no place "
                "for it, or it came twice; fetch the model again"
            )
        if slot.shape != shape:
            raise ModelDamaged(
                f"tensor {name} of {self._source} has shape {list(shape)}; its configuration says "
                f"{list(slot.shape)}; fetch the model again"
            )
        return slot

    def finish(self) -> ModelWeights:
        """Return the weights; raise ModelDamaged where a tensor has not arrived."""
        if self._waiting:
            first = min(self._waiting)
            raise ModelDamaged(
                f"tensor {first} of {self._source} is missing, {len(self._waiting)} in all; "
                "every tensor of the configuration is needed; fetch the model again"
            )
        return self._weights


def allocate(
    cfg: ModelConfig, shard: ModelShard, *, dtype: torch.dtype, device: torch.device
) -> ModelWeights:
    """Return uninitialised weights of a shard: norms in float32, all else in `dtype`."""
    E, D, F = cfg.model_dim, cfg.head_dim, shard.mlp.width
    H, G, own_e = len(shard.heads), len(shard.kv_heads), shard.model.width

    def new(*shape: int, wanted: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=device)

    def norm(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def layer() -> LayerWeights:
        return LayerWeights(
            attn_norm=norm(E),
            qkv=matrix((H + 2 * G) * D, E),
            qkv_bias=new((H + 2 * G) * D, wanted=cfg.qkv_bias),
            qk_norm=norm(H + G, D) if cfg.qk_norm else None,
            o=matrix(own_e, cfg.num_heads * D),
            o_bias=new(own_e, wanted=cfg.o_bias),
            post_attn_norm=norm(E) if cfg.gemma_norms else None,
            mlp_norm=norm(E),
            gate_up=matrix(2 * F, E),
            gate_up_bias=new(2 * F, wanted=cfg.mlp_bias),
            down=matrix(own_e, cfg.mlp_dim),
            down_bias=new(own_e, wanted=cfg.mlp_bias),
            post_mlp_norm=norm(E) if cfg.gemma_norms else None,
        )

    embedding = matrix(shard.vocab.width, E)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layer() for _ in range(cfg.num_layers)),
        final_norm=norm(E),
        lm_head=embedding if cfg.tie_embeddings else matrix(shard.vocab.width, E),
    )


def _slots(
    cfg: ModelConfig, shard: ModelShard, weights: ModelWeights, names: Names
) -> Iterator[tuple[str, Slot]]:
    """Yield every tensor name that a file must hold, with its place."""
    rows_of = _rows_of_parts(cfg, shard)

    def slot(name: str, part: str, target: Tensor) -> tuple[str, Slot]:
        num_rows, rows = rows_of[part]
        shape = (num_rows, *target.shape[1:])
        return name, Slot(part=part, target=target, shape=shape, rows=rows)

    def norm(name: str, part: str, target: Tensor) -> tuple[str, Slot]:
        shape = (target.shape[-1],)
        return name, Slot(part=part, target=target, shape=shape, rows=slice(0, shape[0]))

    yield slot(names["embedding"] + ".weight", "embedding", weights.embedding)
    yield norm(names["final_norm"] + ".weight", "final_norm", weights.final_norm)
    if not cfg.tie_embeddings:
        yield slot(names["lm_head"] + ".weight", "lm_head", weights.lm_head)
    for layer_idx, layer in enumerate(weights.layers):
        for part, target in _matrices(cfg, shard, layer):
            yield slot(names[part].format(layer_idx) + ".weight", part, target)
        for part, target in _biases(cfg, shard, layer):
            yield slot(names[part].format(layer_idx) + ".bias", part, target)
        for part, target in _layer_norms(shard, layer):
            yield norm(names[part].format(layer_idx) + ".weight", part, target)


def _rows_of_parts(cfg: ModelConfig, shard: ModelShard) -> dict[str, tuple[int, slice]]:
    """Of each part with rows: how many the file has, and which of them are held."""
    D = cfg.head_dim
    heads, kv_heads = (slice(run.start * D, run.stop * D) for run in (shard.heads, shard.kv_heads))
    q, kv = (cfg.num_heads * D, heads), (cfg.num_kv_heads * D, kv_heads)
    model, mlp, vocab = ((c.total, c.own) for c in (shard.model, shard.mlp, shard.vocab))
    return {
        "q": q,
        "k": kv,
        "v": kv,
        "o": model,
        "gate": mlp,
        "up": mlp,
        "down": model,
        "embedding": vocab,
        "lm_head": vocab,
    }


def _matrices(
    cfg: ModelConfig, shard: ModelShard, layer: LayerWeights
) -> Iterator[tuple[str, Tensor]]:
    yield from zip("qkv", torch.split(layer.qkv, _qkv_rows(cfg, shard)), strict=True)
    yield from zip(("gate", "up"), layer.gate_up.chunk(2), strict=True)
    yield "o", layer.o
    yield "down", layer.down


def _biases(
    cfg: ModelConfig, shard: ModelShard, layer: LayerWeights
) -> Iterator[tuple[str, Tensor]]:
    if layer.qkv_bias is not None:
        yield from zip("qkv", torch.split(layer.qkv_bias, _qkv_rows(cfg, shard)), strict=True)
    if layer.gate_up_bias is not None:
        yield from zip(("gate", "up"), layer.gate_up_bias.chunk(2), strict=True)
    if layer.o_bias is not None:
        yield "o", layer.o_bias
    if layer.down_bias is not None:
        yield "down", layer.down_bias


def _layer_norms(shard: ModelShard, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    for part in _NORMS:
        target = getattr(layer, part)
        if target is not None:
            yield part, target
    if layer.qk_norm is not None:
        yield "q_norm", layer.qk_norm[: len(shard.heads)]
        yield "k_norm", layer.qk_norm[len(shard.heads) :]


def _qkv_rows(cfg: ModelConfig, shard: ModelShard) -> list[int]:
    D = cfg.head_dim
    return [len(shard.heads) * D, len(shard.kv_heads) * D, len(shard.kv_heads) * D]
