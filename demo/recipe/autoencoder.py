"""Trains the AutoencoderKL: 32x32 px to 4 latent channels at 8x8."""

import torch
from diffusers import AutoencoderKL

from .common import BUILD, autocast, learning_rate, load_drawings, set_learning_rate, stage_arguments, train


BATCH = 64


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        force_upcast=False,
    )


def main():
    args = stage_arguments(__doc__, steps=1500)
    images = load_drawings().pixels.flatten(0, 1)  # every style, the ink included
    torch.manual_seed(0)
    vae = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))

    def update(step):
        set_learning_rate(optimizer, learning_rate(2e-3, step, args.steps))
        batch = images[torch.randint(len(images), (BATCH,))]
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        batch = batch.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        with autocast():
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - batch
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        squared = error.square().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + 0.5 * edges + squared + 6e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss, "psnr": -10 * torch.log10(squared / 4)}

    if train("autoencoder", {"vae": vae, "optimizer": optimizer}, update, args.steps, args.max_minutes):
        vae.requires_grad_(False)
        latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(128)])
        decoded = torch.cat([vae.decode(batch).sample for batch in latents.split(128)])
        print(f"psnr of the reconstructions {-10 * torch.log10((decoded - images).square().mean() / 4):.2f} dB")
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        vae.save_pretrained(BUILD / "vae")


if __name__ == "__main__":
    main()
