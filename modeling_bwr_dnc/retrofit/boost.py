"""
How much more attention salient slots get, by layer: a few dozen numbers, fitted by gradients through questions and prose alone.

A model reads some stretches of text, short and long ones, with facts hidden in them, its memory overflowing, and no gradient. Then, with
gradients to the boosts only, it is asked for some of the facts of one of them at a time, and reads on. The boosts minimise the mean loss
of the answers plus `prose_weight` times that of what follows in the text: without the latter every layer would stare at what is
salient, whatever it reads. What is held depends on the boosts but a little, so a stretch is read once, however often it is asked about.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import read_blocks
from ..settings import settings_changed
from ..state_bank import StateBankCache
from .facts import Fact
from .freezing import only_trained
from .salience import text_with_facts

# A boost below this is none.
NEGLIGIBLE = 0.05


# Least and most tokens that a memory has read, in times of `config.max_keys`, and tokens that are read on after them.
LENGTHS = (1.5, 16.0)
NUM_PROSE = 256


@dataclass
class Stretch:
    """A memory of some text, the facts that were hidden in it, and what comes next: the last token of the text first."""

    memory: StateBankCache
    facts: list[Fact]
    after: list[int]


def fit_attention_boost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[int]],
    *,
    seed: int = 0,
    num_steps: int = 64,
    num_stretches: int = 8,
    lengths: tuple[float, float] = LENGTHS,
    num_facts: int = 12,
    num_questions: int = 6,
    num_prose: int = NUM_PROSE,
    prose_weight: float = 4.0,
    learning_rate: float = 0.15,
    start: float = 1.0,
    on_read: Callable[[int], object] | None = None,
    on_step: Callable[[int, float, float], object] | None = None,
) -> list[float]:
    """
    Set `config.attention_boost` of `model`, whose salience is fitted already, and return it: one number per layer.

    Args:
        num_stretches: memories that are asked, in turns; each is held until the end. They are of all texts, in turns.
        lengths: least and most that one has read, in times of `config.max_keys`, as far as the shortest text reaches; the others lie
            between, evenly by their logarithms.
        num_facts: facts hidden in a stretch, about.
        num_questions, num_prose: facts that are asked for, and tokens that are read on, in each step.
        learning_rate: of Adam; it sinks to nothing in the second half.
        start: all boosts at the beginning, above 0.
        on_read: called after every block of reading with the number of tokens it held.
        on_step: called with the number of the step, the loss of its answers and of its prose, in nats per token.

    Raises:
        ValueError: if the model has no slots, `start` is not above 0, or a text is shorter than the least of `lengths` and `num_prose` ask for.
    """
    config = model.config
    if not config.use_memory or not any(config.memory_slots):
        raise ValueError(
            "the model reads no slots, so none can gain attention; give it some (`memory_slots`, `use_memory`)"
        )
    if not start > 0:
        raise ValueError(f"start is {start}, but must be above 0, below which no boost can go")
    shortest, longest = checked_lengths(model, texts, lengths, num_prose)
    sizes = stretch_lengths(num_stretches, [shortest, longest])
    draw = random.Random(f"{seed} boost")
    with settings_changed(model, attention_boost=start):
        stretches = [
            read_stretch(model, tokenizer, texts[number % len(texts)], size, num_facts, num_prose, draw, on_read)
            for number, size in enumerate(sizes)
        ]
    raw = torch.full((config.num_hidden_layers,), start).expm1().log().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=learning_rate)
    try:
        with only_trained(model):
            for step in range(num_steps):
                optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 2 * (num_steps - step) / num_steps)
                stretch = stretches[step % len(stretches)]
                boosts = F.softplus(raw)
                # A leaf, in which the gradients of all losses of this step add up.
                seen = boosts.detach().requires_grad_()
                _set_boosts(model, seen)
                prose = _loss(model, stretch.memory, stretch.after, num_prose)
                (prose_weight * prose).backward()
                answers = 0.0
                asked = draw.sample(stretch.facts, min(num_questions, len(stretch.facts)))
                for fact in asked:
                    question, answer = fact.token_ids(tokenizer)
                    loss = _loss(model, stretch.memory, [stretch.after[0], *question, *answer], len(answer))
                    (loss / len(asked)).backward()
                    answers += loss.item() / len(asked)
                boosts.backward(seen.grad)
                optimizer.step()
                optimizer.zero_grad()
                if on_step is not None:
                    on_step(step, answers, prose.item())
    finally:
        found = F.softplus(raw).tolist()
        config.attention_boost = [round(boost, 3) if boost >= NEGLIGIBLE else 0.0 for boost in found]
    return config.attention_boost


def checked_lengths(
    model: PreTrainedModel,
    texts: Sequence[list[int]],
    lengths: tuple[float, float] = LENGTHS,
    num_prose: int = NUM_PROSE,
) -> tuple[int, int]:
    """Least and most tokens of a stretch of `fit_attention_boost`. Raises `ValueError` if a text is shorter than they ask for."""
    shortest, longest = (round(times * model.config.max_keys) for times in lengths)
    available = min(map(len, texts)) - num_prose
    if available < shortest:
        raise ValueError(
            f"a text has {available + num_prose} tokens, but fitting the attention boosts takes {shortest + num_prose} at least; give "
            "longer texts, or leave the boosts out"
        )
    return shortest, min(longest, available)


def stretch_lengths(count: int, ends: Sequence[int]) -> list[int]:
    """`count` lengths from the first of `ends` to the last, evenly by their logarithms, long ones and short ones in turns."""
    first, last = (math.log(end) for end in ends)
    even = [round(math.exp(first + (last - first) * i / max(count - 1, 1))) for i in range(count)]
    half = (count + 1) // 2
    return [length for pair in zip(even[:half], [*even[half:], None]) for length in pair if length is not None]


@torch.no_grad()
def read_stretch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    length: int,
    num_facts: int,
    num_prose: int,
    draw: random.Random,
    on_read: Callable[[int], object] | None,
) -> Stretch:
    """Read `length` tokens of a text from a random place on, with facts hidden in them."""
    begin = draw.randrange(len(token_ids) - length - num_prose + 1)
    end, gap = begin + length, max(length // num_facts, 2)
    text, _, facts = text_with_facts(tokenizer, token_ids[begin:end], draw, (gap // 2, gap + gap // 2))
    for _, hidden_states, cache in read_blocks(model, torch.tensor([text[:-1]])):
        memory = cache
        if on_read is not None:
            on_read(hidden_states.shape[1])
    return Stretch(memory, facts, [text[-1], *token_ids[end : end + num_prose]])


def _set_boosts(model: PreTrainedModel, boosts: torch.Tensor) -> None:
    """Past the check of the config, which takes numbers only: gradients flow to these."""
    vars(model.config)["attention_boost"] = list(boosts.to(model.device).unbind())


def _loss(model: PreTrainedModel, memory, token_ids: list[int], count: int) -> torch.Tensor:
    """Mean loss of the last `count` of some tokens after what a memory has read, which stays as it is."""
    ids = torch.tensor([token_ids], device=model.device)
    # That something in it requires a gradient is what makes a layer read with gradients.
    embedded = model.get_input_embeddings()(ids[:, :-1]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, past_key_values=memory, use_cache=False, logits_to_keep=count).logits
    return F.cross_entropy(logits[0].float(), ids[0, -count:])
