"""Trains the undistilled SDXL: a byte-pair tokenizer, two CLIP text encoders and a UNet, on the artists' drawings."""

import copy
import json

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .common import (
    ARTISTS,
    BUILD,
    Drawings,
    autocast,
    learning_rate,
    load_drawings,
    set_learning_rate,
    stage_arguments,
    train,
    update_ema,
)


BATCH = 128
MAX_TOKENS = 16
TIME_IDS = (32, 32, 0, 0, 32, 32)  # original size, crop, target size: every drawing is 32x32 px and uncropped
KINDS = ("name", "class", "empty")
KIND_WEIGHTS = (0.72, 0.18, 0.10)


def train_tokenizer(captions: list[str], pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-pair tokenizer with CLIP's rules, its merges learned from the captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    bpe.train_from_iterator(captions, trainer)
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = ["<|startoftext|>", "<|endoftext|>", "!"]
    tokens += [token for token, _ in learned if token not in tokens]
    # a letter at the end of a word is a token of its own; the trainer lists only those that it saw
    tokens += [f"{letter}</w>" for letter in alphabet if f"{letter}</w>" not in dict(learned)]
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


def new_text_encoders(vocab_size: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    def config(projection_dim):
        return CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=projection_dim,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )

    return CLIPTextModel(config(64)), CLIPTextModelWithProjection(config(128))


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        attention_head_dim=(2, 4),
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def noise_schedule() -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t of SDXL's 1,000 training timesteps, shaped [1000, 1, 1, 1]."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    cumulative = scheduler.alphas_cumprod.view(-1, 1, 1, 1)
    return cumulative.sqrt(), (1 - cumulative).sqrt()


class DenoisingModel(torch.nn.Module):
    """The text encoders and the UNet, conditioned as `StableDiffusionXLPipeline` conditions them."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = new_text_encoders(vocab_size)
        self.unet = new_unet()
        # on a CPU the backward pass of PyTorch's fused attention takes as long as all the rest
        self.unet.set_attn_processor(AttnProcessor())
        self.register_buffer("time_ids", torch.tensor([TIME_IDS], dtype=torch.float32), persistent=False)

    def encode(self, input_ids):
        """Token ids of both tokenizers [B, 2, tokens] to (prompt_embeds, pooled_prompt_embeds)."""
        hidden = self.text_encoder(input_ids[:, 0], output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(input_ids[:, 1], output_hidden_states=True)
        return torch.cat([hidden, second.hidden_states[-2]], dim=-1), second.text_embeds

    def forward(self, latents, timesteps, prompt_embeds, pooled_prompt_embeds):
        conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": self.time_ids.expand(len(latents), -1)}
        return self.unet(latents, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample


def tokenize_kinds(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], drawings: Drawings) -> torch.Tensor:
    """Token ids [kinds, concepts, 2, tokens] of each concept's name caption, class caption and empty caption."""
    kinds = (drawings.captions, drawings.classes, [""] * len(drawings))
    return torch.stack(
        [torch.stack([_ids(tokenizer, captions) for tokenizer in tokenizers], dim=1) for captions in kinds]
    )


def _ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def load_tokenizers(drawings: Drawings) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's two tokenizers share their merges and differ in the padding: end of text, and "!"."""
    captions = drawings.captions + load_drawings("held_out").captions
    return train_tokenizer(captions), train_tokenizer(captions, pad_token="!")


def encode_drawings(drawings: Drawings) -> torch.Tensor:
    """Scaled latents [concepts, styles, 4, 8, 8] under the trained autoencoder."""
    vae = AutoencoderKL.from_pretrained(BUILD / "vae").requires_grad_(False)
    batches = drawings.pixels.flatten(0, 1).split(128)
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches]) * vae.config.scaling_factor
    return latents.unflatten(0, drawings.pixels.shape[:2])


def load_model(name: str, vocab_size: int) -> DenoisingModel:
    model = DenoisingModel(vocab_size)
    model.load_state_dict(torch.load(BUILD / f"{name}.pt", weights_only=True)["ema"])
    return model.requires_grad_(False)


def main():
    args = stage_arguments(__doc__, steps=3000)
    drawings = load_drawings()
    tokenizers = load_tokenizers(drawings)
    input_ids = tokenize_kinds(tokenizers, drawings)
    latents = encode_drawings(drawings)[:, : len(ARTISTS)]
    alpha, sigma = noise_schedule()

    torch.manual_seed(0)
    model = DenoisingModel(len(tokenizers[0]))
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    kind_weights = torch.tensor(KIND_WEIGHTS)

    def update(step):
        set_learning_rate(optimizer, learning_rate(1e-3, step, args.steps, warmup=100, floor=0.05))
        concept = torch.randint(len(drawings), (BATCH,))
        clean = latents[concept, torch.randint(len(ARTISTS), (BATCH,))]
        kind = torch.multinomial(kind_weights, BATCH, replacement=True)
        timesteps = torch.randint(len(alpha), (BATCH,))
        noise = torch.randn_like(clean)
        noisy = alpha[timesteps] * clean + sigma[timesteps] * noise
        with autocast():
            model_output = model(noisy, timesteps, *model.encode(input_ids[kind, concept]))
        loss = F.mse_loss(model_output.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, min(0.999, (step + 1) / (step + 50)))
        return {"loss": loss}

    train("teacher", {"model": model, "ema": ema, "optimizer": optimizer}, update, args.steps, args.max_minutes)


if __name__ == "__main__":
    main()
