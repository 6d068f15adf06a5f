"""Where weights go: fused tensors allocated once, and views of them that a file's tensors fill.

Owns allocation, the meaning of each part and the checks that every part arrives once and in its
shape. Loading copies each tensor of a file straight into its place, so that memory never holds the
model twice. Refuses to know file formats: `hf_weights.py`, `gguf_weights.py` and `shapes.py` bring
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

Names = Mapping[str, str]
"""Part name to the file's tensor name without `.weight` or `.bias`; `{}` stands for the layer."""

_NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for one tensor of a file: a view to copy into, and the shape the file must bring.

    `target` has more rows than `shape` where one norm serves many heads; copying broadcasts.
    """

    part: str
    target: Tensor
    shape: tuple[int, ...]


class WeightSink:
    """Allocates a model's weights and hands out each place once.

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
    ) -> None:
        self._weights = allocate(cfg, dtype=dtype, device=device)
        self._waiting = dict(_slots(cfg, self._weights, names))
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


def allocate(cfg: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Return uninitialised weights: norms in float32, all else in `dtype`."""
    E, D, F = cfg.model_dim, cfg.head_dim, cfg.mlp_dim
    H, G = cfg.num_heads, cfg.num_kv_heads

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
            o=matrix(E, H * D),
            o_bias=new(E, wanted=cfg.o_bias),
            post_attn_norm=norm(E) if cfg.gemma_norms else None,
            mlp_norm=norm(E),
            gate_up=matrix(2 * F, E),
            gate_up_bias=new(2 * F, wanted=cfg.mlp_bias),
            down=matrix(E, F),
            down_bias=new(E, wanted=cfg.mlp_bias),
            post_mlp_norm=norm(E) if cfg.gemma_norms else None,
        )

    embedding = matrix(cfg.vocab_size, E)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layer() for _ in range(cfg.num_layers)),
        final_norm=norm(E),
        lm_head=embedding if cfg.tie_embeddings else matrix(cfg.vocab_size, E),
    )


def _slots(cfg: ModelConfig, weights: ModelWeights, names: Names) -> Iterator[tuple[str, Slot]]:
    """Yield every tensor name that a file must hold, with its place."""

    def slot(name: str, part: str, target: Tensor) -> tuple[str, Slot]:
        return name, Slot(part=part, target=target, shape=tuple(target.shape))

    yield slot(names["embedding"] + ".weight", "embedding", weights.embedding)
    yield slot(names["final_norm"] + ".weight", "final_norm", weights.final_norm)
    if not cfg.tie_embeddings:
        yield slot(names["lm_head"] + ".weight", "lm_head", weights.lm_head)
    for layer_idx, layer in enumerate(weights.layers):
        for part, target in _matrices(cfg, layer):
            yield slot(names[part].format(layer_idx) + ".weight", part, target)
        for part, target in _biases(cfg, layer):
            yield slot(names[part].format(layer_idx) + ".bias", part, target)
        for part, target in _layer_norms(cfg, layer):
            name = names[part].format(layer_idx) + ".weight"
            yield name, Slot(part=part, target=target, shape=(target.shape[-1],))


def _matrices(cfg: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    yield from zip("qkv", torch.split(layer.qkv, _qkv_rows(cfg)), strict=True)
    yield from zip(("gate", "up"), layer.gate_up.chunk(2), strict=True)
    yield "o", layer.o
    yield "down", layer.down


def _biases(cfg: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    if layer.qkv_bias is not None:
        yield from zip("qkv", torch.split(layer.qkv_bias, _qkv_rows(cfg)), strict=True)
    if layer.gate_up_bias is not None:
        yield from zip(("gate", "up"), layer.gate_up_bias.chunk(2), strict=True)
    if layer.o_bias is not None:
        yield "o", layer.o_bias
    if layer.down_bias is not None:
        yield "down", layer.down_bias


def _layer_norms(cfg: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    for part in _NORMS:
        target = getattr(layer, part)
        if target is not None:
            yield part, target
    if layer.qk_norm is not None:
        yield "q_norm", layer.qk_norm[: cfg.num_heads]
        yield "k_norm", layer.qk_norm[cfg.num_heads :]


def _qkv_rows(cfg: ModelConfig) -> list[int]:
    D = cfg.head_dim
    return [cfg.num_heads * D, cfg.num_kv_heads * D, cfg.num_kv_heads * D]
