"""Random numbers that are functions of a key alone, such as (seed, epoch, prompt, sample): the same whatever the batch,
the number of processes or the device, and after an interruption."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


Key = tuple[int, ...]


def keyed_seed(key: Key) -> int:
    """The key's seed of a generator: 64 bits of its SHA-256."""
    digest = hashlib.sha256(",".join(str(int(part)) for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def keyed_noise(keys: Sequence[Key], shape: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise [len(keys), *shape], float32. Drawn on the CPU from one generator per key, seeded by the
    key's SHA-256 (of which torch's CPU generator uses 32 bits)."""
    noise = torch.empty(len(keys), *shape)
    for row, key in zip(noise, keys):
        torch.randn(tuple(shape), generator=torch.Generator().manual_seed(keyed_seed(key)), out=row)
    return noise.to(device)


def keyed_uniform(keys: Sequence[Key], shape: Sequence[int] = ()) -> Tensor:
    """Uniform draws [len(keys), *shape] in [0, 1), float32, on the CPU."""
    # From normal to uniform; float32 rounds a draw of more than five deviations to 1.
    return torch.special.ndtr(keyed_noise(keys, shape)).clamp(max=1 - 2**-24)


def keyed_permutation(key: Key, length: int) -> Tensor:
    """A permutation [length] of 0 to length - 1, long, on the CPU."""
    return keyed_noise([key], (length,))[0].argsort(stable=True)
