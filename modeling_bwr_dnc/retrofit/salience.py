"""
Salience heads for a converted model by linear discriminant analysis: one pass over some text, no gradients.

Facts that do not belong there are hidden in ordinary text, and the model reads it, its memory overflowing all the while. In
every layer, the inputs of the salience head at tokens of facts are told apart from those at all other tokens by Fisher's linear
discriminant, `w = ((C_text + C_facts) / 2)^-1 (mean_facts - mean_text)`, which is the best linear one if both are Gaussian with
the same covariance.

The head is then scaled, so that salience has a small standard deviation over ordinary text. Retention is salience plus usage, and
usage is a share of attention, mostly far below 0.01: a small salience lifts facts above nearly all use and leaves the order of the
rest to it. Since the salience bias of so small a logit is next to nothing, attention itself stays as it was.

With `repeats`, what a text will say again word for word, when its first saying has left the window, counts besides: the discriminant
between such tokens and all others, computed alike, becomes the second head, which lifts nothing above 0 and so displaces no fact. A
memory that has lost a heading cannot foresee it.

Last, a second, shorter reading finds the salience that only few tokens of ordinary text exceed, and the head is shifted so that it
is 0 there: `salience_boost` then favours facts alone. A head has no bias; the shift is along the direction in which the inputs vary
least beside their mean, `C_text^-1 mean_text`, which in a trained model is nearly constant (to 2 to 5% in SmolLM2-135M).

Shapes: `T` tokens, `F` width of the hidden states.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import read_blocks
from ..memory_ops import pooled_salience
from .facts import Fact, hide_facts, make_fact, sentence_ends

# The shift of a head may add so much noise to salience, in its standard deviations over ordinary text; else there is none.
NEGLIGIBLE_NOISE = 0.2


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
        self.first += inputs.cpu().sum(0, dtype=torch.float64)
        self.second += (inputs.T @ inputs).cpu().double()

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


def near_constant(text: Moments, ridge: float) -> tuple[torch.Tensor, float]:
    """Direction [F] whose product with inputs has the mean 1 over ordinary text, and the least variance; its standard deviation."""
    spread = text.covariance
    spread += ridge * torch.diag(spread.diagonal())
    direction = torch.linalg.solve(spread, text.mean)
    direction /= direction @ text.mean
    return direction, float((direction @ text.covariance @ direction).sqrt())


def text_with_facts(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], draw: random.Random, gap: tuple[int, int]
) -> tuple[list[int], list[bool], list[Fact]]:
    """`token_ids` with a new fact at the end of a sentence every `gap` tokens (least and most), which tokens are facts', and the facts."""
    places: dict[int, Fact] = {}
    place = draw.randrange(*gap)
    for end in sentence_ends(tokenizer, token_ids):
        if end >= place:
            places[end] = make_fact(draw)
            place = end + draw.randrange(*gap)
    return *hide_facts(tokenizer, token_ids, places), list(places.values())


def repetitions(token_ids: Sequence[int], width: int = 4) -> Iterator[tuple[int, int]]:
    """Where `width` tokens in a row end, last and now, for all that were there before; by the index of their last token."""
    last_use: dict[tuple[int, ...], int] = {}
    for end in range(width - 1, len(token_ids)):
        words = tuple(token_ids[end - width + 1 : end + 1])
        if words in last_use:
            yield last_use[words], end
        last_use[words] = end


def said_again(token_ids: Sequence[int], within: tuple[int, int], width: int = 4) -> list[bool]:
    """
    Which tokens end `width` tokens in a row that come again, next after more than the first and at most the second of `within`
    tokens.
    """
    marks = [False] * len(token_ids)
    for earlier, later in repetitions(token_ids, width):
        marks[earlier] = within[0] < later - earlier <= within[1]
    return marks


def said_before(token_ids: Sequence[int], beyond: int, width: int = 4) -> list[bool]:
    """Which tokens end `width` tokens in a row that were there before, last more than `beyond` tokens ago."""
    marks = [False] * len(token_ids)
    for earlier, later in repetitions(token_ids, width):
        marks[later] = later - earlier > beyond
    return marks


# Classes of tokens; those of none are -1.
TEXT, FACT, REPEATED = range(3)

# Told of a layer, the place of a block of tokens in the text, its inputs [T, F] to the salience head, and its salience [T].
Heard = Callable[[int, slice, torch.Tensor, torch.Tensor], None]


