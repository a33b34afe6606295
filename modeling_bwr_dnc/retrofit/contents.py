"""
Tables of contents, taught to the second salience heads of a converted model.

A heading is hard to foresee, but for who remembers the table of contents that announced it. Plain texts have often lost theirs, so a
table of a stretch's own headings is put into it; where it stands is known. Fisher's discriminant between its tokens and all others
is added to the second heads, which lift nothing above a salience of 0, and so displace no fact.
"""

import random
import re
from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .salience import Moments, centred, discriminant, listen, memories_of, near_constant

HEADING = re.compile(r"(\d+(\.\d+)*\.? |[A-Z])[^{}<>=|$\\@/_*]{3,68}[^.,;:?!\s]")
FEWEST_HEADINGS, MOST_HEADINGS = 7, 45
TITLES = ("Table of Contents", "Table of Contents", "Contents", "In this chapter", "")
# Of an entry, which may have the number of its page.
STYLES = ("{0}", "{0}", "   {0}", "* {0}", "{0} ......... {1}")
# Characters that a stretch has for every token wanted of it, so that it has as many as wanted.
CHARACTERS_PER_TOKEN = 4.2
# Places in a text that are tried for a stretch with headings.
TRIES = 200
OTHERS, TABLE = range(2)


def headings(text: str) -> list[str]:
    """Lines between empty ones that look like headings, each once, in their order."""
    lines = [line.strip() for line in text.split("\n")]
    alone = [
        line for before, line, after in zip(lines, lines[1:], lines[2:], strict=False) if not before and not after
    ]
    found = [line for line in alone if HEADING.fullmatch(line) and len(line.split()) <= 9 and not line.isupper()]
    return list(dict.fromkeys(line for line in found if not line.startswith(("Figure", "Table", "Example"))))


def with_contents(text: str, names: Sequence[str], draw: random.Random) -> tuple[str, slice]:
    """`text` with a table of `names` at its beginning, or some paragraphs behind it; and the characters that are the table's."""
    style, title = draw.choice(STYLES), draw.choice(TITLES)
    entries = [style.format(name, draw.randrange(5, 200)) for name in names]
    table = "\n".join([title, "", *entries] if title else entries) + "\n\n"
    place = text.index("\n\n", draw.choice((0, 300, 1500))) + 2
    return text[:place] + table + text[place:], slice(place, place + len(table))


def stretch_with_contents(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, draw: random.Random
) -> tuple[list[int], list[bool]] | None:
    """`length` tokens from a random place of a text, with a table of the headings in them, and which are the table's; None if there are too few."""
    size = int(length * CHARACTERS_PER_TOKEN)
    for _ in range(TRIES if len(text) > size else 0):
        begin = draw.randrange(len(text) - size)
        part = text[begin : begin + size]
        names = headings(part)
        if not FEWEST_HEADINGS <= len(names) <= MOST_HEADINGS:
            continue
        whole, place = with_contents(part, names, draw)
        before, table, after = (
            tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            for piece in (whole[: place.start], whole[place], whole[place.stop :])
        )
        marks = [False] * len(before) + [True] * len(table) + [False] * len(after)
        if len(marks) >= length:
            return (before + table + after)[:length], marks[:length]
    return None


@torch.no_grad()
def fit_contents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    strength: float,
    layers: Collection[int] | None = None,
    seed: int = 0,
    length: int = 8192,
    num_stretches: int = 2,
    ridge: float = 0.01,
    on_progress: Callable[[int], object] | None = None,
) -> dict[int, float]:
    """
    Add to the second salience heads of `model`, which get one if they have none, what tells tables of contents from other text.

    Args:
        strength: standard deviation over other text of what is added.
        layers: in which it is; all by default.
        length: tokens of a stretch. Texts without one that has headings are passed over.
        num_stretches: at most so many of every text.
        ridge: see `discriminant`.
        on_progress: called after every block with the number of tokens it held.

    Returns: by layer, how many standard deviations of other text lie between it and the tables.

    Raises:
        ValueError: if the model has no state bank in these layers, or no text has headings enough.
    """
    memories = memories_of(model, layers)
    drawn = [
        stretch_with_contents(tokenizer, text, length, random.Random(f"{seed} {number} {count}"))
        for number, text in enumerate(texts)
        for count in range(num_stretches)
    ]
    stretches = [stretch for stretch in drawn if stretch is not None]
    if not stretches:
        raise ValueError(
            f"none of the {len(texts)} texts has {FEWEST_HEADINGS} to {MOST_HEADINGS} headings in {length} tokens (lines between empty ones, "
            "with a number or a capital first); give manuals with theirs, or leave tables of contents out"
        )
    model.add_secondary_salience()
    heads = {index: memory.salience for index, memory in memories.items()}
    moments = {index: [Moments.empty(model.config.hidden_size) for _ in (OTHERS, TABLE)] for index in heads}
    for token_ids, marks in stretches:
        is_table = torch.tensor(marks, device=model.device)
        # Sinks stand out in every model, and are never chosen.
        is_other = ~is_table
        is_other[: model.config.num_sink_tokens] = False

        def add(index: int, tokens: slice, inputs: torch.Tensor, kinds=(is_other, is_table)) -> None:
            for sums, kind in zip(moments[index], kinds, strict=True):
                sums.add(inputs[0][kind[tokens]])

        listen(model, heads, [token_ids], add, on_progress)
    gaps = {}
    for index, (others, table) in moments.items():
        direction = centred(discriminant(others, table, ridge), others.mean, near_constant(others, ridge)[0])
        gaps[index] = float(direction @ (table.mean - others.mean))
        head = memories[index].secondary_salience
        head.weight += (strength * direction).to(head.weight)
    return gaps
