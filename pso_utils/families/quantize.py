"""The base's linear layers in 4 or 8 bits, by bitsandbytes, on GPU and CPU; the LoRA on top stays float32."""

import logging

import torch
from diffusers import ModelMixin

from pso_utils.errors import UserError


QUANTIZATIONS = ("nf4", "int8")


def quantize(denoiser: ModelMixin, kind: str, device: str | torch.device) -> None:
    """Replaces the linear layers of the denoiser's blocks, which are nearly all of its weights, by quantized ones on
    `device`; what embeds and projects before and after the blocks keeps its precision, as do layers that the model
    itself keeps in float32. To be called before a LoRA is added, and after one is fused.

    diffusers' own quantizer refuses a machine without GPU, and loads no weights that a LoRA was fused into.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--quantize needs bitsandbytes: run `pip install bitsandbytes`, or drop the flag") from error

    # a warning at every product of 8 bits that its input is not float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kept = tuple(denoiser._keep_in_fp32_modules or ())
    blocks = [module for module in denoiser.modules() if isinstance(module, torch.nn.ModuleList)]
    parents = {parent: name for block in blocks for name, parent in block.named_modules()}
    for parent, path in parents.items():
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or any(part in kept for part in f"{path}.{name}".split(".")):
                continue
            if kind == "nf4":
                quantized = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, quant_type="nf4"
                )
                quantized.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                quantized = bitsandbytes.nn.Linear8bitLt(
                    layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0
                )
                quantized.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False)
            quantized.bias = layer.bias
            # here the weights are quantized
            setattr(parent, name, quantized.requires_grad_(False).eval().to(device))
    # by which peft knows that its layers are to be those for quantized ones
    setattr(denoiser, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[kind], True)
