"""
Cross-entropy of a language-model head without its logits: they exist for one chunk of tokens at a time.

`torch.nn.functional.linear_cross_entropy` does the same, but its chunks took 21.6 s on a CPU where the plain loss took 5.2 s
(forward and backward, 1,024 tokens, width 1,024, 50,000 ids, torch 2.13, one thread), and it is absent before torch 2.13.

Shapes: `N` tokens, `V` ids, `W` width of the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

IGNORED = -100


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy [N] of `hidden_states` [N, W] times `weight` [V, W] for `labels` [N], 0 where a label is -100."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, chunk_length):
        losses, normalisers = [], []
        for hidden, label in zip(hidden_states.split(chunk_length), labels.split(chunk_length), strict=True):
            logits = _logits(hidden, weight)
            normaliser = logits.logsumexp(-1)
            losses.append((normaliser - _chosen(logits, label)).masked_fill(label == IGNORED, 0))
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden_states, weight, labels, torch.cat(normalisers))
        ctx.chunk_length = chunk_length
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):
        """Recomputes the logits of each chunk: d loss / d logits = softmax - onehot."""
        hidden_states, weight, labels, normalisers = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        gradient = gradient.masked_fill(labels == IGNORED, 0)
        for start in range(0, len(labels), ctx.chunk_length):
            part = slice(start, start + ctx.chunk_length)
            hidden, label = hidden_states[part], labels[part].clamp(min=0)[:, None]
            logits = _logits(hidden, weight).sub_(normalisers[part, None]).exp_()
            logits.scatter_add_(1, label, -torch.ones_like(label, dtype=logits.dtype))
            logits = logits.mul_(gradient[part, None]).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = logits @ weight
            if weight_gradient is not None:
                weight_gradient.addmm_(logits.T, hidden.to(weight.dtype))
        return hidden_gradient, weight_gradient, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least."""
    logits = hidden.to(weight.dtype) @ weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chosen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_length: int = 256
) -> torch.Tensor:
    """
    Cross-entropy of every token, [...], of `hidden_states` [..., W] times `weight` [V, W]; 0 where a label is -100.

    At most `chunk_length` x V logits exist at a time, in the forward and in the backward pass. Under autocast the products
    are in its type, the softmax in float32.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return LinearCrossEntropy.apply(flat, weight, labels.reshape(-1), chunk_length).view(labels.shape)


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
