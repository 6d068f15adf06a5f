"""A whole tiny model, weights and tokenizer, and documents for it: what Engine and CLI need to run.

One token a byte, chat template and stop token as a real model has them; weights are seeded noise,
so answers are gibberish that repeats exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.model.gguf_files import SPECIALS, TEMPLATE
from tests.model.tiny import save_model

MAX_CONTEXT_TOKENS = 2048
SEGMENT_TOKENS = 256
TEXT = "".join(f"Box {i} holds {i * 7919 % 1000} marbles. " for i in range(48))
QUESTION = "How many marbles does box 7 hold?"


def save_tiny_model(directory: Path, case: str = "llama") -> Path:
    """Save the tiny model `case` of `tests.model.tiny` with a tokenizer; returns `directory`."""
    save_model(case, directory)
    config = directory / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "max_position_embeddings": MAX_CONTEXT_TOKENS}))
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer = {"chat_template": TEMPLATE, "bos_token": SPECIALS[1], "eos_token": SPECIALS[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return backend
