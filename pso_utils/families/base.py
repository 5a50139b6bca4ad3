"""The adapter between the training code and a family of pipelines.

What is trained and compared goes through a `Family`: latents are [B, C, h, w] float32 everywhere outside an adapter,
and no script or loss knows what a conditioning holds.

To add a family, write a subclass in a file of its own and name it in `pso_utils.families.FAMILIES`, by the class that
its pipelines' model_index.json states. Derive it from `FlowFamily` or `PackedFamily` in flow.py or `UNetFamily` in
unet.py where one fits. Models to follow: stable_diffusion_3.py (all prompts of one length), qwen_image.py (ragged
ones), flux.py (packed latents). It sets the class attributes below and defines

- `_encode`: what the pipeline's own `encode_prompt` makes of each prompt, one `Conditioning` each, in the dtype that it
  gives. Ragged prompts come with a `prompt_mask` of ones, which `flow.ragged` makes: a batch is padded with zeros at
  the end of the first dimension, the mask too.
- `predict`: the model call of the pipeline's denoising loop, with its dtypes and order of operations, from float32
  latents [B, C, h, w] and timesteps [B] to the output that the scheduler is given, [B, C, h, w]. The timesteps are the
  scheduler's own, float32: under flow matching from 1000 to 0, not divided.
- `pipeline_inputs`: a batch as the pipeline's call takes it, for what is drawn as it is deployed.
- `size_multiple`, unless the class it derives from has it;

and, where the pipeline differs: `_prompt_limit` (where prompts are cut off), `schedule_arguments` (what it passes to
`set_timesteps`), `call_arguments`, `collate`, `latent_shape` and `unpack` (where the loop's latents are packed),
`encode_images` and `decode_latents` (where the VAE's class is not in `families/vae.py`), `default_lora_targets` (where
they depend on the model's size), `check_size` (`most_patches` in flow.py), `lora_format` (where ComfyUI has the model).

Beware of the double shift: where a pipeline passes no sigmas, FlowMatchEulerDiscreteScheduler makes them from its own,
which a static `shift` has shifted, and shifts them again; the last step then starts from next to no noise.
`passes_sigmas` in flow.py passes them at the call, too, and says so in the model card.

tests/families/cases holds what its tests need: a tiny pipeline with random weights, named in CASES there, on which
tests/families/test_every_family.py holds the adapter against diffusers itself. Run

    pytest tests/families/test_every_family.py tests/families/test_family_scripts.py -k NAME

and add the checkpoint to the README's table "Which models".
"""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import ClassVar, NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import free_memory, offload_models
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pso_utils.errors import UserError
from pso_utils.families import lora, vae
from pso_utils.families.lora import ToolFormat
from pso_utils.keyed_rng import keyed_seed
from pso_utils.schedules import draws_global_noise


logger = logging.getLogger(__name__)


