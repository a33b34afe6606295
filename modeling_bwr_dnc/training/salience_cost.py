"""A cost of being salient, beside the loss of a language model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ..memory_parameters import MEMORY


class SalienceCost:
    """
    The mean softplus of all salience logits that a model gives while this listens, with gradients.

    Args:
        margin: added to the logits, at least 0. Above 0 the cost goes on pushing until they are so far below 0, and leaves alone
            what the loss of the model pulls up, since facts that are pushed, too, sink until they are only just kept.
    """

    def __init__(self, model: nn.Module, margin: float = 0.0):
        self.margin = margin
        self.heard: list[torch.Tensor] = []
        self.is_listening = False
        for name, module in model.named_modules():
            if name.endswith(f"{MEMORY}salience"):
                module.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: tuple, salience: torch.Tensor) -> torch.Tensor | None:
        # A layer that is computed again in the backward pass has been heard already, and must do the same then as now.
        if not self.is_listening:
            return None
        used, heard = _Unneeded.apply(salience) if self.margin else (salience, salience)
        self.heard.append(heard)
        return used

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False

    def take(self) -> torch.Tensor | float:
        """The cost since the last call."""
        heard, self.heard = self.heard, []
        return torch.stack([F.softplus(salience + self.margin).mean() for salience in heard]).mean() if heard else 0.0


class _Unneeded(torch.autograd.Function):
    """Twice the identity: for use, and for a cost whose gradient passes only where that of the use does not ask for more."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor), tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient, cost):
        return gradient + cost.masked_fill(gradient < 0, 0.0)
