"""
Salience heads for a converted model by logistic regression: one pass over some text, no gradients through the model.

Facts that do not belong there are hidden in ordinary text, and the model reads it, its memory overflowing all the while. In
every layer, the inputs of the salience head, averaged over the tokens around each as salience is (`salience_pooling`), are told
apart at tokens of facts and elsewhere by a penalised logistic regression. What counts is the tail: of 100,000 tokens of ordinary text
a few hundred may be taken for facts, or there is no room for those. Fisher's discriminant, which looks at means and covariances
alone, is worse there.

The head is then scaled, so that salience has a small standard deviation over ordinary text. Retention is salience plus usage, and
usage is a share of attention, mostly far below 0.01: a small salience lifts facts above nearly all use and leaves the order of the
rest to it. Since the salience bias of so small a logit is next to nothing, attention itself stays as it was. And it is shifted so
that it is 0 where only few tokens of ordinary text are above: `salience_boost` then favours facts alone. A head has no bias; the shift
is along the direction in which the inputs vary least beside their mean, `C_text^-1 mean_text`, which in a trained model is nearly
constant (to 2 to 5% in SmolLM2-135M).

With `repeats`, what a text will say again word for word, when its first saying has left the window, counts besides: Fisher's
discriminant between such tokens and all others, `((C_text + C_repeated) / 2)^-1 (mean_repeated - mean_text)`, becomes the second head,
which lifts nothing above 0 and so displaces no fact. A memory that has lost a heading cannot foresee it.

Shapes: `T` tokens, `F` width of the hidden states.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import read_blocks
from ..memory_ops import pooled_salience
from .facts import Fact, hide_facts, make_fact, sentence_ends

# The shift of a head may add so much noise to salience, in its standard deviations over ordinary text; else there is none.
NEGLIGIBLE_NOISE = 0.2
# How much the regression minds ordinary text that is taken for a fact.
TEXT_WEIGHT = 10.0
# Of so many tokens of ordinary text one is an example.
EVERY = 2
# Texts are read side by side, as far as the shortest reaches, if that is at least such a share of the longest.
ALIKE = 0.9


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


def discriminant(text: Moments, others: Moments, ridge: float) -> torch.Tensor:
    """
    Direction [F] in which others stand out, of standard deviation 1 over ordinary text.

    Args:
        ridge: share of each feature's variance that is added to it, for few examples.
    """
    within = (text.covariance + others.covariance) / 2
    within += ridge * torch.diag(within.diagonal())
    direction = torch.linalg.solve(within, others.mean - text.mean)
    return direction / (direction @ text.covariance @ direction).sqrt()


def logistic_direction(
    text: torch.Tensor, facts: torch.Tensor, constant: torch.Tensor, penalty: float
) -> torch.Tensor:
    """
    Direction [F], of mean 0 and standard deviation 1 over ordinary text, that tells facts [M, F] from text [N, F] by logistic
    regression.

    Args:
        constant: see `near_constant`. A head has no bias; the mean of the inputs is taken off along this direction.
        penalty: of the squared weights of standardised features, beside the mean losses of both classes, that of text ten times.
    """
    mean = text.mean(0)
    constant = (constant / (constant @ mean.double())).float()
    inputs = torch.cat((text, facts))
    inputs = inputs - torch.outer(inputs @ constant, mean)
    deviation = inputs[: len(text)].std(0).clamp(min=1e-6)
    inputs /= deviation
    is_fact = torch.arange(len(inputs), device=inputs.device) >= len(text)
    share = torch.where(is_fact, 1 / len(facts), TEXT_WEIGHT / len(text))
    weight, bias = (inputs.new_zeros(size).requires_grad_() for size in (inputs.shape[1], 1))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=80, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(inputs @ weight + bias, is_fact.float(), reduction="none")
        loss = losses @ share + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    direction = weight.detach() / deviation
    direction = centred(direction, mean, constant).double()
    return direction / (text.double() @ direction).std()


def centred(direction: torch.Tensor, mean: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
    """`direction` [F] less a part along `near_constant`, so that it is 0 at the `mean` [F] of ordinary text."""
    return direction - (direction @ mean) * constant


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


# Classes of tokens.
NONE, TEXT, FACT, REPEATED = range(-1, 3)

# Told of a layer, the place of a block of tokens in the texts, and its inputs [B, T, F] to the salience head.
Heard = Callable[[int, slice, torch.Tensor], None]


def batches_of_alike(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of the texts to read side by side, by their `lengths`; those without a token are left out."""
    numbers = [number for number, length in enumerate(lengths) if length]
    if batch_size > 1:
        numbers.sort(key=lambda number: -lengths[number])
    batches: list[list[int]] = []
    for number in numbers:
        is_full = not batches or len(batches[-1]) == batch_size
        if is_full or lengths[number] < ALIKE * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(number)
    return batches


