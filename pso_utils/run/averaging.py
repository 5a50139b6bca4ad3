"""--use_ema: an average of the LoRA along training, which is what is validated and saved."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor

from pso_utils.run.checkpoints import TrainingState


class Average:
    """The exponential moving average of the LoRA's parameters, by diffusers: its decay is (1 + step) / (10 + step), up
    to 0.9999. Its state is the run's, so that checkpoints hold it; made after a checkpoint was loaded, it goes on from
    that.

    Args:
        is_used: without, nothing is averaged.
    """

    def __init__(self, parameters: list[Tensor], state: TrainingState, *, is_used: bool):
        self.parameters, self.state = parameters, state
        self.model = EMAModel(parameters, foreach=True) if is_used else None
        if is_used and state.average is not None:
            self.model.load_state_dict(state.average)
            self.model.to(parameters[0].device)

    def step(self):
        """After each optimizer step."""
        if self.model is not None:
            self.model.step(self.parameters)
            self.state.average = self.model.state_dict()

    def take_over(self):
        """The run is over: the LoRA is the average from now on, whatever saves it."""
        if self.model is not None:
            self.model.copy_to(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this the LoRA is the average."""
        if self.model is None:
            yield
            return
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            self.model.restore(self.parameters)
