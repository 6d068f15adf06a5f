"""Row A1, exactness: logits and greedy tokens against `transformers`, in float32.

Owns the comparison: the real model at 1, 17, 512 and 3,000 tokens, and a tiny random model of every
architecture from safetensors and from GGUF. Refuses to know how a prompt is computed: `make_run`
brings that; the row itself uses `ProductRun`, the prefill of an ingest.
The tiny models are those of the tests (`tests/model/tiny.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.harness import note, print_row
from kv_store import Layout
from orchestrator.ingest import NUM_SINKS
from orchestrator.model.config import ModelConfig
from orchestrator.model.decoder import Decoder
from orchestrator.model.gguf_file import open_gguf
from orchestrator.model.gguf_weights import load_gguf_weights, read_gguf_config
from orchestrator.model.hf_weights import load_hf_weights, read_hf_config
from orchestrator.model.load import load_model
from orchestrator.model.registry import DEFAULT_MODEL, find_model
from orchestrator.prefill import Prefill
from sparse_attn.api import find_backend
from sparse_attn.select.centroid_build import CentroidParams

PROMPT_TOKENS = (1, 17, 512, 3000)
TINY_PROMPT_TOKENS = (1, 17, 90)
NUM_GREEDY = 64
LIMIT = 1e-3
BAR = (
    "max abs logit difference <= 1e-3; 64 greedy tokens identical; changing the chunk size moves "
    "logits by no more than transformers' own eager and sdpa differ"
)
_CPU = torch.device("cpu")
_BLOCK_TOKENS = 256
MAX_CHUNK_TOKENS = 1024
SEGMENT_TOKENS = 1024
MAX_TOKENS = 4096


class Run(Protocol):
    """A sequence in progress: chunks of token ids go in, hidden states [T, E] come out."""

    def forward(self, decoder: Decoder, ids: list[int]) -> Tensor:
        """Compute `ids` behind everything that came before."""


MakeRun = Callable[[ModelConfig], Run]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt on one model; differences are absolute, the largest over tokens and logits.

    chunk_diff: ours in one chunk against ours in several; attention_diff: `transformers` with
    eager attention against sdpa.
    """

    model: str
    num_tokens: int
    logit_diff: float
    chunk_diff: float
    attention_diff: float
    same_greedy: bool


def compare(
    name: str, reference: Any, decoder: Decoder, ids: list[int], make_run: MakeRun
) -> Comparison:
    """Measure one prompt; `reference` is the same model in transformers, float32."""
    # Hidden states are kept and logits made block by block: all at once they fill gigabytes.
    eager, sdpa = (_reference_hidden(reference, ids, kind) for kind in ("eager", "sdpa"))
    large, small = (_our_hidden(decoder, ids, make_run, tokens) for tokens in _chunks(len(ids)))
    theirs, ours = _reference_head(reference), decoder.logits
    result = Comparison(
        model=name,
        num_tokens=len(ids),
        logit_diff=max(max_diff(eager, theirs, x, ours) for x in (large, small)),
        chunk_diff=max_diff(large, ours, small, ours),
        attention_diff=max_diff(eager, theirs, sdpa, theirs),
        same_greedy=greedy(decoder, ids, make_run) == reference_greedy(reference, ids),
    )
    note(
        f"{name} {len(ids)} tokens: logits {result.logit_diff:.1e}, chunks "
        f"{result.chunk_diff:.1e}, eager/sdpa {result.attention_diff:.1e}, "
        f"greedy {result.same_greedy}"
    )
    return result


def max_diff(first: Tensor, first_head: Head, second: Tensor, second_head: Head) -> float:
    """Return the largest absolute difference of the logits of two hidden states [T, E]."""
    with torch.inference_mode():
        return max(
            float((first_head(first[block]) - second_head(second[block])).abs().max())
            for block in (slice(i, i + _BLOCK_TOKENS) for i in range(0, len(first), _BLOCK_TOKENS))
        )


def greedy(decoder: Decoder, ids: list[int], make_run: MakeRun) -> list[int]:
    """Return our greedy continuation, one token a step."""
    run, answer = make_run(decoder.cfg), list[int]()
    with torch.inference_mode():
        hidden = run.forward(decoder, ids)
        for _ in range(NUM_GREEDY):
            answer.append(int(decoder.logits(hidden[-1:]).argmax()))
            hidden = run.forward(decoder, answer[-1:])
    return answer


