"""Optimizer steps: gradient scaling, clipping, skipping."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pso_utils.training import initialize_grad_scaler, optimizer_step, passed_multiple, reduce_gradients


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
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD([parameter], lr=1.0))
    return parameter, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_an_overflow_is_skipped_and_the_next_step_goes_on(fp16_accelerator):
    parameter, optimizer, lr_scheduler = build(fp16_accelerator)
    initialize_grad_scaler(fp16_accelerator)  # this process has made no backward pass
    parameter.grad = torch.full((3,), float("inf"))
    assert optimizer_step(fp16_accelerator, optimizer, lr_scheduler, [parameter], 1.0) == {"lr": 1.0}
    assert torch.equal(parameter, torch.ones(3)) and fp16_accelerator.scaler.get_scale() == 512

    parameter.grad = torch.zeros(3)
    parameter.grad[0] = 0.5 * 512  # scaled
    assert optimizer_step(fp16_accelerator, optimizer, lr_scheduler, [parameter], 1.0) == {"grad_norm": 0.5, "lr": 1.0}
    assert torch.equal(parameter, torch.tensor([0.5, 1.0, 1.0]))
    assert lr_scheduler.get_last_lr() == [0.5]


def test_a_gradient_of_zero_steps_with_a_scaler(fp16_accelerator):
    parameter, optimizer, lr_scheduler = build(fp16_accelerator)
    initialize_grad_scaler(fp16_accelerator)
    parameter.grad = torch.zeros(3)
    assert optimizer_step(fp16_accelerator, optimizer, lr_scheduler, [parameter], 1.0)["grad_norm"] == 0


def test_an_overflow_that_no_scale_helps_stops_the_run(fp16_accelerator):
    parameter, optimizer, lr_scheduler = build(fp16_accelerator)
    initialize_grad_scaler(fp16_accelerator)
    with pytest.raises(ValueError, match="not finite"):
        for _ in range(12):  # 1024 halves to below 1
            parameter.grad = torch.full((3,), float("nan"))
            optimizer_step(fp16_accelerator, optimizer, lr_scheduler, [parameter], 1.0)
    assert torch.equal(parameter, torch.ones(3))


def test_without_a_scaler_a_gradient_that_is_not_finite_stops_the_run(accelerator):
    parameter, optimizer, lr_scheduler = build(accelerator)
    parameter.grad = torch.full((3,), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        optimizer_step(accelerator, optimizer, lr_scheduler, [parameter], 1.0)
    assert torch.equal(parameter, torch.ones(3))


def test_the_gradient_is_clipped_and_its_norm_before_clipping_returned(accelerator):
    parameter, optimizer, lr_scheduler = build(accelerator)
    parameter.grad = torch.tensor([3.0, 4.0, 0.0])
    assert optimizer_step(accelerator, optimizer, lr_scheduler, [parameter], 1.0)["grad_norm"] == 5
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.4, 0.2, 1.0]))


def test_reducing_over_one_process_changes_nothing(accelerator):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    gradients = [torch.randn(2, 3), torch.randn(4)]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    sums = reduce_gradients(accelerator, parameters, torch.tensor([1.0, 2.0]))
    assert sums.tolist() == [1, 2]
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, gradients))


def test_an_interval_is_passed_at_the_first_boundary_at_or_after_each_multiple():
    boundaries = [0, 3, 6, 9, 12, 15]
    passed = [after for before, after in zip(boundaries, boundaries[1:]) if passed_multiple(4, before, after)]
    assert passed == [6, 9, 12]
