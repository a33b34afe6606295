"""
Cross-entropy of a language-model head, with the logits of one chunk of tokens at a time, or made from logits that are wanted
anyway, of which then no second and third copy arises.

`torch.nn.functional.linear_cross_entropy` does the former, but its chunks took 21.6 s on a CPU where the plain loss took 5.2 s
(forward and backward, 1,024 tokens, width 1,024, 50,000 ids, torch 2.13, one thread), and it is absent before torch 2.13.

Shapes: `N` tokens, `V` ids, `W` width of the hidden states.
"""

import torch
from torch import nn

IGNORED = -100


class LinearCrossEntropy(torch.autograd.Function):
    """
    Cross-entropy [N] of `hidden_states` [N, W] times `weight` [V, W] for `labels` [N], 0 where a label is -100; and the logits
    [N, V] if `keeps_logits`, else None.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, chunk_length, keeps_logits):
        ctx.set_materialize_grads(False)
        kept = hidden_states.to(weight.dtype) @ weight.T if keeps_logits else None
        losses, normalisers = [], []
        for part in _chunks(labels, chunk_length):
            logits = _logits(hidden_states[part], weight, None if kept is None else kept[part])
            normaliser, label = logits.logsumexp(-1), labels[part]
            losses.append((normaliser - _chosen(logits, label)).masked_fill(label == IGNORED, 0))
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden_states, weight, labels, torch.cat(normalisers), kept)
        ctx.chunk_length = chunk_length
        return torch.cat(losses), kept

    @staticmethod
    def backward(ctx, gradient, logits_gradient):
        """d loss / d logits = softmax - onehot, chunk by chunk; the logits are computed again unless they were kept."""
        hidden_states, weight, labels, normalisers, kept = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        if gradient is None:
            gradient = torch.zeros_like(normalisers)
        gradient = gradient.masked_fill(labels == IGNORED, 0)
        for part in _chunks(labels, ctx.chunk_length):
            label = labels[part].clamp(min=0)[:, None]
            logits = _logits(hidden_states[part], weight, None if kept is None else kept[part])
            logits = logits.sub(normalisers[part, None]).exp_()
            logits.scatter_add_(1, label, -torch.ones_like(label, dtype=logits.dtype))
            logits = logits.mul_(gradient[part, None])
            if logits_gradient is not None:
                logits += logits_gradient[part]
            logits = logits.to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = logits @ weight
            if weight_gradient is not None:
                weight_gradient.addmm_(logits.T, hidden_states[part].to(weight.dtype))
        return hidden_gradient, weight_gradient, None, None, None


def _chunks(labels: torch.Tensor, chunk_length: int) -> list[slice]:
    return [slice(start, start + chunk_length) for start in range(0, len(labels), chunk_length)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Logits in float32 at least."""
    logits = hidden.to(weight.dtype) @ weight.T if kept is None else kept
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chosen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)


def losses_and_logits(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_length: int = 256,
    keeps_logits: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Cross-entropy of every token, [...], of `hidden_states` [..., W] times `weight` [V, W], 0 where a label is -100; and the
    logits [..., V], None unless they are kept.

    Beside kept logits, at most `chunk_length` x V exist at a time, in the forward and in the backward pass. Under autocast the
    products are in its type, the softmax in float32.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        losses, logits = LinearCrossEntropy.apply(flat, weight, labels.reshape(-1), chunk_length, keeps_logits)
    return losses.view(labels.shape), None if logits is None else logits.view(*labels.shape, -1)


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_length: int = 256
) -> torch.Tensor:
    """The losses of `losses_and_logits`, without logits."""
    return losses_and_logits(hidden_states, weight, labels, chunk_length, keeps_logits=False)[0]


def is_plain_head(head: nn.Module) -> bool:
    """Whether a head is its weight and nothing else: not quantised, wrapped, replaced or hooked."""
    has_hooks = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and head.bias is None and not has_hooks
