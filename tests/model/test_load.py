"""From a name to a model that computes, for each kind of name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.errors import ModelDamaged
from orchestrator.model import load as loading
from orchestrator.model.gguf_file import open_gguf
from orchestrator.model.hf_weights import read_hf_config
from orchestrator.model.load import Loading, load_model
from orchestrator.model.tokenizer_files import load_gguf_tokenizer
from tests.model.dense import dense_logits
from tests.model.gguf_files import write_gguf
from tests.model.test_shapes import shrink
from tests.model.tiny import save_model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """One model twice: a directory with its tokenizer, and a GGUF file."""
    directory, file = tmp_path / "hf", tmp_path / "gguf" / "model.gguf"
    file.parent.mkdir()
    model = save_model("llama", directory)
    write_gguf(file, model, read_hf_config(directory))
    backend = load_gguf_tokenizer(open_gguf(file), file.parent).parts.backend
    backend.save(str(directory / "tokenizer.json"))
    return directory, file


def test_both_formats_give_one_model(pair: tuple[Path, Path]) -> None:
    first, second = (load_model(str(path)) for path in pair)
    ids, spans = first.tokenizer.encode("the cat 12")
    assert second.tokenizer.encode("the cat 12") == (ids, spans)
    diff = dense_logits(first.decoder, ids) - dense_logits(second.decoder, ids)
    assert diff.abs().max() <= 1e-4
    assert not first.is_random
    assert (first.name, first.cfg.architecture) == (str(pair[0]), "LlamaForCausalLM")


def test_dtype_is_the_one_asked_for(pair: tuple[Path, Path]) -> None:
    for path in pair:
        assert load_model(str(path), Loading(dtype=torch.bfloat16)).decoder.dtype == torch.bfloat16


def test_fingerprint_is_of_bytes_and_not_of_paths(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in pair:
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
        assert load_model(str(copy)).fingerprint == load_model(str(path)).fingerprint
    config = pair[0] / "config.json"
    before = load_model(str(pair[0])).fingerprint
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert load_model(str(pair[0])).fingerprint != before


def test_shapes_say_that_they_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "shape_config", lambda name: shrink("qwen2.5-7b-1m"))
    model = load_model("shape:qwen2.5-7b-1m@6", Loading(dtype=torch.bfloat16))
    assert model.is_random
    text = "héllo"
    ids, spans = model.tokenizer.encode(text)
    assert len(ids) == 6
    assert spans[1] == spans[2] == (1, 2)
    assert model.tokenizer.decode(ids) == text
    assert model.tokenizer.frame() == []
    assert dense_logits(model.decoder, ids).isfinite().all()


def test_a_tokenizer_with_more_ids_than_embeddings_is_named(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.model.tokenizer.Tokenizer.num_plain_ids", 301)
    for path in pair:
        with pytest.raises(ModelDamaged, match="has 301 ids; its weights embed 300"):
            load_model(str(path))
