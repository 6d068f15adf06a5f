"""The kernels of a layer as they are launched, for compiling where there is no GPU.

`KERNELS` for NVIDIA, `KERNELS_AMD`: (kernel, signature, constexprs, options) of each; at run time
pointers and strides are multiples of 16 bytes. Import this where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparse_attn.kernels import layer, rotary
from sparse_attn.kernels.layer import AMD, NVIDIA, Tile
from tests.sparse_attn.compiling import Entry, launched

Constants = dict[str, int | None]
_HALF, _FLOAT = "*bf16", "*fp32"


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


def _norm(dim: int, block: int, *, has_branch: bool, has_post: bool) -> Entry:
    constants: Constants = {"E": dim, "BLOCK": block}
    signature = {
        "x": _HALF,
        **_pointers(_HALF, *(["branch"] if has_branch else [])),
        "weight": _FLOAT,
        **_pointers(_FLOAT, *(["post_norm"] if has_post else [])),
        **_pointers(_HALF, "stream", "normed"),
        "eps": "fp32",
    }
    constants |= {} if has_branch else {"branch": None}
    constants |= {} if has_post else {"post_norm": None}
    return layer.add_rms_norm_kernel, signature, constants, {"num_warps": layer.norm_warps(block)}


def _rotate(heads: tuple[int, int], dim: int, block: int, *, has_norm: bool) -> Entry:
    signature = {
        **_pointers(_HALF, "heads", "cos", "sin"),
        **_pointers(_FLOAT, *(["qk_norm"] if has_norm else [])),
        **_pointers(_HALF, "k_buffer", "v_buffer"),
        "at": "*i64",
        "q": _HALF,
        **dict.fromkeys(("capacity", "stride_k", "stride_v"), "i32"),
        "eps": "fp32",
    }
    constants: Constants = {"H": heads[0], "G": heads[1], "D": dim, "BLOCK": block}
    constants |= {} if has_norm else {"qk_norm": None}
    return rotary.rotate_append_kernel, signature, constants, {"num_warps": 1}


def _rotate_each(heads: tuple[int, int], dim: int, block: int, *, has_norm: bool) -> Entry:
    signature = {
        **_pointers(_HALF, "heads", "cos", "sin"),
        **_pointers(_FLOAT, *(["qk_norm"] if has_norm else [])),
        "rooms": "*i64",
        "q": _HALF,
        "eps": "fp32",
    }
    constants: Constants = {"H": heads[0], "G": heads[1], "D": dim, "BLOCK": block}
    constants |= {} if has_norm else {"qk_norm": None}
    return rotary.rotate_append_each_kernel, signature, constants, {"num_warps": 1}


def _gate(dim: int, *, is_silu: bool) -> Entry:
    signature = _pointers(_HALF, "gate_up", "out")
    constants: Constants = {"F": dim, "IS_SILU": is_silu, "BLOCK": layer.GATE_COLUMNS}
    return layer.gate_kernel, signature, constants, {"num_warps": 2}


def _product(tile: Tile, inner: int, num_rows: int, *, has_bias: bool) -> Entry:
    signature = {
        **_pointers(_HALF, "x", "weight", *(["bias"] if has_bias else []), "out"),
        **dict.fromkeys(("num_rows", "num_columns"), "i32"),
    }
    constants: Constants = {
        "K": inner,
        "ROWS": layer.padded_rows(num_rows),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    constants |= {} if has_bias else {"bias": None}
    return layer.small_linear_kernel, signature, constants, tile.options()


def _each(tiles: dict[int, Tile]) -> Iterator[Entry]:
    for dim, block in ((576, 1024), (4096, 4096), (5376, 8192), (8192, 8192)):
        yield _norm(dim, block, has_branch=False, has_post=False)
        yield _norm(dim, block, has_branch=True, has_post=False)
        yield _norm(dim, block, has_branch=True, has_post=True)
    for heads, dim, block in (
        ((9, 3), 64, 32),
        ((32, 32), 80, 64),
        ((32, 8), 128, 64),
        ((8, 4), 256, 128),
    ):
        yield _rotate(heads, dim, block, has_norm=False)
        yield _rotate(heads, dim, block, has_norm=True)
        yield _rotate_each(heads, dim, block, has_norm=False)
        yield _rotate_each(heads, dim, block, has_norm=True)
    for dim in (1536, 14336):
        yield _gate(dim, is_silu=True)
        yield _gate(dim, is_silu=False)
    for tile in tiles.values():
        for num_rows in (1, 32, 64):
            yield _product(tile, 4096, num_rows, has_bias=False)
        yield _product(tile, 576, 1, has_bias=True)
        yield _product(tile, 14336, 16, has_bias=False)


KERNELS: list[Entry] = launched(_each(NVIDIA), is_early=True)
KERNELS_AMD: list[Entry] = launched(_each(AMD), is_early=False)
