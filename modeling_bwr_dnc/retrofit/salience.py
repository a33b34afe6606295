"""
Salience heads for a converted model by linear discriminant analysis: one pass over some text, no gradients.

Facts that do not belong there are hidden in ordinary text, and the model reads it, its memory overflowing all the while. In
every layer, the inputs of the salience head at tokens of facts are told apart from those at all other tokens by Fisher's linear
discriminant, `w = ((C_text + C_facts) / 2)^-1 (mean_facts - mean_text)`, which is the best linear one if both are Gaussian with
the same covariance.

The head is then scaled, so that salience has a small standard deviation over ordinary text. Retention is salience plus usage, and
usage is a share of attention, mostly far below 0.01: a small salience lifts facts above nearly all use and leaves the order of the
rest to it. Since the salience bias of so small a logit is next to nothing, attention itself stays as it was.

Shapes: `T` tokens, `F` width of the hidden states.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .facts import Fact, hide_facts, make_fact, sentence_ends

BLOCK_LENGTH = 1024


@dataclass
class Moments:
    """Sums over the inputs of one salience head, at the tokens of one class."""

    count: float
    first: torch.Tensor  # [F]
    second: torch.Tensor  # [F, F]

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0.0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, inputs: torch.Tensor) -> None:
        """Take in [T, F]."""
        self.count += len(inputs)
        self.first += inputs.sum(0, dtype=torch.float64).cpu()
        self.second += (inputs.T @ inputs).double().cpu()

    @property
    def mean(self) -> torch.Tensor:
        return self.first / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.second / self.count - torch.outer(self.mean, self.mean)


def discriminant(text: Moments, facts: Moments, ridge: float) -> tuple[torch.Tensor, float]:
    """
    Direction [F] in which facts stand out, of standard deviation 1 over ordinary text, and by how many of those they do.

    Args:
        ridge: share of each feature's variance that is added to it, for few examples.
    """
    within = (text.covariance + facts.covariance) / 2
    within += ridge * torch.diag(within.diagonal())
    direction = torch.linalg.solve(within, facts.mean - text.mean)
    direction /= (direction @ text.covariance @ direction).sqrt()
    return direction, float(direction @ (facts.mean - text.mean))


def text_with_facts(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], draw: random.Random, gap: tuple[int, int]
) -> tuple[list[int], list[bool]]:
    """`token_ids` with a new fact at the end of a sentence every `gap` tokens (least and most), and which tokens are facts'."""
    places: dict[int, Fact] = {}
    place = draw.randrange(*gap)
    for end in sentence_ends(tokenizer, token_ids):
        if end >= place:
            places[end] = make_fact(draw)
            place = end + draw.randrange(*gap)
    return hide_facts(tokenizer, token_ids, places)


@torch.no_grad()
def fit_salience(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[int]],
    *,
    seed: int = 0,
    scale: float = 0.001,
    ridge: float = 0.01,
    gap: tuple[int, int] = (60, 400),
    on_progress: Callable[[int], object] | None = None,
) -> dict[int, float]:
    """
    Set the salience heads of `model`, from `texts` (token ids) in which facts are hidden on the way.

    Args:
        model: a BWR-DNC language model; it reads with its settings as they are, and should overflow.
        scale: standard deviation of salience over ordinary text.
        ridge: see `discriminant`.
        gap: least and most tokens between two facts.
        on_progress: called after every block with the number of tokens it held.

    Returns: by layer, how many standard deviations of ordinary text lie between it and the facts.

    Raises:
        ValueError: if the model has no state bank, or the texts hold no fact or nothing else.
    """
    layers = [layer.self_attn for layer in model.get_decoder().layers]
    heads = {index: layer.memory.salience for index, layer in enumerate(layers) if hasattr(layer, "memory")}
    if not heads:
        raise ValueError("the model has no 'state_bank_attention' layer, so there is no salience to fit")
    prepared = [
        text_with_facts(tokenizer, token_ids, random.Random(f"{seed} {number}"), gap)
        for number, token_ids in enumerate(texts)
    ]
    num_fact_tokens = sum(sum(is_fact) for _, is_fact in prepared)
    if not num_fact_tokens or not any(texts):
        raise ValueError(
            f"the texts have {sum(map(len, texts))} tokens, with {num_fact_tokens} tokens of facts hidden in them, but both are "
            f"needed; give longer texts, with sentences in them (a fact comes every {gap[0]} to {gap[1]} tokens)"
        )
    width = model.config.hidden_size
    moments = {index: (Moments.empty(width), Moments.empty(width)) for index in heads}
    now: list[torch.Tensor] = []

    def listen(index: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            of_facts = now[0].to(inputs[0].device)
            for is_fact, sums in enumerate(moments[index]):
                sums.add(inputs[0][0][of_facts == is_fact].float())

        return hook

    hooks = [head.register_forward_pre_hook(listen(index)) for index, head in heads.items()]
    try:
        for text, is_fact in prepared:
            # Sinks are never chosen, and stand out in every model: they belong to neither class.
            classes = torch.tensor([-1] * model.config.num_sink_tokens + is_fact[model.config.num_sink_tokens :])
            cache = None
            for start in range(0, len(text), BLOCK_LENGTH):
                block = torch.tensor([text[start : start + BLOCK_LENGTH]], device=model.device)
                now[:] = [classes[start : start + BLOCK_LENGTH]]
                cache = model(block, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
                if on_progress is not None:
                    on_progress(block.shape[1])
    finally:
        for hook in hooks:
            hook.remove()
    gaps = {}
    for index, (text_moments, fact_moments) in moments.items():
        direction, gaps[index] = discriminant(text_moments, fact_moments, ridge)
        weight = heads[index].weight
        weight.copy_((scale * direction).to(weight).expand_as(weight))
    return gaps
