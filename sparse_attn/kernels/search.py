"""The benefit at which a budget of keys runs out, found without sorting.

Benefits are non-negative floats, whose bits are ordered as they are: the search is for an integer.
Units and their keys are counted together, in one number; a step of the search is one exchange
between the threads of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_AT_ONCE = 2048  # units held on the chip; of more, the rest is read again for every step
OCTAVE = tl.constexpr(1 << 23)  # in the bits of a float


def shift_of(num_units: int, num_keys: int) -> int:
    """SHIFT of `packed`: bits for so many keys, of 32 where so many units fit beside them."""
    bits = max(1, num_keys.bit_length())
    return bits if num_units.bit_length() + bits <= 31 else 32


@triton.jit
def add_three(a, b, c, other_a, other_b, other_c):
    """The sum of two triples."""
    return a + other_a, b + other_b, c + other_c


@triton.jit
def packed(numbers, SHIFT: tl.constexpr):
    """One unit, and `numbers` of what it holds, as one integer: their sums are sums of both."""
    return numbers + (1 << SHIFT) if SHIFT < 32 else numbers.to(tl.int64) + (1 << SHIFT)


@triton.jit
def low_part(x, SHIFT: tl.constexpr):
    """The sum of what units hold, of a sum of `packed`."""
    return (x & ((1 << SHIFT) - 1)).to(tl.int32)


@triton.jit
def units_at(bits_at, sizes_at, start, count, BLOCK: tl.constexpr):
    """(benefit, keys) of BLOCK units from `start` on, whose benefits were written down."""
    unit = start + tl.arange(0, BLOCK)
    is_unit = unit < count
    bits = tl.load(bits_at + unit, mask=is_unit, other=-1)
    return bits, tl.load(sizes_at + unit, mask=is_unit, other=0)


@triton.jit
def sums_from(
    bits, own, bits_at, sizes_at, count, level_a, level_b, level_c,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """`packed` sums of the units whose benefit is at least each of three levels; `bits` and `own`
    are those of the first BLOCK.
    """
    a = tl.where(bits >= level_a, own, 0)
    b = tl.where(bits >= level_b, own, 0)
    c = tl.where(bits >= level_c, own, 0)
    for start in range(BLOCK, count, BLOCK):
        more, sizes = units_at(bits_at, sizes_at, start, count, BLOCK)
        keys = packed(sizes, SHIFT)
        a += tl.where(more >= level_a, keys, 0)
        b += tl.where(more >= level_b, keys, 0)
        c += tl.where(more >= level_c, keys, 0)
    return tl.reduce((a, b, c), 0, add_three)


@triton.jit
def search_keys(
    bits, own, bits_at, sizes_at, count, greatest, all_own, limit,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(lowest benefit whose units all fit, the benefit at which the limit falls, their keys, units
    at that benefit), of units with the sum all_own and benefits up to `greatest`.

    The second is -1, which no unit has, where every unit fits. Steps cut the range between the two
    at three places, in turn evenly and close about where the keys should run out; it is over where
    a single unit is left in it, which does not fit.
    """
    at_low = all_own
    at_high = at_low * 0
    low = -1
    high = 0
    if low_part(at_low, SHIFT) <= limit:
        at_high = at_low
    else:
        low = 0
        high = greatest + 1
        level_a = tl.maximum(high - 8 * OCTAVE, 1)
        level_b = tl.maximum(high - 4 * OCTAVE, 2)
        level_c = tl.maximum(high - 2 * OCTAVE, 3)
        is_close = 1
        while (high - low > 1) & ((at_low >> SHIFT) - (at_high >> SHIFT) > 1):
            a, b, c = sums_from(
                bits, own, bits_at, sizes_at, count, level_a, level_b, level_c, BLOCK, SHIFT
            )  # fmt: skip
            if low_part(c, SHIFT) > limit:
                low = level_c
                at_low = c
            elif low_part(b, SHIFT) > limit:
                low = level_b
                at_low = b
                high = level_c
                at_high = c
            elif low_part(a, SHIFT) > limit:
                low = level_a
                at_low = a
                high = level_b
                at_high = b
            else:
                high = level_a
                at_high = a
            width = high - low
            step = (width + 3) // 4
            level_b = low + 2 * step
            if is_close == 1:
                keys = low_part(at_high, SHIFT)
                held = tl.maximum(low_part(at_low, SHIFT) - keys, 1)
                share = (limit - keys).to(tl.float32) / held.to(tl.float32)
                level_b = high - (share * width.to(tl.float32)).to(tl.int32)
                step = (width + 15) // 16
            last = tl.maximum(high - 1, low + 1)
            level_b = tl.minimum(tl.maximum(level_b, low + 1), last)
            level_a = tl.maximum(level_b - step, low + 1)
            level_c = tl.minimum(level_b + step, last)
            is_close = 1 - is_close
    num_left = (at_low >> SHIFT) - (at_high >> SHIFT)
    return high, low, low_part(at_high, SHIFT), num_left
