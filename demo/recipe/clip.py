"""Trains the tiny CLIP that stands where PickScore stands for real models, and stores it with its processor."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from .common import (
    BUILD,
    DEMO,
    Drawings,
    autocast,
    learning_rate,
    load_drawings,
    set_learning_rate,
    stage_arguments,
    train,
)
from .teacher import MAX_TOKENS, train_tokenizer


BATCH, SPOILT = 128, 64
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def new_clip(vocab_size: int) -> CLIPModel:
    layers = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": vocab_size, "max_position_embeddings": MAX_TOKENS}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPModel(
        CLIPConfig(
            text_config=layers | text,
            vision_config=layers | {"image_size": 32, "patch_size": 4},
            projection_dim=64,
        )
    )


@torch.no_grad()
def decoded_images(drawings: Drawings) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pipeline's decoder makes of every drawing and of its mirror image, and of spoilt latents of both: samples
    are judged, so samples are what the model must know. Two tensors [concepts, 2 * styles, 3, 32, 32]."""
    vae = AutoencoderKL.from_pretrained(BUILD / "vae")
    images = torch.cat([drawings.pixels, drawings.pixels.flip(-1)], dim=1)
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.flatten(0, 1).split(128)])
    latents = latents.unflatten(0, images.shape[:2])

    def decode(batch):
        decoded = torch.cat([vae.decode(part).sample for part in batch.flatten(0, 1).split(128)])
        return decoded.clamp(-1, 1).unflatten(0, images.shape[:2])

    generator = torch.Generator().manual_seed(0)
    share = 0.25 + 0.25 * torch.rand(*latents.shape[:2], 1, 1, 1, generator=generator)
    # half mixed with another style's drawing, or another concept's, as an averaging model's samples are; half noised
    others = torch.where(share < 0.375, latents.roll(1, 1), latents.roll(1, 0))
    noised = latents + share * latents.std() * torch.randn(latents.shape, generator=generator)
    mixed = torch.rand(*latents.shape[:2], 1, 1, 1, generator=generator) < 0.5
    return decode(latents), decode(torch.where(mixed, latents.lerp(others, share), noised))


def matches(drawings: Drawings, concept: torch.Tensor, by_class: torch.Tensor, class_ids: torch.Tensor):
    """Which texts [rows] describe which images [columns]: the same concept, or any of the class for a class caption."""
    same_concept = concept[:, None] == concept[None, :]
    same_class = class_ids[concept][:, None] == class_ids[concept][None, :]
    return torch.where(by_class[:, None], same_class, same_concept).float()


def main():
    args = stage_arguments(__doc__, steps=1200)
    drawings = load_drawings()
    tokenizer = train_tokenizer(drawings.captions + load_drawings("held_out").captions)
    kinds = [
        tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        for captions in (drawings.captions, drawings.classes)
    ]
    input_ids = torch.stack(kinds)
    class_ids = torch.tensor([sorted(set(drawings.classes)).index(kind) for kind in drawings.classes])

    originals = torch.cat([drawings.pixels, drawings.pixels.flip(-1)], dim=1)
    clean, spoilt = decoded_images(drawings)

    torch.manual_seed(0)
    model = new_clip(len(tokenizer))
    model.set_attn_implementation("eager")  # twice as fast as the fused one in bfloat16 on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)

    def update(step):
        set_learning_rate(optimizer, learning_rate(1e-3, step, args.steps))
        concept = torch.randperm(len(drawings))[:BATCH]
        by_class = torch.rand(BATCH) < 0.2
        style = torch.randint(clean.shape[1], (BATCH,))
        drawn = torch.rand(BATCH, 1, 1, 1) < 0.25
        images = torch.where(drawn, originals[concept, style], clean[concept, style])
        images = torch.cat([images, spoilt[concept, style][:SPOILT]])
        images = images.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        images = images + 0.1 * torch.rand(()) * torch.randn_like(images)
        with autocast():
            image = model.get_image_features(images).pooler_output
            text = model.get_text_features(input_ids[by_class.long(), concept]).pooler_output
        logits = F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T * model.logit_scale.exp()
        target = matches(drawings, concept, by_class, class_ids)
        # a text must find its images among all, the spoilt ones included; an image must find its texts
        padded = F.pad(target / target.sum(1, keepdim=True), (0, SPOILT))
        loss = F.cross_entropy(logits, padded)
        loss = loss + F.cross_entropy(logits[:, :BATCH].T, (target / target.sum(0)).T)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(100.0).log())
        found = padded.gather(1, logits.argmax(1, keepdim=True)).gt(0).float().mean()
        return {"loss": loss, "found": found, "spoilt": (logits.argmax(1) >= BATCH).float().mean()}

    if train("clip", {"model": model, "optimizer": optimizer}, update, args.steps, args.max_minutes):
        image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
        )
        folder = DEMO / "emoji-clip"
        model.save_pretrained(folder)
        CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
