"""Latents on disk, so that each image passes through the VAE once."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def fingerprint(*modules) -> str:
    """A hash of modules' weights and precision: what was computed by others is not taken for theirs."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def text_key(text_encoders: str, prompt: str) -> str:
    """The key of a prompt's embeddings, by the text encoders' `fingerprint`."""
    return hashlib.sha256(f"{text_encoders} {prompt}".encode()).hexdigest()


class TensorCache:
    """Tensors in files under `folder`, by a key; written whole or not at all."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        path = self.path(key)
        return load_file(path) if path.is_file() else None

    def put(self, key: str, tensors: dict[str, Tensor]):
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # two processes may write the same one
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)


class LatentCache:
    """`encode` with a memory on disk, keyed by an image's pixels and by the VAE (`fingerprint`)."""

    def __init__(self, folder, encode: Callable[[Tensor], Tensor], vae_fingerprint: str):
        self.cache, self.encode, self.vae_fingerprint = TensorCache(folder), encode, vae_fingerprint

    def __call__(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1], on the device that `encode` returns."""
        keys = [self.key(image) for image in pixels]
        cached = [self.cache.get(key) for key in keys]
        missing = [index for index, entry in enumerate(cached) if entry is None]
        if missing:
            for index, latents in zip(missing, self.encode(pixels[missing]).cpu()):
                cached[index] = {"latents": latents}
                self.cache.put(keys[index], cached[index])
        return torch.stack([entry["latents"] for entry in cached])

    def key(self, pixels: Tensor) -> str:
        """Of an image [3, H, W], by its 8-bit values."""
        digest = hashlib.sha256(f"{self.vae_fingerprint} {tuple(pixels.shape)}".encode())
        digest.update((pixels * 127.5 + 127.5).round().byte().contiguous().numpy())
        return digest.hexdigest()