class Conditioning(dict[str, Tensor]):
    """What the denoiser takes beside latents and timesteps: tensors by name, of one prompt without a batch dimension,
    or of a batch [B, ...]."""

    def rows(self, index: Tensor | slice) -> "Conditioning":
        """The rows `index` of a batch."""
        return Conditioning({name: tensor[index] for name, tensor in self.items()})

    def repeat(self, count: int) -> "Conditioning":
        """The whole batch, `count` times."""
        return Conditioning({name: torch.cat([tensor] * count) for name, tensor in self.items()})

    def repeat_interleave(self, count: int) -> "Conditioning":
        """Each row `count` times."""
        return Conditioning({name: tensor.repeat_interleave(count, dim=0) for name, tensor in self.items()})

    def to(self, device: str | torch.device, *, copy: bool = False) -> "Conditioning":
        return Conditioning({name: tensor.to(device, copy=copy) for name, tensor in self.items()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values())

    @staticmethod
    def cat(batches: Sequence["Conditioning"]) -> "Conditioning":
        return Conditioning({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})

    @staticmethod
    def stack(conditionings: Sequence["Conditioning"]) -> "Conditioning":
        """Those of single prompts as a batch; tensors of unlike lengths are padded with zeros at the end."""
        return Conditioning(
            {name: pad_sequence([row[name] for row in conditionings], batch_first=True) for name in conditionings[0]}
        )


class Deployment(NamedTuple):
    """How images are drawn with the result: `num_inference_steps` or `timesteps`, `eta` (None where the pipeline hands
    none to its scheduler), and the images' size in pixels."""

    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    eta: float | None
    height: int
    width: int


class GuidanceScales(NamedTuple):
    """What a pipeline's `guidance_scale` means."""

    off: float  # without classifier-free guidance: a value up to `most`, the one that the models' cards use
    most: float  # above this it is classifier-free guidance
    embedded: float | None = None  # the default of models that take the scale as an input


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the warnings of diffusers and transformers."""
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [logging.get_verbosity() for logging in loggings]
    try:
        for logging in loggings:
            logging.set_verbosity_error()
        yield
    finally:
        for logging, verbosity in zip(loggings, verbosities):
            logging.set_verbosity(verbosity)


class Family(ABC):
    """A loaded, frozen pipeline, and what differs between families.

    Args:
        pipeline: of the class `pipeline_class`, in evaluation mode, without LoRA.
        device: where the model runs. The denoiser is moved there by who prepares it.
        guidance_scale: embedded guidance, an input of the model; None: the family's default.
        max_sequence_length: tokens of a prompt, for pipelines that take it; None: the family's default.
        offload: whether text encoders and VAE are on the CPU except where they are used.
        vae_batch_size: images that the VAE takes at once.

    Attributes:
        origin: all that latents and embeddings depend on, JSON; what is kept on disk is another one's where it differs.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_class: ClassVar[type[ModelMixin]]
    denoiser_name: ClassVar[str]  # of the pipeline's part that is trained: "unet" or "transformer"
    vae_class: ClassVar[type[ModelMixin]] = AutoencoderKL
    text_encoder_classes: ClassVar[dict[str, tuple[type, type]]]  # part -> its class and its configuration's
    unused_parts: ClassVar[tuple[str, ...]] = ()  # of the pipeline, left out: they have no part in drawing latents
    scheduler_values: ClassVar[dict] = {}  # what the pipeline sets in its scheduler's configuration when it is made
    only_scheduler: ClassVar[type[SchedulerMixin] | None] = None  # set only where the loop breaks with others
    guidance_scales: ClassVar[GuidanceScales]
    max_sequence_length: ClassVar[int | None] = None  # tokens of a prompt, as deployed; None: not a setting
    longest_sequence: ClassVar[int] = 512  # above this the pipeline refuses a `max_sequence_length`
    card_tags: ClassVar[list[str]]  # the hub's names of the family, as other LoRA of it have them; for the model card
    card_dtype: ClassVar[str] = "bfloat16"  # of the model card's code, on a GPU
    # Ends of the names of the denoiser's modules that get LoRA unless told otherwise; see `default_lora_targets`.
    lora_targets: ClassVar[list[str]]
    # A denoiser that --distilled_unet or --distilled_transformer puts in place of the pipeline's must have the same
    # values of these in its configuration: sizes that latents and embeddings depend on.
    conditioning_keys: ClassVar[tuple[str, ...]]
    upcasts_vae: ClassVar[bool] = False  # whether the pipeline decodes in float32 where its VAE says `force_upcast`
    lora_format: ClassVar[ToolFormat | None] = None  # of other tools; None: none is known to read its LoRA
    batch_norm_eps: ClassVar[float | None] = None  # of AutoencoderKLFlux2's latents; None: its configuration's

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        device: str | torch.device = "cpu",
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
        offload: bool = False,
        vae_batch_size: int = 4,
    ):
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.device = torch.device(device)
        self.guidance_scale = self.checked_guidance(self.denoiser.config, guidance_scale)
        if max_sequence_length is not None:
            self.max_sequence_length = max_sequence_length
        self.offload_text_encoders = self.offload_vae = offload
        self.vae_batch_size = vae_batch_size
        self.lora_layers: list = []
        # parts that diffusers must be told to leave out: the unused ones, and what the pipeline was saved without
        absent = [name for name, part in pipeline.components.items() if part is None]
        self.absent_parts = [
            name for name in absent if name in self.unused_parts or name not in pipeline._optional_components
        ]
        self._warned_of_long_prompts = False
        self.origin: dict = {}
        self._loaded_parts: ExitStack | None = None
        self._drawer = _without_text_encoders(pipeline)

    # ---- What the configuration files alone tell ----

    @classmethod
    def check_pipeline(cls, model_index: dict) -> None:
        """Raises UserError where model_index.json tells that the pipeline is none that can be tuned here."""
        return

    @classmethod
    def embeds_guidance(cls, denoiser_config: dict) -> bool:
        """Whether the guidance scale is an input of the model."""
        return False

    @classmethod
    def checked_guidance(cls, denoiser_config: dict, guidance_scale: float | None) -> float:
        """The guidance scale in force.

        Raises:
            UserError: `guidance_scale` asks for classifier-free guidance, under which a sample's density is unknown.
        """
        scales = cls.guidance_scales
        if cls.embeds_guidance(denoiser_config):
            return scales.embedded if guidance_scale is None else guidance_scale
        if guidance_scale is not None and guidance_scale > scales.most:
            raise UserError(
                f"--guidance_scale {guidance_scale}: the model takes no guidance embedding, and PSO tunes without"
                " classifier-free guidance: drop the flag"
            )
        return scales.off if guidance_scale is None else guidance_scale

    @classmethod
    @abstractmethod
    def size_multiple(cls, vae_config: dict) -> int:
        """What must divide the height and the width of the images, in pixels."""

    @classmethod
    def original_inference_steps(cls, denoiser_config: dict) -> int | None:
        """The grid on which LCM's own models of this kind were distilled; None: all training timesteps."""
        return None

    @classmethod
    def check_size(cls, vae_config: dict, denoiser_config: dict, *, height: int, width: int) -> None:
        """Raises UserError unless images can have this size, in pixels."""
        multiple = cls.size_multiple(vae_config)
        for side in (height, width):
            if side < multiple or side % multiple:
                below = max(side // multiple, 1) * multiple
                raise UserError(
                    f"--resolution {side} is not a multiple of {multiple}: pass {below} or {below + multiple}"
                )

    @classmethod
    def default_lora_targets(cls, denoiser_config: dict) -> list[str]:
        """Where the LoRA goes unless told otherwise, in a denoiser of this configuration."""
        return cls.lora_targets

    @classmethod
    def tool_format(cls, denoiser_config: dict) -> ToolFormat | None:
        """How other tools call a denoiser of this configuration and the layers of its LoRA."""
        return cls.lora_format

    # ---- Shapes and schedules ----

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of this size, in pixels."""
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    @classmethod
    def schedule_arguments(
        cls, scheduler: SchedulerMixin, num_inference_steps: int, *, vae_config: dict, height: int, width: int
    ) -> dict:
        """What the pipeline passes to its scheduler's `set_timesteps` beside the number of steps, for images of this
        size, in pixels: sigmas, mu."""
        return {}

    # ---- Conditioning and the model ----

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """What the pipeline makes of each prompt, on `device`, without a batch dimension."""
        self._warn_of_long_prompts(prompts)
        with self._use(*self.text_encoders, offload=self.offload_text_encoders), quiet_libraries():
            return self._encode(list(prompts))

    @abstractmethod
    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        """`encode_prompts` itself, while the text encoders are on `device`; `prompts` may be overwritten."""

    def _prompt_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """The tokenizer by which prompts are cut off, and how many of its tokens a prompt has at most, beside those of
        the pipeline's template."""
        tokenizer = self.pipeline.tokenizer
        return tokenizer, self.max_sequence_length or tokenizer.model_max_length

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        """Once: diffusers would warn of every prompt and text encoder, with all that was cut off."""
        if self._warned_of_long_prompts:
            return
        tokenizer, limit = self._prompt_limit()
        for prompt, tokens in zip(prompts, tokenizer(list(prompts), verbose=False)["input_ids"]):
            if len(tokens) > limit:
                self._warned_of_long_prompts = True
                logger.warning(f"prompts are cut off after {limit} tokens, the first one is: {prompt[:80]!r} ...")
                return

    def collate(
        self,
        conditionings: Sequence[Conditioning],
        height: int,
        width: int,
        *,
        original_sizes: Tensor | None = None,
        crop_top_lefts: Tensor | None = None,
    ) -> Conditioning:
        """A batch, on `device`, of B prompts for images of this size, in pixels.

        Args:
            original_sizes: [B, 2], height and width of each training image before it was resized, in pixels, for
                families that are conditioned on it; None: as drawn.
            crop_top_lefts: [B, 2], where its crop starts after that.
        """
        return Conditioning.stack(conditionings).to(self.device)

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's output [B, C, h, w], float32, in its scheduler's convention, for scaled latents [B, C, h, w] at
        `timesteps` [B]."""

    # ---- The plain pipeline ----

    @abstractmethod
    def pipeline_inputs(self, conditioning: Conditioning) -> dict:
        """A batch as the pipeline's call takes it in place of prompts."""

    def call_arguments(self, deployment: Deployment) -> dict:
        """What the pipeline is called with at `deployment` beside prompts and generators: the model card's call."""
        if deployment.timesteps:
            arguments = {"timesteps": list(deployment.timesteps)}
        else:
            arguments = {"num_inference_steps": deployment.num_inference_steps}
        arguments["guidance_scale"] = self.guidance_scale
        if deployment.eta is not None:
            arguments["eta"] = deployment.eta
        if self.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.max_sequence_length
        return arguments | {"height": deployment.height, "width": deployment.width}

    @property
    def card_note(self) -> str | None:
        """What the model card says of the code of its call."""
        return None

    def unpack(self, latents: Tensor, deployment: Deployment) -> Tensor:
        """Latents [B, C, h, w] of what the pipeline gives for `output_type="latent"`."""
        return latents

    @torch.no_grad()
    def generate(self, conditioning: Conditioning, generators: list[torch.Generator], deployment: Deployment) -> Tensor:
        """Latents [B, C, h, w], float32, that the plain pipeline draws for a batch, image i from `generators[i]`."""
        inputs = self.pipeline_inputs(conditioning) | self.call_arguments(deployment)
        latents = self._drawer(**inputs, generator=generators, output_type="latent").images
        return self.unpack(latents, deployment).float()

    def draw_latents(
        self, conditioning: Conditioning, seeds: Sequence[int], *, deployment: Deployment, batch_size: int
    ) -> Tensor:
        """Latents [B, C, h, w] that `generate` draws for B prompts, `batch_size` at a time, image i from a generator on
        the CPU, seeded by `seeds[i]`; where the scheduler's own noise is the global generator's, one at a time."""
        uses_global = draws_global_noise(self.pipeline.scheduler)
        latents, batch_size = [], 1 if uses_global else batch_size
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=uses_global):
            for start in range(0, len(seeds), batch_size):
                batch = slice(start, start + batch_size)
                if uses_global:
                    torch.manual_seed(step_noise_seed(seeds[start]))
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
                latents.append(self.generate(conditioning.rows(batch), generators, deployment))
        return torch.cat(latents)

    # ---- Images ----

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, h, w], float32, on `device`, of images [B, 3, H, W] in [-1, 1]: the inverse of
        `decode_latents`. They are the mode of the VAE's posterior, so that an image has one latent, cached or not.

        Raises:
            UserError: a latent is not finite.
        """
        with self._use(self.pipeline.vae, offload=self.offload_vae):
            settings = {"batch_size": self.vae_batch_size, "batch_norm_eps": self.batch_norm_eps}
            return vae.encode(self.pipeline.vae, pixels, **settings).to(self.device)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """The RGB images of latents [B, C, h, w], as the pipeline decodes them.

        Raises:
            UserError: an image is not finite.
        """
        images = []
        with self._use(self.pipeline.vae, offload=self.offload_vae):
            settings = {"batch_size": self.vae_batch_size, "batch_norm_eps": self.batch_norm_eps}
            for pixels in vae.decode(self.pipeline.vae, latents, **settings):
                images += self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images

    # ---- Where the parts are ----

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        parts = [getattr(self.pipeline, name) for name in self.text_encoder_classes]
        return [part for part in parts if part is not None]

    def free_text_encoders(self) -> None:
        """Gives their memory back, once all prompts are encoded."""
        for name in self.text_encoder_classes:
            setattr(self.pipeline, name, None)
        free_memory()

    def keep_vae_offloaded(self) -> None:
        """From now on the VAE is on the CPU except where it is used."""
        self.offload_vae = True
        self.pipeline.vae.to("cpu")

    @contextmanager
    def parts_loaded(self) -> Iterator[None]:
        """Within this, what is offloaded moves to `device` at its first use and stays there until the end."""
        if self._loaded_parts is not None:  # within another one, which ends later
            yield
            return
        with ExitStack() as stack:
            self._loaded_parts = stack
            try:
                yield
            finally:
                self._loaded_parts = None

    def _use(self, *modules: torch.nn.Module, offload: bool):
        """A context in which `modules` are on `device`."""
        here = self.device.type  # accelerate's `cuda` is where torch says `cuda:0`
        if not offload or all(next(module.parameters()).device.type == here for module in modules):
            return nullcontext()
        moved = offload_models(*modules, device=self.device)
        if self._loaded_parts is None:
            return moved
        self._loaded_parts.enter_context(moved)
        return nullcontext()

    # ---- LoRA ----

    def add_lora(
        self,
        *,
        rank: int,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> list[torch.nn.Parameter]:
        """`lora.add_lora` to the denoiser, by default at `default_lora_targets`; returns the parameters to train."""
        if target_modules is None:
            target_modules = self.default_lora_targets(self.denoiser.config)
        parameters = lora.add_lora(
            self.denoiser, rank=rank, lora_alpha=lora_alpha, target_modules=target_modules, seed=seed
        )
        self.lora_layers = lora.lora_layers(self.denoiser)
        return parameters

    def without_lora(self):
        """A context in which the denoiser is the base, without the LoRA of `add_lora`."""
        return lora.disabled(self.lora_layers)

    def save_lora(self, folder) -> None:
        """`lora.save_lora` of the denoiser."""
        lora.save_lora(self.pipeline_class, self.denoiser_name, self.denoiser, folder)

    @classmethod
    def read_lora(
        cls, location: str, filename: str | None, *, denoiser_config: FrozenDict, cache_dir: str | None = None
    ) -> dict[str, Tensor]:
        """The matrices of a LoRA in a folder or hub repository, as `pipeline_class` reads them: each name begins with
        that of its part of the pipeline."""
        return cls.pipeline_class.lora_state_dict(location, weight_name=filename, cache_dir=cache_dir)


def step_noise_seed(seed: int) -> int:
    """The global generator's seed for the steps' noise of the image whose first noise has `seed`: another one, or the
    first step's noise would be the first noise again."""
    return keyed_seed((seed, 1))


def _without_text_encoders(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline with the same parts, taking embeddings alone: text encoders, which may be offloaded, don't
    decide where it runs."""
    parameters = inspect.signature(type(pipeline).__init__).parameters
    values = {name: value for name, value in pipeline.config.items() if name in parameters}
    values |= {name: part for name, part in pipeline.components.items() if name in parameters}
    values |= {name: None for name in parameters if name.startswith(("text_encoder", "tokenizer"))}
    if "add_watermarker" in parameters:
        values["add_watermarker"] = False
    with quiet_libraries():  # which have warned of what is left out
        drawer = type(pipeline)(**values)
    drawer.set_progress_bar_config(disable=True)
    return drawer
