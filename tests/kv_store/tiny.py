"""Documents of a few tokens: parameters, seeded tensors, and a full ingest in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_store import CLUSTER_TENSORS, DocumentParams, DocumentWriter, Layout, Store

NAME = "book"


def params(**changes: Any) -> DocumentParams:
    """Three segments for 20 tokens: 8, 8 and 4."""
    tiny = DocumentParams(
        model="tiny",
        model_fingerprint="m1",
        tokenizer_fingerprint="t1",
        rope={"type": "default", "theta": 10000.0},
        dtype="float32",
        kv_dtype="float32",
        segment_tokens=8,
        frame_tokens=2,
        sinks=2,
        window=3,
        num_full_layers=2,
        num_sliding_layers=1,
        sliding_window=5,
        num_kv_heads=2,
        head_dim=4,
        selector={"name": "centroid", "keys_per_cluster": 2},
        chunk_tokens=4,
        prefill="exact",
        threads=1,
        mesh="1x1",
        machine="cpu-test",
        library_versions={"torch": "0"},
    )
    return replace(tiny, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What one ingest is given, and the tensors that its model would compute."""

    params: DocumentParams
    text: str
    token_ids: list[int]
    spans: list[tuple[int, int]]
    has_clusters: bool = True

    @property
    def layout(self) -> Layout:
        return self.params.layout(num_tokens=len(self.token_ids))

    def segment(self, segment_idx: int) -> list[dict[str, Tensor]]:
        """Tensors of a segment, a function of the input alone."""
        seed = sum(self.token_ids) * 31 + segment_idx
        generator = torch.Generator().manual_seed(seed)
        return [
            make_head(self.layout, segment_idx, kv_head_idx, generator, self.has_clusters)
            for kv_head_idx in range(self.layout.num_kv_heads)
        ]

    def begin(self, store: Store, **options: bool) -> DocumentWriter:
        return store.begin(NAME, self.params, self.text, self.token_ids, self.spans, **options)


def make_input(num_tokens: int = 20, *, salt: int = 0, **changes: Any) -> Input:
    """An input of `num_tokens` tokens; another salt is another text."""
    has_clusters = changes.pop("has_clusters", True)
    text = "".join(chr(97 + (i * 7 + salt) % 26) for i in range(num_tokens - 2)) + "é\n"
    return Input(
        params=params(**changes),
        text=text,
        token_ids=[salt + i for i in range(num_tokens)],
        spans=[(-1, -1), (-1, -1), *((i, i + 1) for i in range(num_tokens - 2))],
        has_clusters=has_clusters,
    )


def make_head(
    layout: Layout,
    segment_idx: int,
    kv_head_idx: int,
    generator: torch.Generator,
    has_clusters: bool,
) -> dict[str, Tensor]:
    """One KV head's tensors, with another number of clusters for every head and segment."""
    start, end = layout.segment_span(segment_idx)
    columns = {"C": 1 + kv_head_idx + segment_idx, "P": 1 + kv_head_idx}
    shapes = layout.segment_shapes(segment_idx)
    if has_clusters:
        for name, (dtype, letter, has_dim) in CLUSTER_TENSORS.items():
            last = (layout.head_dim,) if has_dim else ()
            shapes[name] = (dtype, (layout.num_full_layers, columns[letter], *last))
    head = {}
    for name, (dtype, shape) in shapes.items():
        if dtype == "int32":
            head[name] = torch.randint(1, 5, shape, generator=generator, dtype=torch.int32)
        else:
            head[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    order = torch.randperm(end - start, generator=generator, dtype=torch.int32)
    head["positions"] = (start + order).repeat(layout.num_full_layers, 1)
    return head


def ingest(
    store: Store,
    given: Input,
    *,
    on_segment: Callable[[int], None] = lambda _: None,
    **options: bool,
) -> str:
    """Begin or resume, append what is missing, finish; returns the document hash."""
    with given.begin(store, **options) as writer:
        for segment_idx in range(writer.sealed_segments, given.layout.num_segments):
            on_segment(segment_idx)
            writer.append_segment(segment_idx, given.segment(segment_idx))
        return writer.finish()


def document_files(root: Path) -> list[Path]:
    """Every file of the tiny document, sorted."""
    return sorted(path for path in (root / NAME).rglob("*") if path.is_file())
