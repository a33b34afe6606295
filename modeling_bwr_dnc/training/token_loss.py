"""The language-model head as a part that gives losses, so that a model's own forward pass never holds all logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..token_loss import linear_cross_entropy


@contextmanager
def head_gives_losses(head: nn.Linear, labels: torch.Tensor, chunk_length: int) -> Iterator[None]:
    """
    While this lasts, the language-model head turns hidden states [B, T, W] into token losses [B, T] for `labels` [B, T].

    So the loss is part of the model's own forward pass, which wrappers (DDP, fully sharded, PEFT) rely on.
    """

    def losses(hidden_states):
        return linear_cross_entropy(hidden_states, head.weight, labels, chunk_length)

    head.forward = losses
    try:
        yield
    finally:
        del head.forward
