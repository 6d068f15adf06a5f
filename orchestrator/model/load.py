"""From a model's name to a model that computes: the one place where the formats meet.

Owns the choice of loader. Refuses to know each format's insides. Loading never downloads:
`registry.fetch` does that, by name and on request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from collectives import Group, Mesh, SoloGroup
from orchestrator.errors import ModelDamaged
from orchestrator.model.config import ModelConfig
from orchestrator.model.decoder import Decoder
from orchestrator.model.fingerprint import fingerprint_files, fingerprint_parts
from orchestrator.model.gguf_file import open_gguf
from orchestrator.model.gguf_weights import load_gguf_weights, read_gguf_config
from orchestrator.model.hf_weights import find_weight_files, load_hf_weights, read_hf_config
from orchestrator.model.layers import Fused, Linear, LinearSplit, ModelWeights
from orchestrator.model.registry import SHAPE_PREFIX, find_model
from orchestrator.model.shapes import random_weights, shape_config
from orchestrator.model.shard import ModelShard, cut_model
from orchestrator.model.tokenizer import Tokenizer
from orchestrator.model.tokenizer_files import (
    byte_tokenizer,
    load_gguf_tokenizer,
    load_hf_tokenizer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to compute, or a shard of one.

    fingerprint: of the weights, the same for every copy of the files; `tokenizer.fingerprint` is
    its own. is_random: weights are noise, good for timing alone; whoever prints a result says so.
    """

    name: str
    cfg: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    is_random: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a model is loaded: dtype, device, what multiplies its weights, and this rank's share.

    group: all ranks of the mesh.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    linear: Linear = functional.linear
    linear_split: LinearSplit | None = None
    mesh: Mesh = field(default_factory=lambda: Mesh(heads=1, context=1))
    group: Group = field(default_factory=SoloGroup)
    fused: Fused | None = None

    def cut(self, cfg: ModelConfig) -> ModelShard:
        """This rank's shard; raises MeshInvalid where the mesh does not fit the model."""
        return cut_model(cfg, self.mesh, self.group.rank)

    def decoder(self, cfg: ModelConfig, weights: ModelWeights) -> Decoder:
        """The decoder of this rank's weights."""
        return Decoder(
            cfg,
            weights,
            self.linear,
            linear_split=self.linear_split,
            shard=self.cut(cfg),
            group=self.group,
            fused=self.fused,
        )


def load_model(
    name_or_path: str, loading: Loading | None = None, *, models_dir: Path | None = None
) -> LoadedModel:
    """Load a known name, a GGUF file, a Hugging Face directory or `shape:NAME[@LAYERS]`.

    Raises ModelNotFound, ModelUnsupported or ModelDamaged, and MeshInvalid.
    """
    how = loading or Loading()
    if name_or_path.startswith(SHAPE_PREFIX):
        return _load_shape(name_or_path, how)
    path = find_model(name_or_path, models_dir)
    load = _load_directory if path.is_dir() else _load_gguf
    return load(path, name_or_path, how)


def _load_shape(name: str, how: Loading) -> LoadedModel:
    cfg = shape_config(name)
    weights = random_weights(cfg, dtype=how.dtype, device=how.device, shard=how.cut(cfg))
    return LoadedModel(
        name=name,
        cfg=cfg,
        decoder=how.decoder(cfg, weights),
        tokenizer=byte_tokenizer(),
        fingerprint=fingerprint_parts([name.encode()]),
        is_random=True,
    )


def _load_directory(path: Path, name: str, how: Loading) -> LoadedModel:
    cfg = read_hf_config(path)
    tokenizer = load_hf_tokenizer(path)
    _check_vocabulary(cfg, tokenizer)
    weights = load_hf_weights(path, cfg, dtype=how.dtype, device=how.device, shard=how.cut(cfg))
    files = [path / "config.json", *find_weight_files(path)]
    return _loaded(name, cfg, how.decoder(cfg, weights), tokenizer, files)


def _load_gguf(path: Path, name: str, how: Loading) -> LoadedModel:
    file = open_gguf(path)
    cfg = read_gguf_config(file)
    tokenizer = load_gguf_tokenizer(file, path.parent)
    _check_vocabulary(cfg, tokenizer)
    weights = load_gguf_weights(file, cfg, dtype=how.dtype, device=how.device, shard=how.cut(cfg))
    return _loaded(name, cfg, how.decoder(cfg, weights), tokenizer, [path])


def _loaded(
    name: str, cfg: ModelConfig, decoder: Decoder, tokenizer: Tokenizer, files: list[Path]
) -> LoadedModel:
    return LoadedModel(
        name=name,
        cfg=cfg,
        decoder=decoder,
        tokenizer=tokenizer,
        fingerprint=fingerprint_files(files),
        is_random=False,
    )


def _check_vocabulary(cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """Every id that a text can have must have an embedding."""
    if tokenizer.num_plain_ids > cfg.vocab_size:
        raise ModelDamaged(
            f"the tokenizer of {cfg.name} has {tokenizer.num_plain_ids} ids; its weights embed "
            f"{cfg.vocab_size}; fetch the model again"
        )
