"""Kernels of a layer against the model's own functions: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.model import layers, rope
from orchestrator.model.config import Activation, RopeConfig
from orchestrator.model.layers import LayerWeights
from orchestrator.model.rope import Rotation
from sparse_attn.errors import AttentionError, ShapeMismatch
from sparse_attn.kernels import layer, rotary

HAS_GPU = torch.cuda.is_available()
EPS = 1e-5
LLAMA3 = RopeConfig(
    kind="llama3",
    base=500000.0,
    factor=8.0,
    original_context_tokens=8192,
    high_freq_factor=4.0,
    attention_factor=1.25,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Where kernels run; the greatest error relative to a number: one rounding of its type."""

    device: str
    dtype: torch.dtype

    @property
    def rounding(self) -> float:
        return torch.finfo(self.dtype).eps

    def normal(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, dtype or self.dtype)

    def scale(self, *shape: int, seed: int) -> Tensor:
        """Weights of a norm."""
        return 1.0 + 0.3 * self.normal(*shape, seed=seed, dtype=torch.float32)

    def assert_near(self, found: Tensor, expected: Tensor, roundings: float = 1.0) -> None:
        """Equal but for the order of a sum, which turns a few roundings over."""
        assert found.dtype == expected.dtype
        limit = roundings * max(self.rounding, 1e-6)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=limit)
        if self.dtype != torch.float32:
            assert float((found != expected).double().mean()) < 0.02 * roundings


def _param(device: str, dtype: torch.dtype, name: str) -> object:
    is_here = (device == "cuda") == HAS_GPU
    skip = pytest.mark.skipif(not is_here, reason="the interpreter is for machines without a GPU")
    marks = (skip, pytest.mark.gpu) if device == "cuda" else (skip,)
    return pytest.param(Kind(device=device, dtype=dtype), id=name, marks=marks)


@pytest.fixture(
    params=[
        _param("cpu", torch.float32, "single"),
        _param("cpu", torch.float16, "half"),
        _param("cuda", torch.bfloat16, "gpu"),
    ]
)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.mark.parametrize(("num_rows", "dim"), [(1, 576), (3, 1), (16, 4096), (3, 5376), (1, 8192)])
@pytest.mark.parametrize("has_post", [False, True])
def test_add_rms_norm(kind: Kind, num_rows: int, dim: int, has_post: bool) -> None:
    x, branch = (kind.normal(num_rows, dim, seed=i) for i in (0, 1))
    weight, post = kind.scale(dim, seed=2), kind.scale(dim, seed=3) if has_post else None
    expected = layers.residual(x, branch, post, EPS)
    stream, normed = layer.add_rms_norm(x, branch, weight, eps=EPS, post_norm=post)
    if has_post:
        kind.assert_near(stream, expected, roundings=4)  # a sum may be smaller than what turned
    else:
        assert torch.equal(stream, expected)
    kind.assert_near(normed, layers.rms_norm(stream, weight, EPS))


def test_norm_without_branch_leaves_the_stream(kind: Kind) -> None:
    x, weight = kind.normal(3, 576, seed=0) * 1e-3, kind.scale(576, seed=1)
    stream, normed = layer.add_rms_norm(x, None, weight, eps=EPS)
    assert stream is x
    kind.assert_near(normed, layers.rms_norm(x, weight, EPS))


def test_stream_is_added_in_place(kind: Kind) -> None:
    x, branch, normed = (kind.normal(3, 576, seed=i) for i in range(3))
    weight = kind.scale(576, seed=3)
    expected = layer.add_rms_norm(x, branch, weight, eps=EPS)
    found = layer.add_rms_norm(x, branch, weight, eps=EPS, out=(x, normed))
    assert found[0] is x
    assert found[1] is normed
    assert torch.equal(x, expected[0])
    assert torch.equal(normed, expected[1])


def turn_of(kind: Kind, num_tokens: int, head_dim: int) -> Rotation:
    """Rotary tables of a long document's last tokens."""
    positions = torch.arange(num_tokens, device=kind.device) + 100_003
    frequencies = rope.inverse_frequencies(LLAMA3, head_dim).to(kind.device)
    return rope.rotation(frequencies, positions, factor=LLAMA3.attention_factor, dtype=kind.dtype)


ROTATED = [
    (1, (9, 3), 64, 5),
    (3, (4, 4), 80, 0),
    (16, (32, 8), 128, 7),
    (3, (2, 1), 256, 28),
    (1, (2, 1), 6, 32),
]


