"""CLIP score and PickScore: one implementation for every CLIP model of transformers."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pso_utils.errors import UserError, first_line
from pso_utils.rewards.registry import Reward, check_folder_or_hub_id, register_reward
from pso_utils.sources import weight_shapes


CLIP_MODEL = "openai/clip-vit-large-patch14"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def check_clip(model: str) -> None:
    """Checks from its files alone that a folder holds a `CLIPModel` with tokenizer and image processor.

    Raises:
        UserError: naming the missing file, or the kind of model that the folder holds instead.
    """
    check_folder_or_hub_id(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return
    config = folder / "config.json"
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"'{config}' cannot be read ({first_line(error)}): pass the folder of a CLIPModel saved by save_pretrained"
        ) from error
    if model_type != "clip":
        raise UserError(f"'{folder}' holds a model of type '{model_type}': pass one of type 'clip' (a CLIPModel)")
    weights = list(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"'{folder}' has no weights: pass a folder that holds model.safetensors")
    for path in weights:
        weight_shapes(str(path))  # raises for a file that is damaged or cut short
    if not has_processor(str(folder)):
        raise UserError(
            f"'{folder}' has no tokenizer (tokenizer.json) or no image processor (preprocessor_config.json): "
            "save the model's processor into the same folder"
        )


def has_processor(model: str, cache_dir: str | None = None) -> bool:
    """Whether a folder or hub id holds a tokenizer and an image processor."""
    # Asked file by file: AutoTokenizer makes an empty tokenizer, without an error, where the files are missing.
    from transformers.utils import has_file

    def has(*names):
        return all(has_file(model, name, cache_dir=cache_dir) for name in names)

    has_tokenizer = has("tokenizer.json") or has("vocab.json", "merges.txt")
    return has_tokenizer and (has("preprocessor_config.json") or has("processor_config.json"))


class CLIPImages:
    """A CLIP model's image embeddings [B, D], float32, not normalised. The model is frozen, float32 unless `to` says
    else.

    Args:
        model: hub id or folder of a `CLIPModel`.
        processor: hub id or folder of its image processor, `model` itself by default.
        cache_dir: as in `from_pretrained`.

    Raises:
        UserError: weights are missing from the checkpoint.
        OSError: transformers cannot find the files.
    """

    def __init__(self, model: str, *, processor: str | None = None, cache_dir: str | None = None):
        # Not at the top, as transformers takes seconds to import and other rewards do without. The processor's Pil
        # class, as CLIPImageProcessor needs torchvision.
        from transformers import CLIPImageProcessorPil, CLIPModel

        self.image_processor = CLIPImageProcessorPil.from_pretrained(processor or model, cache_dir=cache_dir)
        clip, loading = CLIPModel.from_pretrained(model, cache_dir=cache_dir, output_loading_info=True)
        if loading["missing_keys"]:  # transformers would fill them with random numbers
            raise UserError(
                f"the weights in '{model}' lack {len(loading['missing_keys'])} tensors of a CLIPModel, such as "
                f"{min(loading['missing_keys'])}: pass a complete one"
            )
        self.model = clip.float().eval().requires_grad_(False)

    def to(self, device=None, dtype=None) -> "CLIPImages":
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float()


class CLIPReward(CLIPImages):
    """Cosine similarity of an image's and its prompt's CLIP embeddings.

    Prompts are truncated at the text encoder's limit. Scores don't depend on the batch, up to float32 rounding.
    `processor` is where the tokenizer is, too; arguments and errors are else those of `CLIPImages`.

    Raises:
        UserError: also where the tokenizer doesn't belong to the model.
    """

    def __init__(self, model: str, *, processor: str | None = None, cache_dir: str | None = None):
        from transformers import AutoTokenizer

        super().__init__(model, processor=processor, cache_dir=cache_dir)
        processor = processor or model
        self.tokenizer = AutoTokenizer.from_pretrained(processor, cache_dir=cache_dir)
        self.max_length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        self._check_end_of_text(processor)

    def _check_end_of_text(self, processor: str) -> None:
        # The text encoder reads its embedding where it finds the end-of-text token. With another tokenizer it finds
        # none and reads the first token, alike for all prompts, and scores mean nothing.
        input_ids = self._tokenize(["a", "a longer prompt"])["input_ids"]
        eos_token_id = self.model.config.text_config.eos_token_id
        # Configs from before transformers 4.31 have 2 there: the encoder then takes the largest id for the end.
        end = input_ids.max() if eos_token_id == 2 else eos_token_id
        first_end = (input_ids == end).int().argmax(dim=1, keepdim=True)
        if not (input_ids.gather(1, first_end) == self.tokenizer.eos_token_id).all():
            raise UserError(
                f"the tokenizer in '{processor}' ends prompts with token {self.tokenizer.eos_token_id}, but the model "
                f"looks for {int(end)} (eos_token_id of its text_config): pass a model with its own tokenizer"
            )

    def _tokenize(self, prompts: list[str]):
        return self.tokenizer(prompts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        device = self.model.device
        image_embeds = self.embed_images(images)

        unique_prompts = list(dict.fromkeys(prompts))  # the samples of one prompt share its embedding
        tokens = self._tokenize(unique_prompts).to(device)
        text_embeds = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.float()
        prompt_index = torch.tensor([unique_prompts.index(prompt) for prompt in prompts], device=device)
        return F.cosine_similarity(image_embeds, text_embeds[prompt_index], dim=-1)


@register_reward("clip", default_model=CLIP_MODEL, check_model=check_clip)
def clip(model: str, cache_dir: str | None) -> Reward:
    """CLIP score: how well the image fits its prompt."""
    return CLIPReward(model, cache_dir=cache_dir)


@register_reward("pickscore", default_model="yuvalkirstain/PickScore_v1", check_model=check_clip)
def pickscore(model: str, cache_dir: str | None) -> Reward:
    """PickScore (arXiv 2305.01569): a CLIP ViT-H tuned on human preferences, without its logit scale of about 100."""
    processor = model if has_processor(model, cache_dir) else PICKSCORE_PROCESSOR
    return CLIPReward(model, processor=processor, cache_dir=cache_dir)
