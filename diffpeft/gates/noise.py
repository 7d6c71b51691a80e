"""Counter-based random numbers: each follows from a seed and a position alone, on any device, and is stored nowhere."""

import torch
from torch import Tensor

NOISE_MARGIN = 1e-4
"""The noise is uniform on (NOISE_MARGIN, 1 - NOISE_MARGIN), which keeps logit(u) finite."""


def new_seed() -> Tensor:
    """A seed, int64, shape (2,), from torch's default generator, whose state a checkpoint restores."""
    return torch.randint(1 << 62, (2,), device="cpu")


def seed_words(seed: Tensor, device: torch.device) -> Tensor:
    """A seed of [`new_seed`] as [`uniform`] takes it: int32, shape (4,), on `device`."""
    return seed.view(torch.int32).to(device)


def random_bits(seed: Tensor, positions: Tensor) -> Tensor:
    """32 random bits at each position (int32, any shape) of a seed's stream: int32, shape of `positions`.

    Three numbers of the seed, which is one of [`seed_words`], choose the stream: an odd factor and an offset of the
    position, and what is mixed in on the way. The mixer is that of MurmurHash3 with Chris Wellons' constants
    ("lowbias32", hash prospector).
    """
    x = positions * (seed[0] | 1) + seed[1]
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ seed[2]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def uniform(seed: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in (NOISE_MARGIN, 1 - NOISE_MARGIN) from [`random_bits`]: fp32, shape of `positions`."""
    fraction = ((random_bits(seed, positions) >> 8) & 0xFFFFFF).to(torch.float32)
    return fraction * (2.0**-24 * (1 - 2 * NOISE_MARGIN)) + NOISE_MARGIN
