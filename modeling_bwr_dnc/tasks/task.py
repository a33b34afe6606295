"""
What a long-range task is: numbered rows of token ids and labels, made from a seed, and an oracle that solves them by reading.

Shapes: `T` tokens of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
from datasets import IterableDataset

from ..configuration_bwr_dnc import require
from ..field_types import check_types
from ..token_loss import IGNORED


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """
    A long-range task.

    Row `index` depends on the settings, `seed` and `index` alone, so any two readers see the same rows.

    Args:
        length: tokens of a row, exactly.
        seed: rows of different seeds are independent.

    Raises:
        ValueError: for settings that leave no room for what a row must hold.
    """

    name: ClassVar[str]

    length: int = 256
    seed: int = 0

    @classmethod
    def from_settings(cls, settings: dict, **others) -> Self:
        """
        The task of settings that a person wrote; `others` are arguments that nobody can write, such as a tokenizer.

        Raises:
            ValueError: also for a setting that it does not have, or a value of another type.
        """
        known = sorted(item.name for item in fields(cls) if item.name != "tokenizer")
        for name in settings:
            if name not in known:
                raise ValueError(f"the task {cls.name!r} has no setting {name!r}; it has {', '.join(known)}")
        check_types(settings, cls, f"the task {cls.name!r}")
        return cls(**settings, **others)

    def require_length(self, least: int, what: str) -> None:
        """Raises `ValueError` if a row is too short for the least that it must hold."""
        require(self.length >= least, "length", self.length, f"be at least {least}, for {what}")

    @abstractmethod
    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Token ids and labels, `T` of each. The label of a token is what the logits before it should predict, or -100."""

    @abstractmethod
    def oracle(self, prefix: Sequence[int]) -> int:
        """The token that the task asks for after `prefix`, found by reading it."""

    @abstractmethod
    def render(self, input_ids: Sequence[int]) -> str:
        """A row as a person reads it."""

    def row(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels`, aligned as the library's language models want them (they shift by themselves)."""
        input_ids, labels = self.compose(np.random.default_rng([self.seed, index]))
        assert len(input_ids) == len(labels) == self.length, (len(input_ids), len(labels), self.length)
        return {"input_ids": input_ids, "labels": labels}

    def batch(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of several rows, each [B, T] int64."""
        rows = [self.row(index) for index in indices]
        return np.array([row["input_ids"] for row in rows]), np.array([row["labels"] for row in rows])

    def dataset(self, num_rows: int | None = None, first: int = 0, num_shards: int = 1) -> IterableDataset:
        """
        Rows from number `first` on, endless if `num_rows` is None.

        Args:
            num_shards: parts that data loader workers and processes can share among themselves.
        """
        shards = list(range(first, first + num_shards))
        options = {"task": self, "starts": shards, "step": num_shards, "stop": num_rows and first + num_rows}
        return IterableDataset.from_generator(_rows, gen_kwargs=options)

    def example(self, index: int = 0) -> str:
        """Row `index` as a person reads it, and what is asked for, behind an arrow."""
        row = self.row(index)
        answer = [label for label in row["labels"] if label != IGNORED]
        return f"{self.render(row['input_ids'])} => {self.render(answer)}"


def _rows(task: Task, starts: list[int], step: int, stop: int | None) -> Iterator[dict]:
    for start in starts:
        index = start
        while stop is None or index < stop:
            yield task.row(index)
            index += step


# ---------------------------------------------------------------------------------------------------------------------
# Tasks over a vocabulary of meaningless symbols
# ---------------------------------------------------------------------------------------------------------------------

BEGIN, ASK, COPY, BLANK, HOP2, HOP3 = range(6)
SPECIAL_NAMES = ("^", "?", "=", "_", "??", "???")
FIRST_SYMBOL = 8


@dataclass(frozen=True, kw_only=True)
class SymbolTask(Task):
    """
    A task whose tokens are `vocab_size` ids without meaning: the marks `^ ? = _ ?? ???` (0 to 5; 6 and 7 stay unused), and
    symbols from 8 on, shown as a letter and a number, which `kinds` divides into equal parts.

    Args:
        symbols_per_kind: use only so many symbols of each kind; None: all. It changes no symbol's meaning.
    """

    kinds: ClassVar[tuple[str, ...]] = ("s",)

    vocab_size: int = 200
    symbols_per_kind: int | None = None

    def __post_init__(self):
        least = FIRST_SYMBOL + 2 * len(self.kinds)
        require(self.vocab_size >= least, "vocab_size", self.vocab_size, f"be at least {least}")
        used = self.symbols_per_kind
        require(used is None or used >= 2, "symbols_per_kind", used, "be at least 2, or None for all")

    def symbols(self, kind: str) -> range:
        """Ids in use of one kind."""
        size = (self.vocab_size - FIRST_SYMBOL) // len(self.kinds)
        first = FIRST_SYMBOL + self.kinds.index(kind) * size
        return range(first, first + min(size, self.symbols_per_kind or size))

    def draw(self, random: np.random.Generator, kind: str, count: int) -> list[int]:
        """So many symbols of a kind, with repetition."""
        symbols = self.symbols(kind)
        return random.integers(symbols.start, symbols.stop, count).tolist()

    def draw_distinct(self, random: np.random.Generator, kind: str, count: int) -> list[int]:
        symbols = self.symbols(kind)
        return (symbols.start + random.choice(len(symbols), count, replace=False)).tolist()

    def render(self, input_ids: Sequence[int]) -> str:
        return " ".join(self._word(token) for token in input_ids)

    def _word(self, token: int) -> str:
        if token < FIRST_SYMBOL:
            return SPECIAL_NAMES[token] if token < len(SPECIAL_NAMES) else f"<{token}>"
        for kind in self.kinds:
            symbols = self.symbols(kind)
            if token in symbols:
                return f"{kind}{token - symbols.start}"
        return f"<{token}>"


def scatter(
    random: np.random.Generator, items: list[list[int]], noise: list[int], depths: Sequence[float] | None = None
) -> list[int]:
    """
    `items` in their order, each whole, at random places in `noise`.

    Args:
        depths: where each item goes instead, ascending, from 0 (before all noise) to 1 (after it).
    """
    if depths is None:
        cuts = sorted(random.integers(0, len(noise) + 1, len(items)).tolist())
    else:
        cuts = [round(depth * len(noise)) for depth in depths]
    scattered, done = [], 0
    for cut, item in zip(cuts, items, strict=True):
        scattered += noise[done:cut]
        scattered += item
        done = cut
    return scattered + noise[done:]


def chosen_labels(input_ids: Sequence[int], positions: Sequence[int]) -> list[int]:
    """The token itself as label at `positions`, -100 elsewhere."""
    labels = [IGNORED] * len(input_ids)
    for position in positions:
        labels[position] = input_ids[position]
    return labels


def check_depth(depth: float | None) -> None:
    require(depth is None or 0 <= depth <= 1, "depth", depth, "be from 0 (far) to 1 (near), or None for a random one")
