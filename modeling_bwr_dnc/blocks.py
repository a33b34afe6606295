"""
Reading long input in blocks, so that memory does not grow with the length if the model's state does not; with any model.

Shapes: `B` rows, `T` tokens.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

BLOCK_LENGTH = 1024


@torch.no_grad()
def read_blocks(
    model: PreTrainedModel, input_ids: torch.Tensor, block_length: int = BLOCK_LENGTH, cache: object = None
) -> Iterator[tuple[int, torch.Tensor, object]]:
    """
    Read `input_ids` [B, T] block by block, after what `cache` has read; gives where each block starts, its last hidden states
    [B, block, hidden], and the cache after it.
    """
    model.eval()
    # A model with adapters has its decoder behind several wrappers, whose `forward` names no arguments.
    decoder = model.get_decoder()
    name = cache_name(decoder)
    for start in range(0, input_ids.shape[1], block_length):
        block = input_ids[:, start : start + block_length].to(model.device)
        outputs = decoder(input_ids=block, **{name: cache}, use_cache=True, **_without_attention(model, start, block))
        cache = getattr(outputs, name)
        yield start, outputs.last_hidden_state, cache


def _without_attention(model: PreTrainedModel, start: int, block: torch.Tensor) -> dict:
    """Models whose layers are all recurrent must be told where they are: Transformers asks the attention layers of a cache."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if model.config.model_type != "qwen3_next" or kinds != {"linear_attention"}:
        return {}
    positions = torch.arange(start, start + block.shape[1], device=block.device)
    return {"position_ids": positions[None], "attention_mask": dict.fromkeys(("full_attention", "linear_attention"))}


def cache_name(model: nn.Module) -> str:
    """What a model calls its cache: state space models have a name of their own for it."""
    accepted = _parameters(type(model).forward)
    return next(name for name in ("past_key_values", "cache_params") if name in accepted)


@cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
