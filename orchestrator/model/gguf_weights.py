"""Weights and configuration from a GGUF file, dequantised tensor by tensor into their place.

Owns the tensor names of GGUF and the row order of its llama files. Refuses to know quantisation
formats: the `gguf` package undoes them (`gguf_file.py`).
"""

from __future__ import annotations

import torch

from orchestrator.model.config import ModelConfig
from orchestrator.model.gguf_config import config_from_gguf
from orchestrator.model.gguf_file import GgufFile
from orchestrator.model.layers import ModelWeights
from orchestrator.model.shard import ModelShard
from orchestrator.model.weights import Names, Slot, WeightSink

_ROPE_DIVISORS = "rope_freqs.weight"
_NAMES: Names = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "attn_norm": "blk.{}.attn_norm",
    "post_attn_norm": "blk.{}.post_attention_norm",
    "mlp_norm": "blk.{}.ffn_norm",
    "post_mlp_norm": "blk.{}.post_ffw_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "o": "blk.{}.attn_output",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """Return the configuration of the model in `file`; raises a ModelError."""
    divisors = None
    if _ROPE_DIVISORS in file.tensors:
        divisors = tuple(float(x) for _, rows in file.read(_ROPE_DIVISORS) for x in rows)
    shapes = {name: file.shape(name) for name in file.tensors}
    return config_from_gguf(file.metadata, shapes, name=file.name, rope_divisors=divisors)


def load_gguf_weights(
    file: GgufFile,
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: ModelShard | None = None,
) -> ModelWeights:
    """Return the weights of `file`, or a shard of them, dequantised to `dtype` on `device`.

    Norms need no "+ 1": GGUF stores Gemma's with it.
    """
    sink = WeightSink(cfg, _NAMES, dtype=dtype, device=device, source=file.name, shard=shard)
    interleaved = file.metadata.get("general.architecture") == "llama"
    for name in file.tensors:
        if name == _ROPE_DIVISORS:
            continue
        slot = sink.take(name, file.shape(name))
        if interleaved and slot.part in ("q", "k"):
            _copy_interleaved(file, name, slot, cfg.head_dim)
            continue
        for start, rows in file.read(name, slot.rows):
            if slot.target.dim() == len(slot.shape):
                slot.target[start : start + len(rows)].copy_(rows)
            else:
                slot.target.copy_(rows)
    return sink.finish()


def _copy_interleaved(file: GgufFile, name: str, slot: Slot, head_dim: int) -> None:
    """Undo the row order of llama files, where dimension pairs are neighbours (2i, 2i + 1).

    The decoder pairs dimension i with i + D/2, as the original checkpoints do.
    """
    target = slot.target
    order = torch.arange(target.shape[0]).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)
    for start, rows in file.read(name, slot.rows):
        target[order[start : start + len(rows)].to(target.device)] = rows.to(target)
