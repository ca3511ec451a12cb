"""Random numbers as a pure function of (seed, purpose, position): counter-based Philox 4x32-10.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Position is the global, never-reset index of an
image in the run (or in a set of samples), so a resumed run, or one on another world size, draws the same numbers,
and no generator state is ever saved.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Ten rounds; words are int64 tensors that hold 32 bits, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 has no room for it in one piece."""
    a_high, a_low = a >> 16, a & 0xFFFF
    low_part = b * a_low  # at most 48 bits
    high_part = b * a_high
    middle = (low_part >> 16) + (high_part & 0xFFFF)
    low = ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)
    high = (high_part >> 16) + (middle >> 16)
    return high & _MASK, low


def _words(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """(B, count) words of 32 bits for each position."""
    name = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = (int.from_bytes(name[:4], "little"), int.from_bytes(name[4:], "little"))
    positions = positions.to(torch.int64)[:, None]  # (B, 1)
    block = torch.arange(-(-count // 4), device=positions.device)[None, :]  # (1, ceil(count / 4))
    zero = torch.zeros_like(block)
    words = philox((block, zero, positions & _MASK, (positions >> 32) & _MASK), key)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]


def stream_seed(seed: int, purpose: str, position: int) -> int:
    """A seed for torch's own generator, where a layer such as dropout draws for itself."""
    name = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(name, "little")


def sample(seed: int, purpose: str, population: int, count: int) -> Tensor:
    """(count,) int64, ascending: a random sample of range(population) without replacement.

    Those whose numbers of 63 bits are the smallest, so that a smaller sample of one seed is part of a larger one.
    """
    if count >= population:
        return torch.arange(population)
    drawn = []
    for part in torch.arange(population).split(1 << 20):
        words = _words(seed, purpose, part, 2)
        drawn.append((words[:, 0] << 31) | (words[:, 1] >> 1))
    order = torch.cat(drawn).argsort(stable=True)
    return order[:count].sort().values


def uniform(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """(B, count) float32 in the open interval (0, 1) for `positions` (B,)."""
    return ((_words(seed, purpose, positions, count) >> 9).float() + 0.5) * 2.0**-23


def normal(seed: int, purpose: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float32 standard normal for `positions` (B,), by Box-Muller."""
    count = math.prod(shape)
    pairs = uniform(seed, purpose, positions, 2 * -(-count // 2)).view(len(positions), 2, -1)
    radius = (-2.0 * pairs[:, 0].log()).sqrt()
    angle = 2.0 * math.pi * pairs[:, 1]
    both = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten(1)
    return both[:, :count].view(len(positions), *shape)
