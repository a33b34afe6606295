"""
Finding facts in text: needles, passkeys and variables. A row is written in words and becomes tokens by a tokenizer, or, without
one, the bytes of its UTF-8.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..texts import python_manual
from ..token_loss import IGNORED
from .task import Task, check_depth, require

GRASS = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@lru_cache(maxsize=8)
def _tokens(tokenizer: PreTrainedTokenizerBase | None, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text, and where its sentences end: the indices of the tokens after which something can be put in."""
    ids = np.array(_encode(tokenizer, text))
    if tokenizer is None:
        pieces = [chr(token) if token < 128 else " " for token in ids]
    else:
        pieces = tokenizer.batch_decode([[token] for token in ids])
    ends = [i + 1 for i, piece in enumerate(pieces) if piece.rstrip(" ").endswith((".", "\n"))]
    return ids, np.array([0, *ends])


def _encode(tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[int]:
    if tokenizer is None:
        return list(text.encode("utf-8"))
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@dataclass
class Written:
    """What a row says, beside its haystack. The question is followed by the answer at once."""

    opening: str
    facts: list[str]
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """
    Facts put between the sentences of a haystack, and in the end a question and its answer.

    Args:
        tokenizer: None for bytes, of which there are 256.
        depth: where the fact asked for stands in the haystack, from 0 (start) to 1 (end); None: anywhere.
    """

    length: int = 1024
    depth: float | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def __post_init__(self):
        check_depth(self.depth)

    @property
    @abstractmethod
    def haystack(self) -> str:
        """Text to hide facts in, repeated as often as a row needs."""

    @abstractmethod
    def write(self, random: np.random.Generator) -> Written:
        """A new row. The first fact is the one that `depth` speaks of."""

    @abstractmethod
    def solve(self, text: str) -> tuple[str, str]:
        """The question that a text ends with, and its answer, found by reading the text."""

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        written = self.write(random)
        opening, question, answer = map(self.encode, (written.opening, written.question, written.answer))
        facts = [self.encode(fact) for fact in written.facts]
        room = self.length - len(opening) - len(question) - len(answer) - sum(map(len, facts))
        self.require_length(self.length - room, f"this row of the task {self.name!r}")
        depths = random.random(len(facts))
        if self.depth is not None:
            depths[0] = self.depth
        input_ids = [*opening, *self._hide(random, facts, depths, room), *question, *answer]
        return input_ids, [IGNORED] * (self.length - len(answer)) + answer

    def _hide(self, random: np.random.Generator, facts: list[list[int]], depths: np.ndarray, room: int) -> list[int]:
        """`room` tokens of haystack from a random sentence on, and the facts at the ends of sentences next to their depths."""
        tokens, ends = _tokens(self.tokenizer, self.haystack)
        ends = ends[ends < len(tokens)]
        start = int(ends[random.integers(len(ends))]) if len(tokens) > room else 0
        repeats = max(-(-(start + room) // len(tokens)), 1)
        hay = np.tile(tokens, repeats)[start : start + room].tolist()
        ends = np.concatenate([ends + i * len(tokens) for i in range(repeats)]) - start
        ends = ends[(ends >= 0) & (ends <= room)]
        hidden, done = [], 0
        for index in depths.argsort(kind="stable"):
            place = int(ends[np.abs(ends - depths[index] * room).argmin()])
            hidden += hay[done:place] + facts[index]
            done = place
        return hidden + hay[done:]

    def oracle(self, prefix: Sequence[int]) -> int:
        prefix = list(prefix)
        question, answer = map(self.encode, self.solve(self.render(prefix)))
        for done in range(len(answer)):
            if prefix[-len(question) - done :] == question + answer[:done]:
                return answer[done]
        raise ValueError(f"the text does not end with the question {self.render(question)!r} and part of its answer")

    def encode(self, text: str) -> list[int]:
        return _encode(self.tokenizer, text)

    def render(self, input_ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return bytes(input_ids).decode("utf-8", "replace")
        return self.tokenizer.decode(input_ids, clean_up_tokenization_spaces=False)


def _pick(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(random.integers(len(choices)))]


def _code(random: np.random.Generator) -> str:
    return str(random.integers(10_000, 100_000))


PLACES = "Arles Bergen Cusco Dakar Esbjerg Fez Ghent Hobart Izmir Jaipur Kyoto Lima".split()
WORDS = "amber basalt cobalt damask ember fennel garnet hazel indigo jasper kelp linen".split()
FIRST_NAMES = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ingrid Jamal Keiko Luis".split()
LAST_NAMES = "Almeida Brandt Castro Dubois Eriksen Fontaine Gupta Haddad Ito Kovacs Lund".split()
MONTHS = "January March April June July August October December".split()

# What a needle is about, and how its answer is made up.
NEEDLE_KINDS = {
    "code": ("secret code", _code),
    "word": ("secret word", lambda random: f"{_pick(random, WORDS)}-{_pick(random, WORDS)}"),
    "name": ("head of the archive", lambda random: f"{_pick(random, FIRST_NAMES)} {_pick(random, LAST_NAMES)}"),
    "date": ("day of the fair", lambda random: f"{random.integers(1, 29)} {_pick(random, MONTHS)}"),
}


@dataclass(frozen=True, kw_only=True)
class TextNeedle(TextTask):
    """
    Needle in a haystack of real text: a sentence that does not belong there, and in the end a question that only it answers.

    Args:
        kind: `code`, `word`, `name` or `date`; None: any.
        num_needles: sentences of the kind, about different places, one of which is asked for.
        text: the haystack; by default the Python language reference, which every Python carries.

    >>> print(TextNeedle(length=170, text=" It rained. The sun came out.", kind="code").example())  # doctest: +NORMALIZE_WHITESPACE
    It rained. The secret code of Kyoto is 67326. The sun came out. It rained. The sun Question: What is the
    secret code of Kyoto? Answer: The secret code of Kyoto is 67326. => 67326.
    """

    name: ClassVar[str] = "needle_text"

    kind: str | None = None
    num_needles: int = 1
    text: str | None = field(default=None, repr=False)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.kind is None or self.kind in NEEDLE_KINDS, "kind", self.kind, f"be one of {', '.join(NEEDLE_KINDS)}"
        )
        require(
            1 <= self.num_needles <= len(PLACES), "num_needles", self.num_needles, f"be from 1 to {len(PLACES)} places"
        )
        require(self.text is None or bool(self.text.strip()), "text", self.text, "not be blank")

    @property
    def haystack(self) -> str:
        return python_manual() if self.text is None else self.text

    def write(self, random: np.random.Generator) -> Written:
        subject, invent = NEEDLE_KINDS[self.kind or _pick(random, tuple(NEEDLE_KINDS))]
        places = [PLACES[i] for i in random.choice(len(PLACES), self.num_needles, replace=False)]
        answers = [invent(random) for _ in places]
        facts = [f" The {subject} of {place} is {answer}." for place, answer in zip(places, answers)]
        question = f"\nQuestion: What is the {subject} of {places[0]}?\nAnswer: The {subject} of {places[0]} is"
        return Written("", facts, question, f" {answers[0]}.")

    def solve(self, text: str) -> tuple[str, str]:
        question, fact = re.findall(r"(\nQuestion: What is the [^?]*\?\nAnswer: (The [^?]*? is))", text)[-1]
        return question, re.search(rf"{re.escape(fact)}( [^.]*\.)", text)[1]


@dataclass(frozen=True, kw_only=True)
class Passkey(TextTask):
    """
    Passkey retrieval (Mohtashami and Jaggi, 2023): five digits in a repeated text about grass and sun.

    >>> print(Passkey(length=350).example())  # doctest: +NORMALIZE_WHITESPACE
    There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you
    about the important information there. The grass is green. The pass key is 86556. Remember it. 86556 is the
    pass key. The sky is blue. The sun is yellow. Here we go. There and back again. The grass What is the pass
    key? The pass key is 86556 => 86556
    """

    name: ClassVar[str] = "passkey"

    @property
    def haystack(self) -> str:
        return GRASS

    def write(self, random: np.random.Generator) -> Written:
        key = _code(random)
        opening = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information there."
        )
        fact = f" The pass key is {key}. Remember it. {key} is the pass key."
        return Written(opening, [fact], " What is the pass key? The pass key is", f" {key}")

    def solve(self, text: str) -> tuple[str, str]:
        return " What is the pass key? The pass key is", re.search(r"The pass key is( \d+)\. Remember it\.", text)[1]


@dataclass(frozen=True, kw_only=True)
class VariableTracking(TextTask):
    """
    Variable tracking (RULER, Hsieh et al., 2024): chains of assignments in a repeated text, and the names of all variables that
    hold a value, in the order of their assignments.

    Args:
        num_chains: chains, each with a value of its own.
        hops: assignments from variable to variable in a chain, after the first.

    >>> print(VariableTracking(length=560, hops=2).example())  # doctest: +NORMALIZE_WHITESPACE
    Memorize and track the chain(s) of variable assignment hidden in the following text. The grass is green. VAR
    WQNHI = 61308. The sky is blue. VAR BBAEV = VAR WQNHI. The sun is yellow. Here we go. There and back again.
    The grass is green. VAR QXNPZ = VAR BBAEV. The sky is blue. The sun is yellow. Here we go. There and back
    again. Question: Find all variables that are assigned the value 61308 in the text above. Answer: According to
    the chain(s) of variable assignment in the text above, 3 variables are assigned the value 61308, they are:
    WQNHI BBAEV QXNPZ => WQNHI BBAEV QXNPZ
    """

    name: ClassVar[str] = "variable_tracking"

    num_chains: int = 1
    hops: int = 4

    def __post_init__(self):
        super().__post_init__()
        require(self.num_chains >= 1, "num_chains", self.num_chains, "be at least 1")
        require(self.hops >= 0, "hops", self.hops, "be at least 0")

    @property
    def haystack(self) -> str:
        return GRASS

    def write(self, random: np.random.Generator) -> Written:
        count = self.hops + 1
        letters = random.integers(0, 26, (8 * self.num_chains * count, 5))
        names = list(dict.fromkeys("".join(chr(65 + letter) for letter in row) for row in letters))
        values = random.choice(np.arange(10_000, 100_000), self.num_chains, replace=False).tolist()
        facts: list[str] = []
        for chain, value in enumerate(values):
            mine = names[chain * count : (chain + 1) * count]
            facts.append(f" VAR {mine[0]} = {value}.")
            facts += [f" VAR {name} = VAR {before}." for before, name in zip(mine, mine[1:])]
        question = (
            f"\nQuestion: Find all variables that are assigned the value {values[0]} in the text above. Answer: According to the "
            f"chain(s) of variable assignment in the text above, {count} variables are assigned the value {values[0]}, they are:"
        )
        opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        return Written(opening, facts, question, " " + " ".join(names[:count]))

    def _hide(self, random: np.random.Generator, facts: list[list[int]], depths: np.ndarray, room: int) -> list[int]:
        # Assignments of a chain keep their order; `depth` moves the beginning of the first chain.
        first = depths[0]
        for chain in range(self.num_chains):
            part = depths[chain * (self.hops + 1) : (chain + 1) * (self.hops + 1)]
            part.sort()
        if self.depth is not None:
            part = depths[: self.hops + 1]
            part[0], part[1:] = first, np.maximum(part[1:], first)
        return super()._hide(random, facts, depths, room)

    def solve(self, text: str) -> tuple[str, str]:
        question, value = re.findall(r"(\nQuestion: Find all .*?the value (\d+), they are:)", text)[-1]
        held: dict[str, str] = {}
        for name, before, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))\.", text):
            held[name] = number or held[before]
        return question, " " + " ".join(name for name, number in held.items() if number == value)
