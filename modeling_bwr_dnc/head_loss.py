"""The language-model head as a part that gives the loss, so that a model's own forward pass never holds all logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .token_loss import summed_cross_entropy


@contextmanager
def head_gives_loss(
    head: nn.Linear, labels: torch.Tensor, chunk_length: int, label_weights: torch.Tensor | None = None
) -> Iterator[None]:
    """
    While this lasts, the language-model head turns hidden states [B, T, W] into the sum of their token losses for `labels`
    [B, T], each times its weight if there are `label_weights` [B, T], which the model's output has as its `logits`.

    So the loss is part of the model's own forward pass, which wrappers (DDP, fully sharded, PEFT) rely on.
    """

    def loss(hidden_states):
        return summed_cross_entropy(hidden_states, head.weight, labels, chunk_length, label_weights=label_weights)[0]

    # Hooks of accelerate, say, put a forward of their own there.
    earlier = vars(head).get("forward")
    head.forward = loss
    try:
        yield
    finally:
        if earlier is None:
            del head.forward
        else:
            head.forward = earlier