def _chunks(num_tokens: int) -> tuple[int, int]:
    """Two chunk sizes: what fits in memory at once, and an odd part of it."""
    large = min(num_tokens, MAX_CHUNK_TOKENS)
    return large, max(1, large // 3)


def _our_hidden(decoder: Decoder, ids: list[int], make_run: MakeRun, chunk_tokens: int) -> Tensor:
    run = make_run(decoder.cfg)
    with torch.inference_mode():
        starts = range(0, len(ids), chunk_tokens)
        return torch.cat([run.forward(decoder, ids[i : i + chunk_tokens]) for i in starts])


def _reference_hidden(model: Any, ids: list[int], attention: str) -> Tensor:
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        out = model.model(input_ids=torch.tensor([ids]), use_cache=False)
    return torch.as_tensor(out.last_hidden_state[0])


def _reference_head(model: Any) -> Head:
    """The last steps of transformers' forward, which has no name of its own there."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is None:
        return lambda hidden: torch.as_tensor(model.lm_head(hidden))
    return lambda hidden: torch.tanh(model.lm_head(hidden) / cap) * cap


def reference_greedy(model: Any, ids: list[int]) -> list[int]:
    """Return transformers' greedy continuation with its cache; never ends early."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(ids) :]]


def compare_real(make_run: MakeRun) -> Iterator[Comparison]:
    """Compare the default model, from its GGUF file, on Python's language reference."""
    from transformers import AutoModelForCausalLM

    path = find_model(DEFAULT_MODEL)
    ours = load_model(DEFAULT_MODEL)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ids, _ = ours.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))[:40_000])
    for num_tokens in PROMPT_TOKENS:
        yield compare(DEFAULT_MODEL, reference, ours.decoder, ids[:num_tokens], make_run)


def compare_tiny(make_run: MakeRun) -> Iterator[Comparison]:
    """Compare a tiny random model of every architecture, from safetensors and from GGUF."""
    from tests.model.gguf_files import GGUF_CASES, write_gguf
    from tests.model.tiny import CASES, prompt, save_model

    for case in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            reference = save_model(case, directory)
            cfg = read_hf_config(directory)
            weights = load_hf_weights(directory, cfg, dtype=torch.float32, device=_CPU)
            decoders = {f"{case} (safetensors)": Decoder(cfg, weights)}
            if case in GGUF_CASES:
                write_gguf(directory / "model.gguf", reference, cfg)
                decoders[f"{case} (gguf)"] = _open_gguf_decoder(directory / "model.gguf")
            for name, decoder in decoders.items():
                for num_tokens in TINY_PROMPT_TOKENS:
                    yield compare(name, reference, decoder, prompt(num_tokens), make_run)


def _open_gguf_decoder(path: Path) -> Decoder:
    file = open_gguf(path)
    cfg = read_gguf_config(file)
    return Decoder(cfg, load_gguf_weights(file, cfg, dtype=torch.float32, device=_CPU))


def summarise(comparisons: list[Comparison]) -> tuple[dict[str, object], bool]:
    """Return what was measured and whether the row holds."""
    real = [c for c in comparisons if c.model == DEFAULT_MODEL]
    logit_diff = max(c.logit_diff for c in comparisons)
    chunk_diff, attention_diff = (max(getattr(c, k) for c in real) for k in _CHUNK_KEYS)
    same = all(c.same_greedy for c in comparisons)
    measured = {
        "logit_diff_max": logit_diff,
        "greedy_identical": same,
        "chunk_diff_max": chunk_diff,
        "eager_sdpa_diff_max": attention_diff,
        "prompts": [asdict(c) for c in comparisons],
    }
    return measured, logit_diff <= LIMIT and same and chunk_diff <= attention_diff


_CHUNK_KEYS = ("chunk_diff", "attention_diff")


class ProductRun:
    """The product's own path: prefill chunk by chunk, clustered and sealed every segment."""

    def __init__(self, cfg: ModelConfig) -> None:
        self._cfg = cfg
        self._prefill: Prefill | None = None
        self._num_tokens = 0

    def forward(self, decoder: Decoder, ids: list[int]) -> Tensor:
        """Compute `ids` behind everything that came before; seals each segment that fills up."""
        if self._prefill is None:
            layout = _layout(self._cfg)
            backend = find_backend("torch")
            self._prefill = Prefill(decoder, backend, layout, clusters=CentroidParams())
        pieces = []
        while ids:
            room = SEGMENT_TOKENS - self._num_tokens % SEGMENT_TOKENS
            chunk, ids = ids[:room], ids[room:]
            pieces.append(self._prefill.forward(torch.tensor(chunk), self._num_tokens))
            self._num_tokens += len(chunk)
            if len(chunk) == room:
                segment_idx = self._num_tokens // SEGMENT_TOKENS - 1
                self._prefill.append(segment_idx, self._prefill.build(segment_idx))
        return torch.cat(pieces)


def _layout(cfg: ModelConfig) -> Layout:
    return Layout(
        num_tokens=MAX_TOKENS,
        segment_tokens=SEGMENT_TOKENS,
        sinks=NUM_SINKS,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=len(cfg.sliding_layers),
        sliding_window=max((w for w in cfg.windows if w is not None), default=0),
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype="float32",
    )


def main() -> int:
    """Measure the row through the product's own prefill."""
    comparisons = [*compare_tiny(ProductRun), *compare_real(ProductRun)]
    measured, holds = summarise(comparisons)
    return print_row(row="A1", measured=measured, bar=BAR, holds=holds)
