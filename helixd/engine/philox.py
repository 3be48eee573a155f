"""Philox4x32-10, the counter-based random generator of sampling, on plain integers.

The numbers depend on (seed, choice, position) only, so a position drawn again anywhere, on any device, in any batch
gets the same ones. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit numbers for a 128-bit counter and a 64-bit key, given as 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits. The seed keys the generator; choice and position are its counter."""
    key = (seed & _MASK, seed >> 32 & _MASK)
    counter = (position & _MASK, position >> 32 & _MASK, choice & _MASK, choice >> 32 & _MASK)
    a, b, _, _ = philox4x32(counter, key)
    return ((a >> 5) * (1 << 26) + (b >> 6)) / (1 << 53)
