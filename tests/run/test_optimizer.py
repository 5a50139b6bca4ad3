"""Optimizer steps: gradient scaling, clipping, skipping."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pso_utils.errors import UserError
from pso_utils.run.optimizer import initialize_grad_scaler, make_optimizer, optimizer_step, reduce_gradients


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fp16_accelerator(accelerator, monkeypatch):
    """fp16's gradient scaling on the CPU, which accelerate refuses and torch has."""
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=1024.0))
    monkeypatch.setattr(accelerator, "native_amp", True)
    accelerator.state._mixed_precision = "fp16"
    return accelerator


def build(accelerator):
    """A parameter, and a function that makes an optimizer step of a gradient."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD([parameter], lr=1.0))
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def step(gradient) -> dict[str, float]:
        parameter.grad = torch.tensor(gradient)
        return optimizer_step(accelerator, optimizer, lr_scheduler, [parameter], max_grad_norm=1.0)

    return parameter, step


def test_an_overflow_is_skipped_and_the_next_step_goes_on(fp16_accelerator):
    parameter, step = build(fp16_accelerator)
    initialize_grad_scaler(fp16_accelerator)  # this process has made no backward pass
    assert step([float("inf")] * 3) == {"lr": 1.0}
    assert torch.equal(parameter, torch.ones(3)) and fp16_accelerator.scaler.get_scale() == 512
    assert step([0.5 * 512, 0, 0]) == {"grad_norm": 0.5, "lr": 1.0}  # scaled
    assert torch.equal(parameter, torch.tensor([0.5, 1.0, 1.0]))
    assert step([0.0, 0, 0])["lr"] == 0.5  # the skipped step did not count


def test_a_gradient_of_zero_steps_with_a_scaler(fp16_accelerator):
    _, step = build(fp16_accelerator)
    initialize_grad_scaler(fp16_accelerator)
    assert step([0.0, 0, 0])["grad_norm"] == 0


def test_an_overflow_that_no_scale_helps_stops_the_run(fp16_accelerator):
    parameter, step = build(fp16_accelerator)
    initialize_grad_scaler(fp16_accelerator)
    with pytest.raises(UserError, match="not finite"):
        for _ in range(12):  # 1024 halves to below 1
            step([float("nan")] * 3)
    assert torch.equal(parameter, torch.ones(3))


def test_without_a_scaler_a_gradient_that_is_not_finite_stops_the_run(accelerator):
    parameter, step = build(accelerator)
    with pytest.raises(UserError, match="not finite"):
        step([float("nan")] * 3)
    assert torch.equal(parameter, torch.ones(3))


def test_the_gradient_is_clipped_and_its_norm_before_clipping_returned(accelerator):
    parameter, step = build(accelerator)
    assert step([3.0, 4.0, 0.0])["grad_norm"] == 5
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.4, 0.2, 1.0]))


def test_reducing_over_one_process_changes_nothing(accelerator):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    gradients = [torch.randn(2, 3), torch.randn(4)]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    sums = reduce_gradients(accelerator, parameters, {"loss": torch.tensor(1.0), "pairs": torch.tensor(2.0)})
    assert sums == {"loss": 1, "pairs": 2}
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, gradients))


def test_the_learning_rate_is_scaled_and_warmed_up_in_optimizer_steps(accelerator):
    settings = {"learning_rate": 0.5, "scale_lr": True, "gradient_accumulation_steps": 2, "train_batch_size": 3}
    settings |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "use_8bit_adam": False}
    settings |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8}
    parameters = [torch.nn.Parameter(torch.ones(3))]
    optimizer, lr_scheduler = make_optimizer(SimpleNamespace(**settings), accelerator, parameters, 10)
    rates = []
    for _ in range(4):  # with gradients of zeros, as on a process without pairs
        rates.append(optimizer_step(accelerator, optimizer, lr_scheduler, parameters, max_grad_norm=1.0)["lr"])
    assert rates == [0, 1.5, 3, 3]  # 0.5 * 2 * 3 on one process