def memories_of(model: PreTrainedModel, layers: Collection[int] | None = None) -> dict[int, nn.Module]:
    """The learned parts of the state banks, by layer, of some layers or all. Raises `ValueError` if there is none."""
    attentions = enumerate(layer.self_attn for layer in model.get_decoder().layers)
    memories = {index: attention.memory for index, attention in attentions if hasattr(attention, "memory")}
    memories = {index: memory for index, memory in memories.items() if layers is None or index in layers}
    if not memories:
        where = "" if layers is None else f" among {list(layers)}"
        raise ValueError(f"the model has no 'state_bank_attention' layer{where}, so there is no salience to fit")
    return memories


def averaged(inputs: torch.Tensor, width: int) -> torch.Tensor:
    """Inputs [B, T, F] of a salience head, or marks, averaged over the tokens around each as salience is."""
    return pooled_salience(inputs.transpose(1, 2), width).transpose(1, 2)


def listen(
    model: PreTrainedModel,
    heads: dict[int, nn.Module],
    rows: Sequence[Sequence[int]],
    heard: Heard,
    on_progress: Callable[[int], object] | None,
) -> None:
    """Read texts of one length side by side, and hand on what the salience heads of all layers get."""
    done = 0

    def hook_of(index: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            heard(index, slice(done, done + inputs[0].shape[1]), inputs[0].float())

        return hook

    hooks = [head.register_forward_pre_hook(hook_of(index)) for index, head in heads.items()]
    try:
        for start, hidden_states, _ in read_blocks(model, torch.tensor(rows)):
            done = start + hidden_states.shape[1]
            if on_progress is not None:
                on_progress(len(rows) * hidden_states.shape[1])
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
    penalty: float = 0.01,
    ridge: float = 0.01,
    gap: tuple[int, int] = (60, 400),
    rare: float = 0.001,
    repeats: float = 0.0,
    repeat_layers: Collection[int] | None = None,
    reach: int = 8192,
    num_tokens: int | None = None,
    batch_size: int = 1,
    on_progress: Callable[[int], object] | None = None,
) -> dict[int, float]:
    """
    Set the salience heads of `model`, from `texts` (token ids) in which facts are hidden on the way.

    All tokens of facts, and every second other one, are held in half precision until the end: 1 GB for 50,000 of them in 30 layers
    of width 576.

    Args:
        model: a BWR-DNC language model; it reads with its settings as they are, and should overflow.
        scale: twice the standard deviation of salience, averaged as the model does, over ordinary text.
        penalty: see `logistic_direction`.
        ridge: see `discriminant`.
        gap: least and most tokens between two facts.
        rare: share of ordinary text whose averaged salience is above 0.
        repeats: standard deviation of the second head, for what is said again word for word, before it is averaged, in times of `scale`.
        repeat_layers: layers in which it counts; all by default.
        reach: tokens after which what is said again no longer counts.
        num_tokens: tokens that are read of each text; what is said again is looked for in all of it.
        batch_size: at most so many texts, whose lengths differ by a tenth at most, are read side by side, as far as the shortest of
            them reaches; a GPU needs many to be busy.
        on_progress: called after every block with the number of tokens it held.

    Returns: by layer, how many standard deviations of ordinary text lie between it and the facts.

    Raises:
        ValueError: if the model has no state bank, or the texts hold no fact or nothing else.
    """
    memories = memories_of(model)
    heads = {index: memory.salience for index, memory in memories.items()}
    prepared = [
        text_with_facts(tokenizer, token_ids[:num_tokens], random.Random(f"{seed} {number}"), gap)[:2]
        for number, token_ids in enumerate(texts)
    ]
    lengths = [len(text) for text, _ in prepared]
    num_fact_tokens = sum(sum(is_fact) for _, is_fact in prepared)
    if not num_fact_tokens or not any(texts):
        raise ValueError(
            f"the texts have {sum(map(len, texts))} tokens, with {num_fact_tokens} tokens of facts hidden in them, but both are "
            f"needed; give longer texts, with sentences in them (a fact comes every {gap[0]} to {gap[1]} tokens)"
        )
    if repeats:
        model.add_secondary_salience()
    width = model.config.salience_pooling
    moments = {index: {kind: Moments.empty(model.config.hidden_size) for kind in (TEXT, REPEATED)} for index in heads}
    examples: dict[int, dict[int, list[torch.Tensor]]] = {index: {TEXT: [], FACT: []} for index in heads}
    num_repeated = 0
    for batch in batches_of_alike(lengths, batch_size):
        length = min(lengths[number] for number in batch)
        classes = torch.tensor([prepared[number][1][:length] for number in batch], device=model.device).long()
        if repeats:
            for row, number in enumerate(batch):
                rest = [] if num_tokens is None else texts[number][num_tokens:][:reach]
                marks = said_again([*prepared[number][0], *rest], (2 * model.config.segment_length, reach))[:length]
                again = torch.tensor(marks, device=model.device)
                classes[row, again & (classes[row] == TEXT)] = REPEATED
            num_repeated += int((classes == REPEATED).sum())
        # Sinks are never chosen, and stand out in every model: they belong to no class.
        classes[:, : model.config.num_sink_tokens] = NONE
        # What is averaged with a fact is no example of ordinary text.
        is_far = averaged((classes == FACT).float()[..., None], width)[..., 0] == 0
        is_ordinary = is_far & (classes != NONE)
        is_ordinary[:, torch.arange(length) % EVERY != 0] = False

        def add(index: int, tokens: slice, inputs: torch.Tensor, classes=classes, is_ordinary=is_ordinary) -> None:
            for kind, sums in moments[index].items():
                sums.add(inputs[classes[:, tokens] == kind])
            pooled = averaged(inputs, width)
            for kind, chosen in ((TEXT, is_ordinary[:, tokens]), (FACT, classes[:, tokens] == FACT)):
                examples[index][kind].append(pooled[chosen].half().cpu())

        listen(model, heads, [prepared[number][0][:length] for number in batch], add, on_progress)
    if repeats and not num_repeated:
        raise ValueError(
            f"`repeats` is {repeats}, but nothing is said again in the texts after more than {2 * model.config.segment_length} "
            "tokens; give longer texts, or leave it out"
        )

    gaps = {}
    for index, sums in moments.items():
        ordinary, facts = (torch.cat(examples[index].pop(kind)).to(model.device).float() for kind in (TEXT, FACT))
        if len(ordinary) < 2:
            raise ValueError(
                f"with a fact every {gap[0]} to {gap[1]} tokens and salience averaged over {width} none is ordinary text; ask for "
                "wider gaps"
            )
        constant, deviation = near_constant(sums[TEXT], ridge)
        constant = constant.to(model.device)
        direction = logistic_direction(ordinary, facts, constant, penalty)
        saliences = ordinary.double() @ direction
        gaps[index] = float((facts.double() @ direction).mean() - saliences.mean())
        shift = float(saliences.quantile(1 - rare))
        if abs(shift) * deviation < NEGLIGIBLE_NOISE:
            direction -= shift * constant
        _set(heads[index], scale / 2 * direction)
        second = memories[index].secondary_salience
        if second is not None:
            second.weight.zero_()
        if repeats and (repeat_layers is None or index in repeat_layers):
            lifted = discriminant(sums[TEXT], sums[REPEATED], ridge)
            _set(second, repeats * scale * centred(lifted, sums[TEXT].mean, constant.cpu()))
    return gaps


def _set(head: nn.Module, direction: torch.Tensor) -> None:
    head.weight.copy_(direction.to(head.weight).expand_as(head.weight))
