"""
Several facts hidden in one long text, read once, and each asked for from a fork of the memory that the text left.

Seven of the eight kinds of facts are of other templates and wordings than those that `retrofit` teaches a memory with, with other
names but for the months and some words in names of ships. The eighth, the passkey, is close to one that is taught; so kinds are
counted apart, too.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import read_blocks
from ..retrofit.facts import Fact, hide_facts, sentence_ends
from ..settings import settings_changed
from ..state_bank import StateBankCache
from .measuring import points, read_losses
from .metrics.answer_accuracy.answer_accuracy import answer_accuracy
from .peers import plain_cache_nbytes
from .policies import PINNED, policy_settings

CHOICES = {
    "name": "Thorvald Gunnarsson,Priscilla Applegate,Mbali Dlamini,Ferdinand Oyelaran,Svetlana Morozova,Aiko Shimizu".split(
        ","
    ),
    "ship": "Sea Falcon,Northern Star,Iron Duchess,Golden Plover,Lady Morgana,Silver Kestrel".split(","),
    "city": "Samarkand Reykjavik Valparaiso Tashkent Marrakesh Ljubljana Adelaide Nairobi Winnipeg Antwerp".split(),
    "month": "February March May June August September November".split(),
    "advice": [
        "never trust a smiling cat",
        "bury the violin beneath the oldest pear tree",
        "the moon is only a lantern for thieves",
        "seven geese know the way to the treasure",
        "salt the bread before the soldiers arrive",
        "a frozen river remembers every footstep",
    ],
    "dish": "saffron rice with quail,smoked eel on toast,walnut pancakes,beetroot dumplings,goat cheese pie".split(
        ","
    ),
}
KINDS = {
    "name": "The captain of the {ship} was [{name}]. | Who was the captain of the {ship}?",
    "place": "The stolen painting was finally found in [{city}]. | Where was the stolen painting found?",
    "code": "To open the vault, type [{hex}] on the keypad. | What must one type to open the vault?",
    "date": "The comet will be visible again on [{day} {month}, {year}]. | When will the comet be visible again?",
    "sentence": "The hermit's last advice was: [{advice}]. | What was the hermit's last advice?",
    "number": "The number of lanterns lit for the regatta was [{count}]. | How many lanterns were lit for the regatta?",
    "dish": "At the wedding of the twins everyone ate [{dish}]. | What did everyone eat at the wedding of the twins?",
    "passkey": "The pass key is [{key}]. Remember it. {key} is the pass key. | What is the pass key?",
}


def unseen_facts(draw: random.Random) -> list[Fact]:
    """One fact of every kind, in random order."""
    numbers = {
        "hex": "".join(draw.choice("0123456789ABCDEF") for _ in range(6)),
        "day": str(draw.randrange(1, 29)),
        "year": str(draw.randrange(2030, 2099)),
        "count": str(draw.randrange(1100, 9900)),
        "key": str(draw.randrange(10_000, 100_000)),
    }
    facts = [
        replace(
            Fact.parse(template, lambda name: numbers[name] if name in numbers else draw.choice(CHOICES[name])),
            kind=kind,
        )
        for kind, template in KINDS.items()
    ]
    draw.shuffle(facts)
    return facts


def text_to_recall(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], length: int, draw: random.Random
) -> tuple[list[int], list[bool], list[Fact]]:
    """
    About `length` tokens of a text from a random place on, with a fact of every kind spread over it; which of the tokens are a
    fact's; and the facts in order.

    Raises:
        ValueError: if the text is too short, or the length has no room for the facts.
    """
    facts = unseen_facts(draw)
    room = length - sum(len(tokenizer(" " + fact.sentence).input_ids) for fact in facts)
    if room < len(facts):
        raise ValueError(f"a length of {length} has no room for {len(facts)} facts; ask for more tokens")
    if len(token_ids) < room:
        raise ValueError(
            f"the text has {len(token_ids)} tokens, but a length of {length} needs {room}; give a longer text"
        )
    start = draw.randrange(len(token_ids) - room + 1)
    hay = token_ids[start : start + room]
    ends = sentence_ends(tokenizer, hay)
    places: dict[int, Fact] = {}
    for index, fact in enumerate(facts):
        depth = (index + draw.random()) / len(facts) * room
        free = [end for end in ends if end not in places] or [room - index]
        places[min(free, key=lambda end: abs(end - depth))] = fact
    return *hide_facts(tokenizer, hay, places), [places[place] for place in sorted(places)]


def texts_to_recall(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], length: int, num_texts: int, seed: int
) -> Iterator[tuple[list[int], list[bool], list[Fact]]]:
    """As many texts as asked for, see `text_to_recall`; a seed always gives the same ones."""
    for number in range(num_texts):
        yield text_to_recall(tokenizer, token_ids, length, random.Random(f"{seed} {number}"))


Answer = tuple[list[int], list[int]]  # said and true ids


@dataclass
class Recalled:
    """What a model made of a text with facts: its answers, the losses of the tokens, and the bytes of its memory."""

    answers: list[Answer]
    losses: torch.Tensor  # [T - 1] of every token but the first, nats
    state_bytes: int

    def loss_from(self, token: int) -> float:
        """Mean loss in nats of the tokens after number `token`."""
        return self.losses[token:].mean().item()


def recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], facts: Sequence[Fact]
) -> Recalled:
    """Read a text once, with the losses of its tokens, then put the question of every fact to a copy of the memory."""
    losses = []
    for block_losses, memory in read_losses(model, torch.tensor([token_ids])):
        losses.append(block_losses[0])
        cache = memory
    answers = [answer_from(answer_logits(model, tokenizer, cache, fact), tokenizer, fact) for fact in facts]
    return Recalled(answers, torch.cat(losses), cache.nbytes)


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: StateBankCache, fact: Fact
) -> torch.Tensor:
    """Logits [A, V] at the tokens of a fact's answer, given the true ones before, when a copy of a memory is asked for it."""
    question, answer = fact.token_ids(tokenizer)
    asked = torch.tensor([question + answer], device=model.device)
    return model(asked, past_key_values=cache.clone(), use_cache=True).logits[0, len(question) - 1 : -1]