def listen(
    model: PreTrainedModel,
    heads: dict[int, nn.Module],
    token_ids: Sequence[int],
    heard: Heard,
    on_progress: Callable[[int], object] | None,
) -> None:
    """Read a text, and hand on what the salience heads of all layers get and give."""
    done = 0

    def hook_of(index: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
            # All key/value heads of a fitted layer have the same salience.
            heard(index, slice(done, done + outputs.shape[1]), inputs[0][0].float(), outputs[0, :, 0])

        return hook

    hooks = [head.register_forward_hook(hook_of(index)) for index, head in heads.items()]
    try:
        for start, hidden_states, _ in read_blocks(model, torch.tensor([token_ids])):
            done = start + hidden_states.shape[1]
            if on_progress is not None:
                on_progress(hidden_states.shape[1])
    finally:
        for hook in hooks:
            hook.remove()


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
    rare: float = 0.003,
    calibration: float = 0.15,
    repeats: float = 0.0,
    repeat_layers: Collection[int] | None = None,
    reach: int = 8192,
    num_tokens: int | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> dict[int, float]:
    """
    Set the salience heads of `model`, from `texts` (token ids) in which facts are hidden on the way.

    Args:
        model: a BWR-DNC language model; it reads with its settings as they are, and should overflow.
        scale: standard deviation of salience over ordinary text.
        ridge: see `discriminant`.
        gap: least and most tokens between two facts.
        rare: share of ordinary text whose salience, pooled as the model pools it, is above 0.
        calibration: share of each text that is read a second time, to find where that is.
        repeats: standard deviation of the second head, for what is said again word for word, in those of the first.
        repeat_layers: layers in which it counts; all by default.
        reach: tokens after which what is said again no longer counts.
        num_tokens: tokens that are read of each text; what is said again is looked for in all of it.
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
        text_with_facts(tokenizer, token_ids[:num_tokens], random.Random(f"{seed} {number}"), gap)[:2]
        for number, token_ids in enumerate(texts)
    ]
    num_fact_tokens = sum(sum(is_fact) for _, is_fact in prepared)
    if not num_fact_tokens or not any(texts):
        raise ValueError(
            f"the texts have {sum(map(len, texts))} tokens, with {num_fact_tokens} tokens of facts hidden in them, but both are "
            f"needed; give longer texts, with sentences in them (a fact comes every {gap[0]} to {gap[1]} tokens)"
        )
    if repeats:
        model.add_secondary_salience()
    moments = {index: [Moments.empty(model.config.hidden_size) for _ in range(3)] for index in heads}
    num_repeated = 0
    for token_ids, (text, is_fact) in zip(texts, prepared, strict=True):
        classes = torch.tensor(is_fact, device=model.device).long()
        if repeats:
            rest = [] if num_tokens is None else token_ids[num_tokens:][:reach]
            marks = said_again([*text, *rest], (2 * model.config.segment_length, reach))[: len(text)]
            again = torch.tensor(marks, device=model.device)
            classes[again & (classes == TEXT)] = REPEATED
            num_repeated += int((classes == REPEATED).sum())
        # Sinks are never chosen, and stand out in every model: they belong to no class.
        classes[: model.config.num_sink_tokens] = -1

        def add(index: int, tokens: slice, inputs: torch.Tensor, salience: torch.Tensor, classes=classes) -> None:
            for kind, sums in enumerate(moments[index]):
                sums.add(inputs[classes[tokens] == kind])

        listen(model, heads, text, add, on_progress)
    if repeats and not num_repeated:
        raise ValueError(
            f"`repeats` is {repeats}, but nothing is said again in the texts after more than {2 * model.config.segment_length} "
            "tokens; give longer texts, or leave it out"
        )

    gaps = {}
    for index, (of_text, of_facts, of_repeated) in moments.items():
        direction, gaps[index] = discriminant(of_text, of_facts, ridge)
        second = layers[index].memory.secondary_salience
        if second is not None:
            second.weight.zero_()
        if repeats and (repeat_layers is None or index in repeat_layers):
            lifted, constant = discriminant(of_text, of_repeated, ridge)[0], near_constant(of_text, ridge)[0]
            _set(second, repeats * scale * (lifted - (lifted @ of_text.mean) * constant))
        _set(heads[index], scale * direction)

    for index, shift in rare_salience(model, heads, prepared, rare, calibration, on_progress).items():
        constant, deviation = near_constant(moments[index][TEXT], ridge)
        if abs(shift) * deviation < NEGLIGIBLE_NOISE * scale:
            _set(heads[index], heads[index].weight[0].double().cpu() - shift * constant)
    return gaps


def rare_salience(
    model: PreTrainedModel,
    heads: dict[int, nn.Module],
    prepared: Sequence[tuple[list[int], list[bool]]],
    rare: float,
    calibration: float,
    on_progress: Callable[[int], object] | None,
) -> dict[int, float]:
    """By layer, the pooled salience that only a share `rare` of ordinary text exceeds, in the beginnings of texts with facts."""
    width = model.config.salience_pooling
    heard: dict[int, list[torch.Tensor]] = {index: [] for index in heads}
    for text, is_fact in prepared:
        count = max(round(calibration * len(text)), 2 * width)
        parts: dict[int, list[torch.Tensor]] = {index: [] for index in heads}

        def keep(index: int, tokens: slice, inputs: torch.Tensor, salience: torch.Tensor, parts=parts) -> None:
            parts[index].append(salience.cpu())

        listen(model, heads, text[:count], keep, on_progress)
        near_fact = pooled_salience(torch.tensor([[is_fact[:count]]]).double(), width)[0, 0] > 0
        near_fact[: model.config.num_sink_tokens] = True
        for index, part in parts.items():
            heard[index].append(pooled_salience(torch.cat(part).double()[None, None], width)[0, 0, ~near_fact])
    saliences = {index: torch.cat(part) for index, part in heard.items()}
    return {index: part.quantile(1 - rare).item() if len(part) else 0.0 for index, part in saliences.items()}


def _set(head: nn.Module, direction: torch.Tensor) -> None:
    head.weight.copy_(direction.to(head.weight).expand_as(head.weight))
