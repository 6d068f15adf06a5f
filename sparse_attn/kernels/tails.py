"""The sample of what a step of one query left unread: launches of `sample.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from sparse_attn.estimate import MAX_LOG_RATIO, UNIFORM_SHARE, Missed
from sparse_attn.kernels.sample import bound_kernel, sample_kernel

_TILE = 64


def sample_unread(
    q: Tensor,
    k: Tensor,
    scales: Tensor | None,
    lists: Sequence[Tensor],
    lse_read: Tensor,
    *,
    scale: float,
    num_strata: int,
    generator: torch.Generator,
) -> Missed:
    """What one query [1, H, D] missed; lists: tables [G, 8] (`sample.LIST_COLUMNS`); lse_read [1,
    H].

    k: [N, D]; scales: [G, 2] where k is in e4m3; generator: of q's device.
    `estimate.sample_missed` is the definition.
    """
    num_problems, (_, num_heads, head_dim) = lists[0].shape[0], q.shape
    per_group, draws = num_heads // num_problems, 2 * num_strata
    table = torch.stack(list(lists), dim=1).contiguous()
    shape = (2, num_heads, draws)
    uniform = torch.rand(shape, generator=generator, device=q.device)
    mean, variance, most = torch.empty(3, 1, num_heads, device=q.device)
    sample_kernel[per_group, num_problems](
        q, k, lse_read if scales is None else scales, table, uniform, lse_read, mean, variance,
        scale,
        P=per_group, D=head_dim, NUM_LISTS=len(lists), DRAWS=draws,
        TILE=_TILE, UNIFORM=UNIFORM_SHARE, MAX_RATIO=MAX_LOG_RATIO,
        IS_SCALED=scales is not None,
    )  # fmt: skip
    bound_kernel[(num_problems,)](
        q, table, most, scale, P=per_group, D=head_dim, NUM_LISTS=len(lists), TILE=_TILE,
        BLOCK_R=max(16, triton.next_power_of_2(per_group)),
    )  # fmt: skip
    return Missed(mean, variance, most)
