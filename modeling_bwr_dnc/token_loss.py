"""
Cross-entropy of a language-model head, with the logits of one chunk of tokens at a time, or of logits that are wanted anyway, of
which then no second and third copy arises.

The gradients are made in the forward pass, while a chunk's logits are there, as Liger Kernel does (Hsu et al., 2024): logits are
computed once, and the backward pass holds none. They cannot be differentiated once more, and say so.

`torch.nn.functional.linear_cross_entropy` has chunks, too, but took 21.6 s on a CPU where the plain loss took 5.2 s
(forward and backward, 1,024 tokens, width 1,024, 50,000 ids, torch 2.13, one thread), and it is absent before torch 2.13.

Shapes: `N` tokens, `V` ids, `W` width of the hidden states.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .linear import add_product, is_plain, linear, linear_into

IGNORED = -100


class LinearCrossEntropy(torch.autograd.Function):
    """See `summed_cross_entropy`, here of `hidden_states` [N, W], `labels` [N] and `label_weights` [N]."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, label_weights, chunk_length, keeps_logits, is_grad_enabled):
        ctx.set_materialize_grads(False)
        for_hidden, for_weight = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden_states) if for_hidden else None
        # A sum over all tokens could leave the range of float16, where no loss scale would bring it back.
        summed = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        weight_gradient = torch.zeros_like(weight, dtype=summed) if for_weight else None
        kept = linear(hidden_states, weight) if keeps_logits else None
        precise = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=weight.device)
        # One for all chunks: on a CPU most of the time of a large new tensor goes into its first touch.
        buffer = weight.new_empty(min(chunk_length, len(labels)), len(weight), dtype=precise)
        for start in range(0, len(labels), chunk_length):
            part = slice(start, start + chunk_length)
            counts = (labels[part] != IGNORED).to(precise)[:, None]
            if label_weights is not None:
                counts = counts * label_weights[part, None].to(precise)
            label, shares = labels[part].masked_fill(labels[part] == IGNORED, 0)[:, None], buffer[: len(counts)]
            if kept is not None:
                logits = kept[part].to(precise)
            elif weight.dtype == precise:
                logits = linear_into(shares, hidden_states[part], weight)
            else:
                logits = (hidden_states[part] @ weight.T).to(precise)
            chosen, highest = logits.gather(1, label), logits.amax(-1, keepdim=True)
            torch.sub(logits, highest, out=shares).exp_()
            sums = shares.sum(-1, keepdim=True)
            total += ((highest + sums.log() - chosen).masked_fill(counts == 0, 0) * counts).sum()
            if for_hidden or for_weight:
                # d loss / d logits = softmax - onehot
                gradient = shares.mul_(counts / sums).scatter_add_(1, label, -counts).to(weight.dtype)
                if for_hidden:
                    linear_into(hidden_gradient[part], gradient, weight.T)
                if for_weight:
                    add_product(weight_gradient, gradient, hidden_states[part])
        ctx.dtypes = hidden_states.dtype, weight.dtype
        inputs = (hidden_states, weight) if keeps_logits else (None, None)
        ctx.save_for_backward(hidden_gradient, weight_gradient, *inputs)
        return total, kept

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, logits_gradient):
        *made, hidden_states, weight = ctx.saved_tensors
        gradients: list[torch.Tensor | None] = [None, None]
        if gradient is not None:
            gradients = [
                None if part is None else (part * gradient.to(part.dtype)).to(dtype)
                for part, dtype in zip(made, ctx.dtypes, strict=True)
            ]
        if logits_gradient is not None:
            # Something else was made of the logits, too.
            if ctx.needs_input_grad[0]:
                gradients[0] = _sum(gradients[0], logits_gradient @ weight)
            if ctx.needs_input_grad[1]:
                gradients[1] = _sum(gradients[1], logits_gradient.T @ hidden_states)
        return *gradients, None, None, None, None, None


def _sum(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    return second if first is None else first + second


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type of autocast on a kind of device; None where it is off, or there is none."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def summed_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_length: int = 256,
    keeps_logits: bool = False,
    label_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Sum of the cross-entropies of `hidden_states` [..., W] times `weight` [V, W] for `labels` [...], of which -100 counts
    nothing, each times its weight if there are `label_weights` [...]; and the logits [..., V], None unless they are kept.

    Beside kept logits, at most `chunk_length` x V exist at a time. Under autocast the products are in its type, the softmax in
    float32.
    """
    if hidden_states.shape[:-1] != labels.shape:
        raise ValueError(
            f"the hidden states are of {list(hidden_states.shape[:-1])} tokens, but the labels of {list(labels.shape)}; something has put "
            "tokens of its own before them, such as a learned prompt"
        )
    device = hidden_states.device.type
    wanted = autocast_dtype(device)
    dtype = wanted or weight.dtype
    with nullcontext() if wanted is None else torch.autocast(device, enabled=False):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
        options = (chunk_length, keeps_logits, torch.is_grad_enabled())
        label_weights = None if label_weights is None else label_weights.reshape(-1)
        total, logits = LinearCrossEntropy.apply(flat, weight.to(dtype), labels.reshape(-1), label_weights, *options)
    return total, None if logits is None else logits.view(*labels.shape, -1)


def is_plain_head(head: nn.Module) -> bool:
    """Whether a head is its weight and nothing else."""
    return is_plain(head) and head.bias is None
