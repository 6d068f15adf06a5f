"""Writes tiny GGUF files as llama.cpp's converter lays them out."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.model.config import ModelConfig

_GGUF_ARCH = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
_RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_RENAMED_GEMMA = {
    **_RENAMED,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Cases of `tiny.py` that GGUF has keys for: no windows outside Gemma, no free scale, no extra YaRN.
GGUF_CASES = (
    "llama",
    "llama-linear-biases-tied",
    "llama-llama3-one-kv-head",
    "llama-yarn-wide-heads",
    "mistral-full",
    "qwen2",
    "qwen3-five-a-group",
    "qwen3-biases-tied",
    "gemma3",
)
SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    cfg: ModelConfig,
    *,
    quantise: gguf.GGMLQuantizationType | None = None,
) -> None:
    """Write `model` (float32, but for matrices where `quantise` is given) to `path`."""
    arch = _GGUF_ARCH[cfg.architecture]
    writer = gguf.GGUFWriter(path, arch)
    _write_keys(writer, cfg, arch)
    write_vocabulary(writer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not cfg.tie_embeddings:
            _write_tensor(writer, name, tensor, cfg, arch, quantise)
    if cfg.rope.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_divisors(cfg))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: gguf.GGUFWriter, *, pre: str = "smollm") -> None:
    """Specials, bytes and a few merges; the template opens turns with <|im_start|>."""
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE of 3 + 256 + 8 tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "1 2", "Ġ 1", "Ċ Ċ"]
    return [*SPECIALS, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)], merges


def _write_keys(writer: gguf.GGUFWriter, cfg: ModelConfig, arch: str) -> None:
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_context_tokens)
    writer.add_embedding_length(cfg.model_dim)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope.base)
    if cfg.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(cfg.rope.kind))
        writer.add_rope_scaling_factor(cfg.rope.factor)
    if cfg.rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(cfg.rope.original_context_tokens)
    if arch == "gemma3":
        if cfg.logit_softcap is not None:
            writer.add_final_logit_softcapping(cfg.logit_softcap)
        window = max(window or 0 for window in cfg.windows)
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([window is not None for window in cfg.windows])


def _write_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    tensor: Tensor,
    cfg: ModelConfig,
    arch: str,
    quantise: gguf.GGMLQuantizationType | None,
) -> None:
    base, _, suffix = name.rpartition(".")
    names = _RENAMED_GEMMA if arch == "gemma3" else _RENAMED
    if base.startswith("model.layers."):
        layer, _, part = base.removeprefix("model.layers.").partition(".")
        new_name = f"blk.{layer}.{names[part]}.{suffix}"
    else:
        new_name = f"{names[base]}.{suffix}"
    if arch == "llama" and ("q_proj" in base or "k_proj" in base):
        tensor = _interleave(tensor, cfg.head_dim)
    if arch == "gemma3" and base.endswith("norm"):
        tensor = tensor + 1
    data = tensor.detach().float().numpy()
    if quantise is not None and data.ndim == 2:
        writer.add_tensor(new_name, gguf.quants.quantize(data, quantise), raw_dtype=quantise)
    else:
        writer.add_tensor(new_name, data)


def _interleave(tensor: Tensor, head_dim: int) -> Tensor:
    """Row h D + p D/2 + i moves to h D + 2 i + p."""
    halves = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rope_divisors(cfg: ModelConfig) -> np.ndarray:
    """llama3 scaling as the converter stores it: what divides each frequency."""
    rope, divisors = cfg.rope, []
    for i in range(0, cfg.head_dim, 2):
        wavelength = 2 * math.pi * rope.base ** (i / cfg.head_dim)
        turns = rope.original_context_tokens / wavelength
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = min(1.0, max(0.0, (turns - rope.low_freq_factor) / span))
        divisors.append(1 / ((1 - keep) / rope.factor + keep))
    return np.array(divisors, dtype=np.float32)
