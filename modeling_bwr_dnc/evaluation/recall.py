"""
Several facts hidden in one long text, read once, and each asked for from a fork of the memory that the text left.

The facts are of other kinds, names and wordings than those that `retrofit` teaches a memory with.
"""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..retrofit.facts import Fact, hide_facts, sentence_ends
from .measuring import read_blocks
from .metrics.answer_accuracy.answer_accuracy import answer_accuracy
from .policies import policy_settings, settings_changed

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
        Fact.parse(template, lambda name: numbers[name] if name in numbers else draw.choice(CHOICES[name]))
        for template in KINDS.values()
    ]
    draw.shuffle(facts)
    return facts


def text_to_recall(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], length: int, draw: random.Random
) -> tuple[list[int], list[Fact]]:
    """
    About `length` tokens of a text from a random place on, with a fact of every kind spread over it, and the facts in order.

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
    return hide_facts(tokenizer, hay, places)[0], [places[place] for place in sorted(places)]


@torch.no_grad()
def recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], facts: Sequence[Fact]
) -> list[tuple[list[int], list[int]]]:
    """
    For every fact, the most likely ids of its answer, given the true ones before, and the true ids. The model reads the text
    once; every question is put to a copy of its memory.
    """
    for _, _, memory in read_blocks(model, torch.tensor([token_ids])):
        cache = memory
    answers = []
    for fact in facts:
        question = tokenizer(fact.prompt, add_special_tokens=False).input_ids
        answer = tokenizer(" " + fact.answer, add_special_tokens=False).input_ids
        asked = torch.tensor([question + answer], device=model.device)
        logits = model(asked, past_key_values=cache.clone(), use_cache=True).logits[0, len(question) - 1 : -1]
        answers.append((logits.argmax(-1).tolist(), answer))
    return answers


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    policies: Sequence[str],
    lengths: Sequence[int],
    num_texts: int,
    seed: int = 0,
    full_limit: int | None = None,
) -> list[dict]:
    """Share of facts recalled by length and depth (0 far, 1 near) under each policy, from `num_texts` texts per length."""
    records = []
    for policy in policies:
        for length in lengths:
            if policy == "full" and full_limit is not None and length > full_limit:
                continue
            by_depth: list[list] = [[] for _ in KINDS]
            with settings_changed(model, **policy_settings(model, policy, length)):
                for number in range(num_texts):
                    text, facts = text_to_recall(tokenizer, token_ids, length, random.Random(f"{seed} {number}"))
                    for index, answer in enumerate(recalled(model, tokenizer, text, facts)):
                        by_depth[index].append(answer)
            records += [
                {"policy": policy, "length": length, "depth": round((index + 0.5) / len(KINDS), 2)}
                | answer_accuracy([said for said, _ in answers], [true for _, true in answers])
                | {"answers": len(answers)}
                for index, answers in enumerate(by_depth)
            ]
    return records
