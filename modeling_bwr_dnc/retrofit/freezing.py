"""Training a few numbers of a model while all others stay as they are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def only_trained(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """While this lasts, no parameter of `model` but `trained` requires gradients; afterwards those do that did before."""
    required = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, is_required in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(is_required)
