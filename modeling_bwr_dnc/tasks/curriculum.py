"""
From easy to hard: which tasks are mixed at which length, in three phases, and when to go on.

A model is at one step of a ladder. Within a phase the symbols in use grow, then the phase's length does; a measured success rate
moves it up or down. Every group of rows has a random length of whole segments up to that of the step, so that no one length is
learned.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .symbols import Copy, Infill, Lookup, Needle, Recall
from .task import SymbolTask, require

# Segments of a row (Rodkin et al., 2024, train recurrent memories on these counts).
SEGMENT_COUNTS = (1, 2, 3, 5, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Phase:
    """Tasks mixed by share, up to a length in tokens."""

    length: int
    shares: dict[str, float]


PHASES = (
    Phase(512, {"copy": 0.7, "lookup": 0.3}),
    Phase(1024, {"copy": 0.4, "lookup": 0.4, "infill": 0.2}),
    Phase(2048, {"copy": 0.2, "lookup": 0.2, "infill": 0.2, "needle": 0.2, "recall": 0.2}),
)


def task_of_length(name: str, length: int, num_facts: int, **options) -> SymbolTask:
    """One of the curriculum's tasks with about `num_facts` facts in a row, as many as fit."""
    if name == "copy":
        return Copy(length=length, num_symbols=max(1, min(num_facts, (length - 2) // 2)), **options)
    if name == "infill":
        return Infill(length=length, passage_length=max(3, min(num_facts, (length - 4) // 2)), **options)
    if name == "needle":
        return Needle(length=length, needle_length=min(4, (length - 4) // 2), **options)
    room = options.get("symbols_per_kind") or num_facts
    if name == "lookup":
        num_pairs = max(1, min(num_facts, room, length // 5))
        return Lookup(length=length, num_pairs=num_pairs, num_queries=max(1, num_pairs // 2), **options)
    hops = 2
    num_chains = max(1, min(num_facts // hops, room // (hops + 1), length // 8))
    return Recall(length=length, hops=hops, num_chains=num_chains, num_queries=max(1, num_chains // 2), **options)


@dataclass
class Curriculum:
    """
    A changing mix of tasks.

    Args:
        segment_length: of the model, in tokens.
        vocab_size: ids of the tasks, at most those of the model; in the end a third of them is there for each kind of symbol of a task.
        phases: in order; the last goes on to ever longer rows, doubling up to `max_length`.
        symbols: shares of the symbols in use at the steps of a phase, ascending to 1.
        facts_per_token: facts in a row of one token; with 1/16, a row of 256 tokens holds 16 pairs.
        promote_at, demote_at: success rates, in [0, 1], that move a step up and down.
        rows_per_length: rows in a row that share task and length, such as a batch.
        random_lengths: random numbers of segments up to the step's length; False: always that length.
    """

    segment_length: int = 16
    vocab_size: int = 200
    phases: tuple[Phase, ...] = PHASES
    max_length: int = 2048
    symbols: tuple[float, ...] = (0.25, 0.5, 1.0)
    facts_per_token: float = 1 / 16
    promote_at: float = 0.9
    demote_at: float = 0.3
    rows_per_length: int = 1
    random_lengths: bool = True
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self):
        require(len(self.phases) > 0, "phases", self.phases, "have at least one phase")
        require(
            0 <= self.demote_at <= self.promote_at <= 1,
            "promote_at",
            self.promote_at,
            f"be at most 1 and not below demote_at ({self.demote_at})",
        )
        require(
            2 * self.segment_length <= self.phases[0].length,
            "segment_length",
            self.segment_length,
            f"be at most half of the first phase's length ({self.phases[0].length})",
        )
        self.ladder = [(phase, phase.length, share) for phase in self.phases for share in self.symbols]
        length = 2 * self.phases[-1].length
        while length <= self.max_length:
            self.ladder.append((self.phases[-1], length, 1.0))
            length *= 2

    @classmethod
    def scaled(cls, first_length: int, **options) -> "Curriculum":
        """The three phases with the first at `first_length` tokens instead of 512, the others in proportion."""
        phases = tuple(Phase(phase.length * first_length // PHASES[0].length, phase.shares) for phase in PHASES)
        return cls(phases=phases, **{"max_length": phases[-1].length, **options})

    def report(self, success_rate: float) -> bool:
        """Tell the measured success rate at the present step; returns whether the step has changed."""
        before = self.step
        if success_rate >= self.promote_at:
            self.step = min(self.step + 1, len(self.ladder) - 1)
        elif success_rate < self.demote_at:
            self.step = max(self.step - 1, 0)
        return self.step != before

    def go_to_the_top(self) -> None:
        """Begin with the hardest step: all tasks, at the greatest length."""
        self.step = len(self.ladder) - 1

    def task(self, random: np.random.Generator, at_full_length: bool = False) -> SymbolTask:
        """A task of the present step, of random kind and length."""
        phase, longest, share = self.ladder[self.step]
        name = random.choice(list(phase.shares), p=list(phase.shares.values()))
        lengths = [count * self.segment_length for count in SEGMENT_COUNTS]
        # Shorter than two segments nothing but the window is used.
        lengths = [length for length in lengths if 2 * self.segment_length <= length < longest] + [longest]
        at_full_length = at_full_length or not self.random_lengths
        length = longest if at_full_length else int(random.choice(lengths))
        return self._task(str(name), length, share, seed=int(random.integers(2**31)))

    def _task(self, name: str, length: int, share: float, seed: int) -> SymbolTask:
        num_symbols = max(4, round(share * (self.vocab_size - 8) / 3))
        num_facts = max(2, round(length * self.facts_per_token))
        return task_of_length(
            name, length, num_facts, vocab_size=self.vocab_size, symbols_per_kind=num_symbols, seed=seed
        )

    def tasks(self, step: int | None = None, seed: int = 10_000) -> dict[str, SymbolTask]:
        """The tasks of a step (None: the present one) at its full length, by name, with rows that training does not see."""
        phase, length, share = self.ladder[self.step if step is None else step]
        return {name: self._task(name, length, share, seed) for name in phase.shares}

    def group(self, index: int) -> SymbolTask:
        """Task number `index`; at the same step always the same one, so that a resumed training goes on where it was."""
        return self.task(np.random.default_rng([self.seed, index]))

    def rows(self) -> Iterator[dict[str, list[int]]]:
        """Endless rows; a change of step shows from the next group on."""
        for number in itertools.count():
            task = self.group(number)
            for index in range(self.rows_per_length):
                yield task.row(index)

    def batches(self, num_steps: int, tokens_per_batch: int) -> Iterator[dict]:
        """One batch per step: `input_ids` and `labels` [B, T] of one task, of about `tokens_per_batch` tokens."""
        for number in range(num_steps):
            task = self.group(number)
            input_ids, labels = task.batch(range(max(1, tokens_per_batch // task.length)))
            yield {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
