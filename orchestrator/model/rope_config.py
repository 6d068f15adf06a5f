"""Reads the rotary embedding out of a Hugging Face configuration.

Owns three spellings (transformers 4: `rope_theta` and `rope_scaling`; transformers 5:
`rope_parameters`; Gemma 3: one dictionary for each kind of layer) and the refusals: a rope type
or key that is not implemented is named. Refuses to know the frequencies (`rope.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import ModelDamaged, ModelUnsupported
from orchestrator.model.config import RopeConfig

Raw = Mapping[str, Any]

_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_NEEDED: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
}
_OPTIONAL: dict[str, frozenset[str]] = {
    "llama3": frozenset({"original_max_position_embeddings"}),
    "yarn": frozenset(
        {"original_max_position_embeddings", "attention_factor", "truncate"}
        | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    ),
}


def read_rope(raw: Raw, *, gemma: bool, name: str) -> tuple[RopeConfig, RopeConfig]:
    """Return the rotary embedding of full-attention layers and of sliding layers.

    Raises ModelUnsupported for an unknown type or key, ModelDamaged for a missing number.
    """
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported("partial_rotary_factor", raw["partial_rotary_factor"], "1", name)
    stated = raw.get("rope_parameters") or {}
    old_style = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    context = int(raw.get("max_position_embeddings", 0))
    if not gemma:
        rope = _parse({**old_style, **stated}, base=10_000.0, context=context, name=name)
        return rope, rope
    if stated.keys() - {"full_attention", "sliding_attention"}:
        raise _unsupported(
            "rope_parameters", sorted(stated), "full_attention, sliding_attention", name
        )
    full = {**old_style, **(stated.get("full_attention") or {})}
    local = {"rope_theta": raw.get("rope_local_base_freq")}
    local |= stated.get("sliding_attention") or {}
    return (
        _parse(full, base=1_000_000.0, context=context, name=name),
        _parse(local, base=10_000.0, context=context, name=name),
    )


def yarn_attention_factor(
    factor: float, *, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Return YaRN's factor on cos and sin where the model states none (its equation 22)."""

    def grow(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return grow(mscale) / grow(mscale_all_dim)
    return grow(1.0)


def _parse(params: Raw, *, base: float, context: int, name: str) -> RopeConfig:
    """Build one RopeConfig; `base` and `context` are what absent keys stand for."""
    given = {key: value for key, value in params.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _NEEDED or given.get("type", kind) != kind:
        raise _unsupported("rope type", given.get("type", kind), ", ".join(_NEEDED), name)
    _check_keys(given, kind, name)
    common = {"kind": kind, "base": float(given.get("rope_theta", base))}
    if kind == "default":
        return RopeConfig(**common)
    common["factor"] = float(given["factor"])
    if kind == "linear":
        return RopeConfig(**common)
    common["original_context_tokens"] = int(given.get("original_max_position_embeddings", context))
    if kind == "llama3":
        return RopeConfig(
            **common,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    stated = given.get("attention_factor")
    return RopeConfig(
        **common,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        attention_factor=float(stated)
        if stated is not None
        else yarn_attention_factor(
            common["factor"],
            mscale=given.get("mscale"),
            mscale_all_dim=given.get("mscale_all_dim"),
        ),
    )


def _check_keys(given: Raw, kind: str, name: str) -> None:
    if given.get("partial_rotary_factor", 1) != 1:
        raise _unsupported("partial_rotary_factor", given["partial_rotary_factor"], "1", name)
    allowed = _ALWAYS | _NEEDED[kind] | _OPTIONAL.get(kind, frozenset())
    if unknown := sorted(given.keys() - allowed):
        raise _unsupported(f"key of rope type {kind}", unknown[0], ", ".join(sorted(allowed)), name)
    if missing := sorted(_NEEDED[kind] - given.keys()):
        raise ModelDamaged(
            f"rope type {kind} of {name} has no {missing[0]}; needed: "
            f"{', '.join(sorted(_NEEDED[kind]))}; fetch the model's configuration again"
        )


def _unsupported(what: str, value: object, limit: str, name: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"{what} {value!r} of {name} is not supported; supported: {limit}; choose another model"
    )
