"""FLUX.1-dev: the shift depends on the size, guidance is embedded, prompts of 512 tokens."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from tests.families.cases.flux_schnell import build_flux, unpack


__all__ = ["CALL", "IS_EXACT", "STEPS", "build", "unpack"]

CALL = {"guidance_scale": 3.5, "max_sequence_length": 512}
IS_EXACT = True
STEPS = (3, 8)  # with timesteps that bfloat16 rounds otherwise once they are divided by 1000


def build() -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return build_flux(scheduler, guidance_embeds=True)
