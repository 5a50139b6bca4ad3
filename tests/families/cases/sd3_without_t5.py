"""SD3.5-large-turbo, saved without its third text encoder."""

from diffusers import StableDiffusion3Pipeline

from tests.families.cases.sd3 import CALL, CALL_AT, IS_EXACT, build_parts


__all__ = ["CALL", "CALL_AT", "IS_EXACT", "build"]


def build() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(**build_parts(seed=1), text_encoder_3=None, tokenizer_3=None)