@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim", "at"), ROTATED)
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotate_append(
    kind: Kind, num_tokens: int, num_heads: tuple[int, int], head_dim: int, at: int, has_norm: bool
) -> None:
    """Buffers of 30 rows: the last token of the fourth case, and all of the fifth, find no row."""
    num_q, num_kv = num_heads
    heads = kind.normal(num_tokens, num_q + 2 * num_kv, head_dim, seed=0)
    scale = kind.scale(num_q + num_kv, head_dim, seed=1) if has_norm else None
    turn = turn_of(kind, num_tokens, head_dim)
    # Half of a greater allocation: rows are contiguous, KV heads lie further apart.
    k_all, v_all = torch.full((2, num_kv, 60, head_dim), 7.0, device=kind.device, dtype=kind.dtype)
    k_buffer, v_buffer = k_all[:, :30], v_all[:, :30]
    place = torch.tensor([at], device=kind.device)
    q = layer.rotate_append(heads, turn.cos, turn.sin, scale, k_buffer, v_buffer, place, eps=EPS)

    qk = heads[:, : num_q + num_kv]
    qk = rope.rotate(qk if scale is None else layers.rms_norm(qk, scale, EPS), turn)
    kept = max(0, min(num_tokens, 30 - at))
    expected_k, expected_v = torch.full_like(k_all, 7.0), torch.full_like(v_all, 7.0)
    expected_k[:, at : at + kept] = qk[:kept, num_q:].transpose(0, 1)
    expected_v[:, at : at + kept] = heads[:kept, num_q + num_kv :].transpose(0, 1)
    assert torch.equal(v_all, expected_v)
    assert q.is_contiguous()
    for found, expected in ((q, qk[:, :num_q]), (k_all, expected_k)):
        if has_norm or kind.dtype == torch.float32:
            # A turned rounding of either term, relative to the head's greatest number; products of
            # single precision are rounded, or not, before they are added.
            limit = 4 * max(kind.rounding, 1e-6) * float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=limit, rtol=0)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("has_norm", [False, True])
def test_tokens_with_buffers_of_their_own_are_as_each_alone(kind: Kind, has_norm: bool) -> None:
    """Buffers of different lengths, of which the last has no row left."""
    num_kv, dim, places, rows = 2, 64, (3, 0, 9), (20, 6, 9)
    heads = kind.normal(3, 6 + 2 * num_kv, dim, seed=0)
    scale = kind.scale(6 + num_kv, dim, seed=1) if has_norm else None
    turn = turn_of(kind, 3, dim)
    at = [torch.tensor([place], device=kind.device) for place in places]
    pairs = [kind.normal(2, num_kv, count, dim, seed=count) for count in rows]
    wanted = [pair.clone() for pair in pairs]
    buffers = [(pair[0], pair[1], own) for pair, own in zip(pairs, at, strict=True)]
    rooms = rotary.rooms_of(heads, buffers)
    q = layer.rotate_append_each(heads, *turn, scale, rooms, num_kv_heads=num_kv, eps=EPS)
    for t, pair in enumerate(wanted):
        own, cos, sin = (x[t : t + 1].contiguous() for x in (heads, turn.cos, turn.sin))
        k, v = pair.unbind(0)
        alone = layer.rotate_append(own, cos, sin, scale, k, v, at[t], eps=EPS)
        assert torch.equal(q[t : t + 1], alone)
        assert torch.equal(pairs[t], pair)
    assert not torch.equal(pairs[0], kind.normal(2, num_kv, rows[0], dim, seed=rows[0]))
    with pytest.raises(ShapeMismatch, match="rooms"):
        layer.rotate_append_each(heads, *turn, scale, rooms[:2], num_kv_heads=num_kv, eps=EPS)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's, where a GPU has infinity
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 1536), (3, 1), (16, 513), (3, 14336)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(kind: Kind, num_rows: int, dim: int, activation: Activation) -> None:
    gate_up = 3.0 * kind.normal(num_rows, 2 * dim, seed=dim)
    gate_up[0, 0] = -200.0  # exp overflows: the gate is shut

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return gate_up

    weights = _gate_weights()
    found = layer.gate(gate_up, activation)
    exact = layers.gated(gate_up, weights, activation, product, exact=True)
    kind.assert_near(found, exact, roundings=2)
    expected = layers.gated(gate_up, weights, activation, product)
    # torch's tanh loses what is left of a gate far below zero.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2 * max(kind.rounding, 1e-6))


def _gate_weights() -> LayerWeights:
    """A layer of which only the (absent) gate is asked."""
    no = torch.empty(0)
    return LayerWeights(
        attn_norm=no, qkv=no, qkv_bias=None, qk_norm=None, o=no, o_bias=None, post_attn_norm=None,
        mlp_norm=no, gate_up=no, gate_up_bias=None, down=no, down_bias=None, post_mlp_norm=None,
    )  # fmt: skip


