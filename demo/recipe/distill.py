"""Distils the teacher to four steps at timesteps 999, 749, 499, 249: regression on its own solutions, then a GAN.

Regression alone leaves samples of the open prompts ("animal") as blurred as the teacher's few-step samples, because
its minimiser is an average; the adversarial finish picks one of the drawings instead, as SDXL-Turbo's does.
"""

import argparse
import copy
import os

import torch
import torch.nn.functional as F

from .common import ARTISTS, BUILD, autocast, learning_rate, load_drawings, set_learning_rate, train, update_ema
from .teacher import encode_drawings, load_model, load_tokenizers, noise_schedule, tokenize_kinds


TIMESTEPS = (999, 749, 499, 249)
SOLVER_STEPS = {999: 16, 749: 12, 499: 8, 249: 5}
SOLVER_BATCH = 256
KIND_WEIGHTS = torch.tensor([0.6, 0.3, 0.1])  # more class captions than the teacher saw: few-step models fail there
ADVERSARIAL_WEIGHT, GRADIENT_PENALTY = 0.1, 0.05


def predict_clean(model, noisy, timesteps, conditions, alpha, sigma):
    with autocast():
        noise = model(noisy, timesteps, *conditions).float()
    return (noisy - sigma[timesteps] * noise) / alpha[timesteps]


@torch.no_grad()
def solve(model, noisy, start: int, conditions, alpha, sigma):
    """The teacher's DDIM solution of the probability-flow ODE from timestep `start` down to the clean latents."""
    schedule = torch.linspace(start, 0, SOLVER_STEPS[start] + 1).round().long()
    for current, following in zip(schedule[:-1], schedule[1:]):
        clean = predict_clean(model, noisy, current.expand(len(noisy)), conditions, alpha, sigma)
        noise = (noisy - alpha[current] * clean) / sigma[current]
        noisy = alpha[following] * clean + sigma[following] * noise
    return clean


def encode(model, input_ids):
    """(prompt_embeds, pooled_prompt_embeds) by the text encoders, which are not trained."""
    with torch.no_grad(), autocast():
        return model.encode(input_ids)


def solve_batch(index, teacher, drawings, latents, input_ids, alpha, sigma, size=SOLVER_BATCH):
    """2 x `size` solutions {noisy, timesteps, clean, input_ids}, the `index`-th batch: half from pure noise, half from
    noised drawings and solutions."""
    torch.manual_seed(index)
    concept = torch.randint(len(drawings), (size,))
    ids = input_ids[torch.multinomial(KIND_WEIGHTS, size, replacement=True), concept]
    conditions = encode(teacher, ids)
    noise = torch.randn(size, *latents.shape[2:])
    clean = solve(teacher, noise, TIMESTEPS[0], conditions, alpha, sigma)
    # the student meets its own samples at the later steps, which resemble drawings and solutions alike
    drawing = latents[concept, torch.randint(len(ARTISTS), (size,))]
    source = torch.where(torch.rand(size, 1, 1, 1) < 0.5, drawing, clean)
    later = TIMESTEPS[1 + index % 3]
    noisy = alpha[later] * source + sigma[later] * torch.randn_like(source)
    solved = solve(teacher, noisy, later, conditions, alpha, sigma)
    return {
        "noisy": torch.cat([noise, noisy]),
        "timesteps": torch.tensor([TIMESTEPS[0], later]).repeat_interleave(size),
        "clean": torch.cat([clean, solved]),
        "input_ids": ids.repeat(2, 1, 1),
    }