def answer_from(logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase, fact: Fact) -> Answer:
    """What is said are the most likely ids of the answer, given the true ones before."""
    return logits.argmax(-1).tolist(), fact.token_ids(tokenizer)[1]


@torch.no_grad()
def memory_of(model: PreTrainedModel, text: torch.Tensor, pinned: Sequence[bool] | None = None):
    """What a model keeps of `text` [1, T]; tokens that are `pinned` it never gives up."""
    cache = None
    if pinned is not None:
        # Spans can be pinned before they are read, but not before anything is.
        cache = model(text[:, :1].to(model.device), use_cache=True).past_key_values
        for start, stop in _runs(pinned):
            cache.pin(start, stop)
        text = text[:, 1:]
    for _, _, memory in read_blocks(model, text, cache=cache):
        cache = memory
    return cache


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Where marked stretches begin and end."""
    edges = [i for i, (before, mark) in enumerate(pairwise([False, *marks, False])) if before != mark]
    return list(zip(edges[::2], edges[1::2]))


def accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """`exact` and `token` accuracy, in [0, 1], and the number of `answers`."""
    said, true = [said for said, _ in answers], [true for _, true in answers]
    return answer_accuracy(said, true) | {"answers": len(answers)}


def asked_by_depth(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    policies: Sequence[str],
    lengths: Sequence[int],
    num_texts: int,
    seed: int,
    full_limit: int | None,
    ask: Callable[[StateBankCache, list[Fact], dict], list],
) -> Iterator[tuple[dict, dict[float, list]]]:
    """
    Every policy and length, as a record begins, with what was found, by depth (0 far, 1 near), for the fact there in each text.

    Args:
        policies: `PINNED` is known, too.
        ask: gives something for each fact, from the memory of a text; it gets the settings of the policy, too, under which the
            model runs meanwhile.
    """
    asked = points(policies, lengths, full_limit)
    for length in {length for _, length in asked}:
        # Whether the text is long enough is known before anything is read.
        text_to_recall(tokenizer, token_ids, length, random.Random(seed))
    for policy, length in asked:
        settings = {} if policy == PINNED else policy_settings(model, policy, length)
        found = []
        with settings_changed(model, **settings):
            for text, is_fact, facts in texts_to_recall(tokenizer, token_ids, length, num_texts, seed):
                cache = memory_of(model, torch.tensor([text]), is_fact if policy == PINNED else None)
                found.append(ask(cache, facts, settings))
        by_depth = {round((index + 0.5) / len(KINDS), 2): list(there) for index, there in enumerate(zip(*found))}
        yield {"policy": policy, "length": length}, by_depth


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    policies: Sequence[str],
    lengths: Sequence[int],
    num_texts: int,
    seed: int = 0,
    full_limit: int | None = None,
) -> Iterator[dict]:
    """
    Share of facts recalled under each policy, from `num_texts` texts per length: by length and depth (0 far, 1 near), and, in further
    records, by length and kind.
    """

    def ask(cache: StateBankCache, facts: list[Fact], settings: dict) -> list[tuple[str, Answer]]:
        return [
            (fact.kind, answer_from(answer_logits(model, tokenizer, cache, fact), tokenizer, fact)) for fact in facts
        ]

    for point, by_depth in asked_by_depth(
        model, tokenizer, token_ids, policies, lengths, num_texts, seed, full_limit, ask
    ):
        for depth, answers in by_depth.items():
            yield point | {"depth": depth} | accuracy([answer for _, answer in answers])
        everywhere = [answer for answers in by_depth.values() for answer in answers]
        for kind in KINDS:
            yield point | {"kind": kind} | accuracy([answer for its_kind, answer in everywhere if its_kind == kind])


def measure_budgets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    policies: Sequence[str],
    budgets: Sequence[int],
    length: int,
    num_texts: int,
    seed: int = 0,
) -> Iterator[dict]:
    """
    Facts recalled and loss of a text's second half, against the bytes of the memory, by slots (shared out among the levels as the
    model's are, unless a policy says otherwise) and policy. `full` and `window`, whose bytes do not depend on the slots, are
    measured once; of `full` they are those of a cache that holds keys and values and nothing else.
    """
    shares = list(model.config.memory_slots)
    texts = list(texts_to_recall(tokenizer, token_ids, length, num_texts, seed))
    asked = [
        (num_slots, policy)
        for number, num_slots in enumerate(budgets)
        for policy in policies
        if not number or policy not in ("full", "window")
    ]
    for num_slots, policy in asked:
        with (
            settings_changed(model, memory_slots=shared_out(num_slots, shares)),
            settings_changed(model, **policy_settings(model, policy, length)),
        ):
            found = [recalled(model, tokenizer, text, facts) for text, _, facts in texts]
        loss = fmean(text.loss_from(length // 2) for text in found)
        held = plain_cache_nbytes(model, len(texts[0][0])) if policy == "full" else found[0].state_bytes
        record = {"policy": policy, "slots": num_slots, "state_bytes": held}
        record |= accuracy([answer for text in found for answer in text.answers])
        yield record | {"loss": loss, "perplexity": math.exp(loss)}


def shared_out(num_slots: int, shares: Sequence[int]) -> list[int]:
    """`num_slots` in the proportions of `shares`; what does not divide is raw."""
    compressed = [num_slots * share // max(sum(shares), 1) for share in shares[1:]]
    return [num_slots - sum(compressed), *compressed]
