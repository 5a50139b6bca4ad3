"""Optimizer steps whose gradients are summed over the processes by one collective call.

There is no DistributedDataParallel: ties and broken images give the processes unlike numbers of backward passes, and
its hooks wait for each other in every one. Instead each process adds up its own, be they none, weighted by the whole
minibatch's count, and `reduce_gradients`, in which every process takes part, sums them.
"""

import argparse

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from pso_utils.errors import UserError


def make_optimizer(
    args: argparse.Namespace, accelerator: Accelerator, parameters: list[Tensor], num_training_steps: int
):
    """AdamW (8-bit if asked) and its learning rate schedule, which counts optimizer steps. Every parameter has a
    gradient from now on, first of zeros: a process without pairs steps like the others.

    The schedule is not prepared by accelerate: a prepared one steps once per process, which is right for a data loader
    that the processes share and wrong for a loop that counts optimizer steps.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    optimizer = optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    try:
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=num_training_steps,
        )
    except ValueError as error:  # polynomial: a learning rate below the one that it ends at
        raise UserError(f"--lr_scheduler {args.lr_scheduler}: {error}; raise --learning_rate") from error
    return accelerator.prepare_optimizer(optimizer), lr_scheduler


def initialize_grad_scaler(accelerator: Accelerator):
    """Lets a rank unscale fp16 gradients that it made no part of: GradScaler allocates its scale on its first use."""
    if accelerator.scaler is not None:
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))


def reduce_gradients(accelerator: Accelerator, parameters: list[Tensor], sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums the gradients of all processes, in place, and the scalars `sums` (returned), with one collective call.

    The parameters are float32 (LoRA is, whatever the model's dtype) and every one has a gradient; `sums` has the same
    names in the same order on every process.
    """
    values = torch.stack(list(sums.values()))
    if accelerator.num_processes > 1:
        flat = torch.cat([*(parameter.grad.flatten() for parameter in parameters), values])
        *gradients, values = accelerator.reduce(flat, "sum").split([*(p.numel() for p in parameters), len(values)])
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad.copy_(gradient.view_as(parameter))
    return dict(zip(sums, values.tolist()))


def optimizer_step(
    accelerator: Accelerator, optimizer, lr_scheduler, parameters: list[Tensor], *, max_grad_norm: float
) -> dict[str, float]:
    """Clips the gradient and steps. Returns `lr`, and `grad_norm` before clipping, where it is finite.

    An fp16 gradient that overflowed is skipped, by all processes alike, and the scale lowered.

    Raises:
        UserError: a gradient that is not finite, without a scaler or where no scale helps.
    """
    lr = lr_scheduler.get_last_lr()[0]
    grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    finite = grad_norm < float("inf")
    # A scale below 1: it is not the gradient that overflows but the forward pass, and every step would be skipped.
    if not finite and (accelerator.scaler is None or accelerator.scaler.get_scale() < 1):
        raise UserError(
            "the gradient is not finite: lower --learning_rate or --beta, or pass --mixed_precision no; the latest"
            " checkpoint is from before it"
        )
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        lr_scheduler.step()
    return {"grad_norm": grad_norm, "lr": lr} if finite else {"lr": lr}