def solve_batches(name, teacher, drawings, latents, input_ids, alpha, sigma, batches):
    """The solutions of `batches` batches, as one, kept in `demo/build/{name}.pt`."""
    path = BUILD / f"{name}.pt"
    parts = torch.load(path, weights_only=True) if path.exists() else []
    while len(parts) < batches:
        parts.append(solve_batch(len(parts), teacher, drawings, latents, input_ids, alpha, sigma))
        print(f"{name} {len(parts)}/{batches}", flush=True)
        if len(parts) % 5 == 0 or len(parts) == batches:
            torch.save(parts, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def pseudo_huber(prediction, target, scale=0.1):
    squared = (prediction - target).square().mean(dim=(1, 2, 3))
    return ((squared + scale**2).sqrt() - scale).mean()


def regression_step(model, ema, optimizer, solutions, alpha, sigma, decay):
    """One step of the student towards the teacher's solutions, `ema` being its UNet's moving average; the loss."""
    row = torch.randint(len(solutions["clean"]), (128,))
    conditions = encode(model, solutions["input_ids"][row])
    prediction = predict_clean(model, solutions["noisy"][row], solutions["timesteps"][row], conditions, alpha, sigma)
    loss = pseudo_huber(prediction, solutions["clean"][row])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
    optimizer.step()
    update_ema(ema, model.unet, decay)
    return loss


class Discriminator(torch.nn.Module):
    """A small convolutional critic of noised latents, conditioned on the pooled text and the timestep by projection."""

    def __init__(self, channels: int = 128, text_dim: int = 128):
        super().__init__()
        self.input = torch.nn.Conv2d(4, channels, 3, padding=1)
        self.condition = torch.nn.Linear(text_dim + 1, channels)
        self.blocks = torch.nn.ModuleList(
            [
                torch.nn.Conv2d(channels, channels, 3, padding=1),
                torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
                torch.nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
                torch.nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1),
            ]
        )
        self.output = torch.nn.Conv2d(2 * channels, 1, 1)
        self.projection = torch.nn.Linear(text_dim + 1, 2 * channels)

    def forward(self, latents, pooled_prompt_embeds, timesteps):
        condition = torch.cat([pooled_prompt_embeds, timesteps.view(-1, 1) / 500 - 0.5], dim=1)
        hidden = self.input(latents) + self.condition(condition)[:, :, None, None]
        for block in self.blocks:
            hidden = block(F.leaky_relu(hidden, 0.2))
        hidden = F.leaky_relu(hidden, 0.2)
        matched = (hidden * self.projection(condition)[:, :, None, None]).mean(dim=1) / 4
        return self.output(hidden).flatten(1) + matched.flatten(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver_batches", type=int, default=30, help=f"Each of 2 x {SOLVER_BATCH} solutions.")
    parser.add_argument("--regression_steps", type=int, default=800)
    parser.add_argument("--adversarial_steps", type=int, default=1300)
    parser.add_argument("--max_minutes", type=float, default=float("inf"), help="Time budget of each training.")
    args = parser.parse_args()

    drawings = load_drawings()
    tokenizers = load_tokenizers(drawings)
    input_ids = tokenize_kinds(tokenizers, drawings)
    latents = encode_drawings(drawings)[:, : len(ARTISTS)]
    alpha, sigma = noise_schedule()
    teacher = load_model("teacher", len(tokenizers[0]))
    solutions = solve_batches("solutions", teacher, drawings, latents, input_ids, alpha, sigma, args.solver_batches)

    model = copy.deepcopy(teacher)
    model.unet.requires_grad_(True)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.unet.parameters(), betas=(0.9, 0.99))

    def regress(step):
        set_learning_rate(optimizer, learning_rate(5e-4, step, args.regression_steps))
        decay = 0.998 if step > 300 else 0.98
        return {"loss": regression_step(model, ema.unet, optimizer, solutions, alpha, sigma, decay)}

    state = {"model": model, "ema": ema, "optimizer": optimizer}
    if not train("regression", state, regress, args.regression_steps, args.max_minutes):
        return

    model.load_state_dict(ema.state_dict())
    torch.manual_seed(0)
    critic = Discriminator()
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=1e-4, betas=(0.5, 0.99))
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=4e-4, betas=(0.5, 0.99))
    regressed, generated = 32, 64

    def renoise(clean):
        """Noised again to t in [20, 350): the critic then sees neither sharp codes nor only noise."""
        timesteps = torch.randint(20, 350, (len(clean),))
        return alpha[timesteps] * clean + sigma[timesteps] * torch.randn_like(clean), timesteps.float()

    def finish(step):
        row = torch.randint(len(solutions["clean"]), (regressed,))
        concept = torch.randint(len(drawings), (generated,))
        artist = torch.randint(len(ARTISTS), (generated,))
        kind = (torch.rand(generated) < 0.5).long()
        drawing = latents[concept, artist]
        timesteps = torch.tensor(TIMESTEPS)[torch.randint(len(TIMESTEPS), (generated,))]
        noise = torch.randn_like(drawing)
        first = (timesteps == TIMESTEPS[0]).view(-1, 1, 1, 1)  # the schedule starts at pure noise
        noisy = torch.where(first, noise, alpha[timesteps] * drawing + sigma[timesteps] * noise)
        conditions = encode(model, torch.cat([solutions["input_ids"][row], input_ids[kind, concept]]))
        clean = predict_clean(
            model,
            torch.cat([solutions["noisy"][row], noisy]),
            torch.cat([solutions["timesteps"][row], timesteps]),
            conditions,
            alpha,
            sigma,
        )
        pooled = conditions[1].float()

        # any drawing of a class is a real for its class caption; each was drawn together with its own caption
        real = latents[concept, torch.randint(len(ARTISTS), (generated,))].requires_grad_(True)
        real_noisy, real_timesteps = renoise(real)
        real_score = critic(real_noisy, pooled[regressed:], real_timesteps)
        fake_noisy, fake_timesteps = renoise(clean.detach())
        fake_score = critic(fake_noisy, pooled, fake_timesteps)
        gradient = torch.autograd.grad(real_score.sum(), real, create_graph=True)[0]
        penalty = gradient.square().sum(dim=(1, 2, 3)).mean()
        critic_loss = F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean() + GRADIENT_PENALTY * penalty
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()

        critic.requires_grad_(False)
        fake_noisy, fake_timesteps = renoise(clean)
        adversarial = -critic(fake_noisy, pooled, fake_timesteps).mean()
        critic.requires_grad_(True)
        regression = pseudo_huber(clean[:regressed], solutions["clean"][row])
        loss = regression + ADVERSARIAL_WEIGHT * min(1.0, step / 50) * adversarial
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        update_ema(ema.unet, model.unet, 0.99 if step > 100 else 0.95)
        return {"regression": regression, "adversarial": adversarial, "critic": critic_loss}

    state = {
        "model": model,
        "ema": ema,
        "critic": critic,
        "optimizer": optimizer,
        "critic_optimizer": critic_optimizer,
    }
    train("student", state, finish, args.adversarial_steps, args.max_minutes)


if __name__ == "__main__":
    main()
