"""Shapes and bytes of a document's KV: pure integer arithmetic.

Owns the names of the tensors of a segment file, segment spans, and where the steady zone lies.
Refuses to know tensors, files and checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "float8_e4m3fn": 1}
FP8 = "float8_e4m3fn"
KV_DTYPES = ("float32", "bfloat16", FP8)

# Cluster tensors of a segment file: all of them, or none (a document without clusters).
# Trailing dimensions: C clusters or P groups, then D where the last entry says so.
CLUSTER_TENSORS: dict[str, tuple[str, str, bool]] = {
    # name: (dtype, "C" or "P", has a trailing D)
    "cluster_starts": ("int32", "C", False),
    "cluster_sizes": ("int32", "C", False),
    "centroids": ("float16", "C", True),
    "value_sums": ("float16", "C", True),
    "variances": ("float16", "C", True),
    "radii": ("float32", "C", False),
    "group_starts": ("int32", "P", False),
    "group_counts": ("int32", "P", False),
    "group_sizes": ("int32", "P", False),
    "group_centroids": ("float16", "P", True),
    "group_value_sums": ("float16", "P", True),
    "group_variances": ("float16", "P", True),
    "group_radii": ("float32", "P", False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The extents that fix every shape of a document. Counts and tokens; N is `num_tokens`.

    dtype: the model's, of what is stored beside KV in fp8: steady and sliding-window keys.
    """

    num_tokens: int
    segment_tokens: int
    sinks: int
    window: int
    num_full_layers: int
    num_sliding_layers: int
    sliding_window: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: str
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        extents = (self.num_tokens, self.segment_tokens, self.num_kv_heads, self.head_dim)
        if min(extents) < 1 or min(self.sinks, self.window, self.sliding_window) < 0:
            raise ValueError(f"layout with an extent below its limit: {self}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"KV dtype {self.kv_dtype!r}; limit {', '.join(KV_DTYPES)}")

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are stored in one byte a number."""
        return self.kv_dtype == FP8

    def slot_bytes(self, item_bytes: int) -> int:
        """Bytes of one number of a resident body, where keys are used with item_bytes a number."""
        return ITEM_BYTES[FP8] if self.is_fp8 else item_bytes

    @property
    def num_segments(self) -> int:
        """Segments of the whole document; the last may be shorter."""
        return -(-self.num_tokens // self.segment_tokens)

    def segment_span(self, segment_idx: int) -> tuple[int, int]:
        """First and past-the-end document token of a segment."""
        start = segment_idx * self.segment_tokens
        return start, min(start + self.segment_tokens, self.num_tokens)

    def clustered_span(self, segment_idx: int) -> tuple[int, int]:
        """Segment-local slots that hold clusters: the segment without the steady zone.

        May be empty, and is then `(x, x)`.
        """
        start, end = self.segment_span(segment_idx)
        first = max(start, min(self.sinks, end))
        last = max(first, min(end, self.num_tokens - self.window))
        return first - start, last - start

    def steady_tokens(self, segment_idx: int) -> int:
        """Tokens of the segment that lie in the steady zone."""
        (start, end), (first, last) = (
            self.segment_span(segment_idx),
            self.clustered_span(segment_idx),
        )
        return end - start - (last - first)

    def sliding_tokens(self, segment_idx: int) -> int:
        """Tokens of the segment that its sliding-window tensors keep: its last min(S, W)."""
        start, end = self.segment_span(segment_idx)
        return min(end - start, self.sliding_window)

    def segment_shapes(self, segment_idx: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor of one KV head that does not depend on the clusters."""
        start, end = self.segment_span(segment_idx)
        kv = (self.num_full_layers, end - start, self.head_dim)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "k": (self.kv_dtype, kv),
            "v": (self.kv_dtype, kv),
            "positions": ("int32", kv[:2]),
        }
        beside = self.kv_dtype
        if self.is_fp8:
            beside = self.dtype
            steady = (self.num_full_layers, self.steady_tokens(segment_idx), self.head_dim)
            shapes["steady_k"] = shapes["steady_v"] = (beside, steady)
            shapes["scales"] = ("float32", (self.num_full_layers, 2))
        if self.num_sliding_layers:
            tail = (self.num_sliding_layers, self.sliding_tokens(segment_idx), self.head_dim)
            shapes["sliding_k"] = shapes["sliding_v"] = (beside, tail)
        return shapes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of k, v and positions of one document token over all full-attention layers."""
        per_head = 2 * self.head_dim * ITEM_BYTES[self.kv_dtype] + ITEM_BYTES["int32"]
        return self.num_full_layers * self.num_kv_heads * per_head

    @property
    def kv_bytes(self) -> int:
        """Bytes of k, v and positions of the whole document, cluster tensors left out."""
        return self.num_tokens * self.kv_bytes_per_token

    def find_misfit(
        self, segment_idx: int, tensors: dict[str, tuple[str, tuple[int, ...]]]
    ) -> str | None:
        """What is wrong with one KV head's tensors (name -> dtype, shape), or None if they fit."""
        for name, wanted in self.segment_shapes(segment_idx).items():
            if tensors.get(name) != wanted:
                return f"tensor {name} is {_show(tensors.get(name))}, wanted {_show(wanted)}"
        rest = {n: t for n, t in tensors.items() if n not in self.segment_shapes(segment_idx)}
        if not rest:
            return None
        if rest.keys() != CLUSTER_TENSORS.keys():
            odd = sorted(rest.keys() ^ CLUSTER_TENSORS.keys())
            return f"cluster tensors must be all or none; missing or unknown: {', '.join(odd)}"
        return self._find_cluster_misfit(rest)

    def _find_cluster_misfit(self, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str | None:
        columns = {
            "C": _column(tensors["cluster_sizes"][1]),
            "P": _column(tensors["group_sizes"][1]),
        }
        for name, (dtype, letter, has_dim) in CLUSTER_TENSORS.items():
            shape: tuple[int, ...] = (self.num_full_layers, columns[letter])
            wanted = (dtype, (*shape, self.head_dim) if has_dim else shape)
            if tensors[name] != wanted:
                return f"tensor {name} is {_show(tensors[name])}, wanted {_show(wanted)}"
        return None


def segment_file(segment_idx: int, kv_head_idx: int) -> str:
    """Path of one KV head's file of one segment, relative to the document's directory."""
    return f"segments/{segment_idx:05d}/kv{kv_head_idx:03d}.safetensors"


def _column(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) == 2 else -1


def _show(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"
