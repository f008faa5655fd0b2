"""Owns the random numbers of sampling: Philox4x32-10, a function of (seed, counter) and no state.

Called by the sampler once per drawn token. Never depends on how often or in which order it was
called, so a token's draw is the same alone, in a batch and after a preemption.

Plain integers, because np.random.Philox needs 40 us to be set to a counter and this needs 5.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

_M32 = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns four random 32-bit words for a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd & _M32, (even >> 32) ^ c3 ^ k1, even & _M32
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """Returns a number in [0, 1) with 52 random bits; `seed` is taken modulo 2**64.

    52 and not 53, so that `uniform * x < x` also after rounding, for every normal x above 0.
    """
    low, high, _, _ = philox((index & _M32, index >> 32, 0, 0), (seed & _M32, seed >> 32 & _M32))
    return ((high << 32 | low) >> 12) * 2.0**-52
