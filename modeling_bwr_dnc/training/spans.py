"""
Reading a sequence in spans: the state bank goes from span to span, so that memory does not grow with the length.

Shapes: `B` rows, `T` tokens of the sequence, `V` ids.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..head_loss import head_gives_loss
from ..state_bank import StateBankCache
from ..token_loss import IGNORED

PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def shift_labels(labels: torch.Tensor, last: float = IGNORED) -> torch.Tensor:
    """Labels [B, T] as targets [B, T]: the target of a token is the label of the next one, also across span borders."""
    return F.pad(labels[:, 1:], (0, 1), value=last)


def read_in_spans(
    model: nn.Module,
    inputs: dict,
    span_length: int | None,
    loss_chunk_length: int,
    keeps_state: bool = True,
    **options,
) -> Iterator[tuple[torch.Tensor, StateBankCache | None]]:
    """
    Read `inputs` span by span; gives for each the sum of its token losses, and the cache after it.

    The caller may detach that cache before the next span is asked for, which truncates back-propagation there.

    Args:
        model: a BWR-DNC language model, also wrapped (DDP, PEFT).
        inputs: `input_ids` [B, T] or `inputs_embeds`, `labels` [B, T], and `attention_mask`, `position_ids`, `label_weights` if any.
        span_length: tokens of a span; None reads all at once.
        keeps_state: whether the cache after the last span is wanted; before that it always is.
        options: further arguments of the model's forward pass.
    """
    inputs = dict(inputs)
    targets = shift_labels(inputs.pop("labels"))
    weights = inputs.pop("label_weights", None)
    weights = None if weights is None else shift_labels(weights, 0.0)
    num_tokens = targets.shape[1]
    span_length = span_length or num_tokens
    head = output_head(model)
    cache = inputs.pop("past_key_values", None)
    for start in range(0, num_tokens, span_length):
        stop = min(start + span_length, num_tokens)
        span = {name: value[:, start:stop] if name in PER_TOKEN else value for name, value in inputs.items()}
        use_cache = keeps_state or stop < num_tokens
        weight = None if weights is None else weights[:, start:stop]
        with head_gives_loss(head, targets[:, start:stop], loss_chunk_length, weight):
            outputs = model(**span, **options, past_key_values=cache, use_cache=use_cache)
        cache = outputs.past_key_values
        yield outputs.logits, cache


def output_head(model: nn.Module) -> nn.Linear:
    """The language-model head behind any wrapper. Raises `ValueError` if it is no plain linear map."""
    while hasattr(model, "module"):
        model = model.module
    head = model.get_output_embeddings()
    if type(head).__name__ != "Linear" or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"The language-model head is a {type(head).__name__}, but the chunked loss needs a plain linear map without bias; "
            "leave `lm_head` out of the adapter's target modules and out of quantisation."
        )
    return head
