"""GGUF files against the transformers models that they were written from."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from orchestrator.errors import ModelDamaged, ModelNotFound, ModelUnsupported
from orchestrator.model.decoder import Decoder
from orchestrator.model.gguf_config import config_from_gguf
from orchestrator.model.gguf_file import open_gguf
from orchestrator.model.gguf_weights import load_gguf_weights, read_gguf_config
from orchestrator.model.hf_weights import read_hf_config
from tests.model.dense import dense_greedy, dense_logits
from tests.model.gguf_files import GGUF_CASES, write_gguf
from tests.model.tiny import model_greedy, model_logits, prompt, save_model

CPU = torch.device("cpu")
KEYS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
SHAPES = {"token_embd.weight": (300, 32)}


def load(path: Path) -> Decoder:
    file = open_gguf(path)
    cfg = read_gguf_config(file)
    return Decoder(cfg, load_gguf_weights(file, cfg, dtype=torch.float32, device=CPU))


@pytest.mark.parametrize("case", GGUF_CASES)
def test_same_logits_and_tokens_as_transformers(case: str, tmp_path: Path) -> None:
    model = save_model(case, tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", model, read_hf_config(tmp_path / "hf"))
    decoder, ids = load(tmp_path / "model.gguf"), prompt(90)
    assert (dense_logits(decoder, ids) - model_logits(model, ids)).abs().max() <= 1e-3
    ids = prompt(17, seed=1)
    assert dense_greedy(decoder, ids, 64) == model_greedy(model, ids, 64)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
def test_half_precision_files(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", model, read_hf_config(tmp_path / "hf"), quantise=kind)
    decoder = load(tmp_path / "model.gguf")
    dtype = torch.float16 if kind.name == "F16" else torch.bfloat16
    stored = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].to(dtype).float()
    torch.testing.assert_close(decoder.weights.layers[1].qkv[:48], stored, rtol=0, atol=0)


def test_quantised_rows_are_dequantised(tmp_path: Path) -> None:
    """Q8_0 needs columns in blocks of 32: the MLP is made to fit, the rest stays float32."""
    model = save_model("llama", tmp_path / "hf")
    cfg = read_hf_config(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(path, model, cfg)
    weights = load(path).weights
    wide = torch.nn.functional.pad(weights.layers[0].down, (0, 16)).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "wide.gguf", "llama")
    writer.add_tensor("wide", gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "wide.gguf")
    assert file.shape("wide") == wide.shape
    rows = torch.cat([rows for _, rows in file.read("wide")])
    torch.testing.assert_close(rows, torch.from_numpy(wide), atol=0.02, rtol=0)


def test_large_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model("llama", tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", model, read_hf_config(tmp_path / "hf"))
    whole = load(tmp_path / "model.gguf").weights
    monkeypatch.setattr("orchestrator.model.gguf_file._PIECE_BYTES", 4 * 48 * 7)
    file = open_gguf(tmp_path / "model.gguf")
    assert [start for start, _ in file.read("blk.0.attn_q.weight")] == list(range(0, 48, 7))
    pieces = load(tmp_path / "model.gguf").weights
    assert torch.equal(pieces.layers[2].qkv, whole.layers[2].qkv)
    assert torch.equal(pieces.embedding, whole.embedding)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_cut_file_is_named(share: float, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(path, model, read_hf_config(tmp_path / "hf"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelDamaged, match=r"model\.gguf is cut .* bytes .*fetch the model again"):
        load(path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(4096))
    with pytest.raises(ModelDamaged, match="no GGUF file"):
        open_gguf(path)
    with pytest.raises(ModelNotFound, match="does not exist"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "phi3"}, "architecture 'phi3'"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window"),
        ({"llama.rope.scaling.type": "longrope"}, "rope type 'longrope'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count"),
    ],
)
def test_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelUnsupported, match=message):
        config_from_gguf({**KEYS, **changes}, SHAPES, name="tiny")


def test_rope_frequencies_beside_a_scaling_type_are_refused() -> None:
    keys = {**KEYS, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(ModelUnsupported, match="rope_freqs"):
        config_from_gguf(keys, SHAPES, name="tiny", rope_divisors=(1.0,) * 4)


@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count"])
def test_a_missing_number_is_named(key: str) -> None:
    keys = {name: value for name, value in KEYS.items() if name != key}
    with pytest.raises(ModelDamaged, match=key):
        config_from_gguf(keys, SHAPES, name="tiny")


def test_the_old_linear_key_is_read() -> None:
    cfg = config_from_gguf({**KEYS, "llama.rope.scale_linear": 4.0}, SHAPES, name="tiny")
    assert (cfg.rope.kind, cfg.rope.factor) == ("linear", 4.0)


def test_gemma_27b_scales_by_its_model_dimension() -> None:
    keys = {key.replace("llama", "gemma3"): value for key, value in KEYS.items()}
    keys |= {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 8}
    keys |= {"gemma3.attention.key_length": 16, "gemma3.block_count": 62}
    cfg = config_from_gguf(keys, SHAPES, name="tiny")
    assert cfg.attention_scale == 8**-0.5
    assert cfg.full_layers == tuple(range(5, 62, 6))
    small = config_from_gguf({**keys, "gemma3.block_count": 26}, SHAPES, name="tiny")
    assert small.attention_scale == 16**-0.5
