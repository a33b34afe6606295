"""
Linear maps, in float32 on AMD's processors by oneDNN instead of MKL.

torch leaves products of float32 matrices to MKL, which uses no AVX-512 on processors of other makers, and one thread for a
matrix and a vector; oneDNN, which torch has on board as well, has no favourites. On two cores of an EPYC (Zen 5) it takes 0.45 of
the time for 1,024 rows, and 0.4 to 0.65 for one (`model_cards/results/speed_cpu_202611.md`). Everywhere else, for small products, and for
whatever is no plain tensor in float32, these are torch's own.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# With a smaller weight, and fewer products in all, MKL is done before oneDNN has found its kernel, which takes it 10 microseconds.
FEWEST_WEIGHTS, FEWEST_PRODUCTS = 1 << 18, 1 << 20
# Rows of a large gradient that are computed, and then added, together: few enough to be found in a processor's cache.
GRADIENT_ROWS = 2048


@cache
def prefers_onednn() -> bool:
    """Whether this is an AMD processor and a torch that has both libraries."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    described = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (described.read_text() if described.is_file() else platform.processor())


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `torch.nn.functional.linear` gives: [..., out] from inputs [..., in], weight [out, in] and bias [out]."""
    if not _suits_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (inputs, weight, bias)):
        return _OneDnnLinear.apply(inputs, weight, bias)
    return _onednn_linear(inputs, weight, bias)


def linear_into(out: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear`, without gradients, of inputs [N, in], written into `out` [N, out], which is returned."""
    if _suits_onednn(inputs, weight):
        return out.copy_(_onednn_linear(inputs, weight, None))
    return torch.mm(inputs, weight.T, out=out)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left.T @ right to a gradient `total` [V, W], which may be of a wider type, in place, from left [N, V] and right [N, W]."""
    if total.dtype != left.dtype:
        total += left.T @ right
        return
    if not _suits_onednn(left, right):
        total.addmm_(left.T, right)
        return
    for rows, columns in zip(total.split(GRADIENT_ROWS), left.split(GRADIENT_ROWS, dim=1), strict=True):
        rows += linear(columns.T, right.T)


def _suits_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes this product, [..., in] by [out, in]."""
    return (
        not torch.compiler.is_compiling()
        and prefers_onednn()
        and (weight.numel() >= FEWEST_WEIGHTS or inputs.numel() * weight.shape[0] >= FEWEST_PRODUCTS)
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and inputs.numel() > 0
        # Sharded, quantised and fake tensors have products of their own.
        and type(inputs) in (torch.Tensor, nn.Parameter)
        and type(weight) in (torch.Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # It takes any strides, but has fast kernels for dense tensors only.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(inputs.contiguous(), weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """`_onednn_linear` with gradients, which can be differentiated again."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return _onednn_linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias = ctx.needs_input_grad
        rows, read = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gradient, inputs))
        return (
            linear(gradient, weight.t()) if for_inputs else None,
            linear(rows.t(), read.t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear map and nothing else: not quantised, wrapped, replaced or hooked."""
    has_hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return type(module) is nn.Linear and not has_hooks and "forward" not in vars(module)


def apply_linear(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`module(inputs)`. A subclass of `nn.Linear` would be the same with less, but quantisers take only itself for one."""
    return linear(inputs, module.weight, module.bias) if is_plain(module) else module(inputs)


def gated_linear(module: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """
    `apply_linear(module, silu(gate) * up)`, which keeps nothing else for the backward pass; None where a checkpoint does as well.

    A checkpoint computes again until it has what the last product is to keep, and so without that product; but with it, if the
    product is an autograd function, whose forward pass ends before anything is kept.
    """
    if not is_plain(module) or module.bias is not None or not _suits_onednn(gate, module.weight):
        return None
    return _GatedLinear.apply(gate, up, module.weight)


class _GatedLinear(torch.autograd.Function):
    """See `gated_linear`."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return _onednn_linear(F.silu(gate).mul_(up), weight, None)

    @staticmethod
    def backward(ctx, gradient):
        gate, up, weight = ctx.saved_tensors
        active, mixed_gradient = F.silu(gate), linear(gradient, weight.t())
        for_weight = None
        if ctx.needs_input_grad[2]:
            for_weight = linear(gradient.flatten(0, -2).t(), (active * up).flatten(0, -2).t())
        for_gate = mixed_gradient * up
        if torch.is_grad_enabled():
            # What is to be differentiated once more.
            share = gate.sigmoid()
            for_gate = for_gate * (share + active * (1 - share))
        else:
            for_gate = torch.ops.aten.silu_backward(for_gate, gate)
        return for_gate, mixed_gradient * active, for_weight
