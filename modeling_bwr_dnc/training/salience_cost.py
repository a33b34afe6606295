"""A cost of being salient, beside the loss of a language model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .memory_metrics import MEMORY


class SalienceCost:
    """The mean softplus of all salience logits that a model gives while this listens, with gradients."""

    def __init__(self, model: nn.Module):
        self.heard: list[torch.Tensor] = []
        self.is_listening = False
        for name, module in model.named_modules():
            if name.endswith(f"{MEMORY}salience"):
                module.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: tuple, salience: torch.Tensor) -> None:
        # A layer that is computed again in the backward pass has been heard already, and must do the same then as now.
        if self.is_listening:
            self.heard.append(salience)

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
        return torch.stack([F.softplus(salience).mean() for salience in heard]).mean() if heard else 0.0