@pytest.mark.parametrize(("num_rows", "dim", "inner"), [(1, 96, 576), (3, 65, 80), (17, 130, 257)])
@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_small_linear(
    kind: Kind, num_rows: int, dim: int, inner: int, block_n: int, has_bias: bool
) -> None:
    x, weight = kind.normal(num_rows, inner, seed=0), kind.normal(dim, inner, seed=1)
    bias = kind.normal(dim, seed=2) if has_bias else None
    found = layer.small_linear(x, weight, bias, tile=layer.TILES[block_n])
    wide = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    limit = max(kind.rounding, 1e-6) * (1.0 + float(wide.abs().max()))
    torch.testing.assert_close(found, wide.to(kind.dtype), atol=limit, rtol=0)


@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_rows_of_a_product_do_not_know_of_each_other(kind: Kind, block_n: int) -> None:
    x, weight = kind.normal(64, 576, seed=0), kind.normal(96, 576, seed=1)
    tile = layer.TILES[block_n]
    # The interpreter multiplies with the CPU's own product, which does know of the padding.
    all_rows = layer.small_linear(x if HAS_GPU else x[:16], weight, tile=tile)
    for num_rows in (1, 3, 16, 33) if HAS_GPU else (1, 3, 16):
        found = layer.small_linear(x[:num_rows], weight, tile=tile)
        assert torch.equal(found, all_rows[:num_rows])


def test_tiles_follow_columns() -> None:
    assert [layer.tile_for(n).block_n for n in (1, 4096, 8191, 8192, 16384, 128256)] == [
        16, 16, 16, 32, 64, 64,
    ]  # fmt: skip


def test_what_does_not_fit_is_refused(kind: Kind) -> None:
    x, weight = kind.normal(3, 64, seed=0), kind.scale(64, seed=1)
    with pytest.raises(ShapeMismatch, match="model dim: 8193, at most 8192"):
        layer.add_rms_norm(kind.normal(1, 8193, seed=0), None, weight, eps=EPS)
    with pytest.raises(ShapeMismatch, match=r"branch: \(2, 64\), .* expected \(3, 64\)"):
        layer.add_rms_norm(x, x[:2], weight, eps=EPS)
    with pytest.raises(AttentionError, match=r"weight: .*, expected torch.float32"):
        layer.add_rms_norm(x, None, weight.double(), eps=EPS)
    with pytest.raises(ShapeMismatch, match=r"x: .*contiguous"):
        layer.add_rms_norm(x.t(), None, weight, eps=EPS)
    with pytest.raises(AttentionError, match=r"gate_up: torch.float64"):
        layer.gate(x.double(), "silu")
    with pytest.raises(ShapeMismatch, match="columns and activation: 63"):
        layer.gate(x[:, :63].contiguous(), "silu")
    with pytest.raises(ShapeMismatch, match="rows: 65, at most 64"):
        layer.small_linear(kind.normal(65, 64, seed=0), x)
    with pytest.raises(ShapeMismatch, match="bias"):
        layer.small_linear(x, x, x[0])


def test_heads_that_do_not_fit_are_refused(kind: Kind) -> None:
    heads, buffer = kind.normal(2, 4, 64, seed=0), kind.normal(1, 9, 64, seed=1)
    turn, at = turn_of(kind, 2, 64), torch.zeros(1, dtype=torch.int64, device=kind.device)
    with pytest.raises(ShapeMismatch, match="key and value buffers"):
        layer.rotate_append(heads, *turn, None, buffer, buffer[..., ::2], at, eps=EPS)
    with pytest.raises(ShapeMismatch, match="query heads and head dim: 0, 64"):
        layer.rotate_append(heads[:, :2].contiguous(), *turn, None, buffer, buffer, at, eps=EPS)
    with pytest.raises(AttentionError, match=r"at: torch.int32"):
        layer.rotate_append(heads, *turn, None, buffer, buffer, at.int(), eps=EPS)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="graphs are of GPUs")
def test_a_layer_is_captured() -> None:
    """Everything in one graph; `at` moves between its replays."""
    kind = Kind(device="cuda", dtype=torch.bfloat16)
    x, branch = kind.normal(3, 512, seed=0), kind.normal(3, 512, seed=1)
    weight, matrix = kind.scale(512, seed=2), kind.normal(6 * 64, 512, seed=3)
    turn, at = turn_of(kind, 3, 64), torch.zeros(1, dtype=torch.int64, device="cuda")
    k_buffer, v_buffer = torch.zeros(2, 1, 9, 64, device="cuda", dtype=kind.dtype)

    def run() -> Tensor:
        _, normed = layer.add_rms_norm(x, branch, weight, eps=EPS)
        heads = layer.small_linear(normed, matrix).view(3, 6, 64)
        q = layer.rotate_append(heads, *turn, None, k_buffer, v_buffer, at, eps=EPS)
        return layer.gate(q.view(3, -1), "silu")

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    at.fill_(6)
    graph.replay()
    assert torch.equal(found, expected)
    assert torch.equal(k_buffer[:, 6:], k_buffer[:, :3])
    assert not v_buffer[:, 3:6].any()
