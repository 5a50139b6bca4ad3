"""What the text encoders make of prompts, so that each is encoded once."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.logging import get_logger

from pso_utils.data.latent_cache import TensorCache
from pso_utils.families import Conditioning, Family


logger = get_logger(__name__)

# Prompts that are encoded at once, always so many (the last are repeated): a row of a batch has the same bits whatever
# the other rows, but not in a batch of another size, and a resumed run is to see what the interrupted one saw.
BATCH_SIZE = 8


class PromptCache:
    """Encodes each prompt once and keeps the last ones in CPU memory.

    Args:
        max_bytes: of what is kept (SDXL's take about 0.3 MB each in half precision; other families' up to 30).
        store: keeps them on disk, too; then the text encoders are only needed for prompts that are not there.
    """

    def __init__(self, family: Family, *, max_bytes: int = 2**31, store: TensorCache | None = None):
        self.family, self.max_bytes, self.store = family, max_bytes, store
        self._origin = json.dumps(family.origin)
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompts: Sequence[str]) -> list[Conditioning]:
        """A conditioning of each prompt, on the CPU, without a batch dimension."""
        rows = {prompt: self._kept.get(prompt) or self._read(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in rows.items() if row is None]
        with self.family.parts_loaded():
            for start in range(0, len(missing), BATCH_SIZE):
                batch = missing[start : start + BATCH_SIZE]
                padded = batch + batch[-1:] * (BATCH_SIZE - len(batch))
                for prompt, row in zip(batch, self.family.encode_prompts(padded)):
                    rows[prompt] = row.to("cpu", copy=True)  # not a view that keeps its whole batch
                    if self.store is not None:
                        self.store.put(self._key(prompt), rows[prompt])
        for prompt, row in rows.items():
            self._keep(prompt, row)
        return [rows[prompt] for prompt in prompts]

    def encode_all(self, prompts: Sequence[str], accelerator: Accelerator) -> None:
        """Encodes all prompts to the store, each process its part, and gives the text encoders' memory back; all
        processes call it."""
        own = list(dict.fromkeys(prompts))[accelerator.process_index :: accelerator.num_processes]
        for start in range(0, len(own), BATCH_SIZE):
            self(own[start : start + BATCH_SIZE])
        accelerator.wait_for_everyone()
        self.family.free_text_encoders()
        logger.info(f"--cache_prompts: {len(set(prompts))} prompts are encoded, and the text encoders are gone")

    def _keep(self, prompt: str, row: Conditioning):
        if prompt not in self._kept:
            self._bytes += row.nbytes
        self._kept[prompt] = row
        self._kept.move_to_end(prompt)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def _read(self, prompt: str) -> Conditioning | None:
        entry = None if self.store is None else self.store.get(self._key(prompt))
        return None if entry is None else Conditioning(entry)

    def _key(self, prompt: str) -> str:
        encoding = f"{self._origin} {self.family.max_sequence_length}"
        return hashlib.sha256(f"{encoding} {prompt}".encode()).hexdigest()
