"""Stores the trained models in diffusers' folders: `demo/emoji-turbo`, `demo/emoji-teacher`, and the prompts."""

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline
from diffusers.utils import logging

from .common import BUILD, DEMO, load_drawings
from .teacher import load_model, load_tokenizers


def main():
    logging.set_verbosity_error()
    drawings = load_drawings()
    tokenizers = load_tokenizers(drawings)
    student = load_model("student", len(tokenizers[0]))
    teacher = load_model("teacher", len(tokenizers[0]))
    # float16 halves the files; diffusers loads such a UNet and VAE as float32 where no dtype is asked for, transformers
    # loads its models as stored, so that the text encoders stay float32
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(BUILD / "vae").to(torch.float16),
        text_encoder=student.text_encoder,
        text_encoder_2=student.text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=student.unet.to(torch.float16),
        scheduler=LCMScheduler(original_inference_steps=1000),
        add_watermarker=False,
    )
    pipeline.vae.register_to_config(_name_or_path="")  # else the path that it was built at
    pipeline.save_pretrained(DEMO / "emoji-turbo")
    teacher.unet.to(torch.float16).save_pretrained(DEMO / "emoji-teacher")
    classes = sorted(set(drawings.classes))
    (DEMO / "prompts.txt").write_text("\n".join(sorted(drawings.captions) + 2 * classes) + "\n")
    (DEMO / "class_prompts.txt").write_text("\n".join(classes) + "\n")


if __name__ == "__main__":
    main()
