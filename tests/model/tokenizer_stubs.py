"""Tiny tokenizers in files without weights: GGUF and Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import tokenizers

from orchestrator.model.gguf_file import GgufFile, open_gguf
from orchestrator.model.tokenizer import Tokenizer
from orchestrator.model.tokenizer_files import load_gguf_tokenizer
from tests.model.gguf_files import write_vocabulary


def gguf_vocabulary(path: Path, *, pre: str = "smollm") -> GgufFile:
    """A GGUF file that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    write_vocabulary(writer, pre=pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return open_gguf(path)


def build(tmp_path: Path, *, pre: str = "smollm") -> Tokenizer:
    return load_gguf_tokenizer(gguf_vocabulary(tmp_path / "v.gguf", pre=pre), tmp_path)


def with_metadata(file: GgufFile, changes: Mapping[str, Any]) -> GgufFile:
    keys = {f"tokenizer.{key}": value for key, value in changes.items()}
    return GgufFile(name=file.name, metadata={**file.metadata, **keys}, tensors={})


def save_hf(directory: Path, backend: tokenizers.Tokenizer, **settings: Any) -> None:
    """A Hugging Face directory with a tokenizer and no weights."""
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
