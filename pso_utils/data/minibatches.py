"""What each optimizer step is trained on: pairs of clean latents, with their draws of the epoch and their prompts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pso_utils.data.images import draw_noise, draw_timestep_uniform
from pso_utils.data.latent_cache import LatentBatch, LatentCache, encoded_minibatches
from pso_utils.data.loader import PairLoader
from pso_utils.data.prompt_cache import PromptCache
from pso_utils.data.references import ReferenceLatents
from pso_utils.families import Family
from pso_utils.families.denoising import NoisedPairs


class PairMinibatch(NamedTuple):
    """This process's pairs of one optimizer step."""

    microbatches: list[NoisedPairs]  # none of them empty; there may be none
    num_broken: int  # records that were left out because an image is broken
    end: int  # how many records of the epoch are done after it, where a resumed run starts


@dataclass(frozen=True, kw_only=True)
class TrainingPairs:
    """The minibatches of a `PairLoader` as the losses take them.

    Attributes:
        cache: the latents of the loader's records; None: each image passes through the VAE where it is read.
        references: of records that are targets alone; None: records bring their own.
        takes_references: whether the loss does; else the pairs are the targets alone.
        class_prompt: of a third row; None: there is none.
    """

    family: Family
    loader: PairLoader
    embed: PromptCache
    cache: LatentCache | None = None
    references: ReferenceLatents | None = None
    takes_references: bool = True
    class_prompt: str | None = None

    def minibatches(self, epoch: int, start: int = 0) -> Iterator[PairMinibatch]:
        """Those of an epoch from its record `start` on; raises as `PairLoader.minibatches`. References are those that
        are current when a minibatch is asked for."""
        if self.cache is None:
            latent_minibatches = encoded_minibatches(self.family, self.loader, epoch, start)
        else:
            latent_minibatches = self.cache.minibatches(epoch, start)
        for minibatch in latent_minibatches:
            microbatches, num_broken = [], 0
            with self.family.parts_loaded():  # what is offloaded moves at most once a minibatch
                for batch in minibatch.microbatches:
                    num_broken += batch.num_broken
                    if batch.ids:
                        microbatches.append(self._pairs(batch, epoch))
            yield PairMinibatch(microbatches, num_broken, minibatch.end)

    def _pairs(self, batch: LatentBatch, epoch: int) -> NoisedPairs:
        latents, captions = [batch.targets], list(batch.captions)
        if self.takes_references:
            references = batch.references
            if self.references is not None:
                indices = self.references.indices_of(batch.ids, epoch=epoch)
                references = self.references(indices, batch.flipped.tolist())
            latents.append(references)
            captions += batch.captions
            if self.class_prompt is not None:
                latents.append(references)
                captions += [self.class_prompt] * len(batch.ids)
        conditioning = self.family.collate(
            self.embed(captions),
            self.loader.resolution,
            self.loader.resolution,
            original_sizes=batch.original_sizes.repeat(len(latents), 1),
            crop_top_lefts=batch.crop_top_lefts.repeat(len(latents), 1),
        )
        draws = {"seed": self.loader.seed, "epoch": epoch}
        noise = draw_noise(batch.ids, batch.targets.shape[1:], **draws).to(self.family.device)
        uniform = draw_timestep_uniform(batch.ids, **draws).to(self.family.device)
        return NoisedPairs(torch.stack(latents), noise, uniform, conditioning)
