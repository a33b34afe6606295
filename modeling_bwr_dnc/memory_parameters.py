"""Which parameters of a model are its memory's."""

import torch
from torch import nn

# In the names of the learned parts of a memory: salience, routing, compressor.
MEMORY = ".memory."


def is_memory_parameter(name: str) -> bool:
    """Whether a parameter of a model belongs to the learned parts of its memory."""
    return MEMORY in name


def memory_in_float32(model: nn.Module) -> None:
    """Make the memory parameters float32 at least, to be trained: they compute in it anyway, and small steps are lost in less."""
    for name, parameter in model.named_parameters():
        if is_memory_parameter(name):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
