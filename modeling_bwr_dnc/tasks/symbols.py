"""Copying, filling in and recalling, over symbols without meaning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..token_loss import IGNORED
from .task import (
    ASK,
    BEGIN,
    BLANK,
    COPY,
    FIRST_SYMBOL,
    HOP2,
    HOP3,
    SymbolTask,
    check_depth,
    chosen_labels,
    require,
    scatter,
)


@dataclass(frozen=True, kw_only=True)
class Copy(SymbolTask):
    """
    Repeat what stands between `^` and `_`, after as many blanks as there is room for.

    Args:
        num_symbols: how many to copy; None fills the row.

    >>> print(Copy(length=14, vocab_size=40, num_symbols=4).example())
    ^ s27 s20 s16 s8 _ _ _ _ = s27 s20 s16 s8 => s27 s20 s16 s8
    """

    name: ClassVar[str] = "copy"

    num_symbols: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require_length(4, "a symbol and its copy")
        most = (self.length - 2) // 2
        count = most if self.num_symbols is None else self.num_symbols
        require(1 <= count <= most, "num_symbols", count, f"be from 1 to {most} in a row of {self.length} tokens")

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        count = (self.length - 2) // 2 if self.num_symbols is None else self.num_symbols
        copied = self.draw(random, "s", count)
        input_ids = [BEGIN, *copied, *[BLANK] * (self.length - 2 - 2 * count), COPY, *copied]
        return input_ids, chosen_labels(input_ids, range(self.length - count, self.length))

    def oracle(self, prefix: Sequence[int]) -> int:
        prefix = list(prefix)
        done = len(prefix) - 1 - prefix.index(COPY)
        return prefix[1 + done]


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(SymbolTask):
    """
    Selective copying (Jing et al., 2019; Gu and Dao, 2023): symbols among blanks, then one mark for each of them, at which it
    is asked for, in order. The answers never stand in the input.

    Args:
        num_symbols: how many to copy; 16 of 16 kinds among 4,096 tokens in the paper.

    >>> print(SelectiveCopy(length=14, vocab_size=24, num_symbols=4).example())
    s13 s10 s8 _ s4 _ _ _ _ = = = = _ => s13 s10 s8 s4
    """

    name: ClassVar[str] = "selective_copy"

    vocab_size: int = 24
    num_symbols: int = 16

    def __post_init__(self):
        super().__post_init__()
        self.require_length(3, "a symbol and its mark")
        most = (self.length - 1) // 2
        require(
            1 <= self.num_symbols <= most, "num_symbols", self.num_symbols, f"be from 1 to {most}; or use longer rows"
        )

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        count = self.num_symbols
        copied = self.draw(random, "s", count)
        blanks = [BLANK] * (self.length - 2 * count - 1)
        input_ids = [*scatter(random, [[symbol] for symbol in copied], blanks), *[COPY] * count, BLANK]
        return input_ids, [IGNORED] * (self.length - count) + copied

    def oracle(self, prefix: Sequence[int]) -> int:
        copied = [token for token in prefix if token not in (BLANK, COPY)]
        return copied[list(prefix).count(COPY) - 1]


@dataclass(frozen=True, kw_only=True)
class Infill(SymbolTask):
    """
    Long infill: a passage, noise, the passage again with a hole (`_`), and then, after `=`, what the hole must hold.

    Args:
        passage_length, hole_length: in symbols; by default a quarter of the row, and a quarter of the passage.

    >>> print(Infill(length=22, vocab_size=40, passage_length=5, hole_length=2).example())
    ^ p13 p10 p8 p4 p4 n1 n0 n2 n13 n10 n14 n8 n9 ^ p13 _ p4 p4 = p10 p8 => p10 p8
    """

    name: ClassVar[str] = "infill"
    kinds: ClassVar[tuple[str, ...]] = ("p", "n")

    passage_length: int | None = None
    hole_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        passage, hole = self._lengths()
        require(
            passage >= 3,
            "passage_length",
            passage,
            "be at least 3; by default it is a quarter of the row: use longer rows",
        )
        require(1 <= hole <= passage - 2, "hole_length", hole, f"be from 1 to {passage - 2}, inside the passage")
        require(
            2 * passage + 4 <= self.length,
            "length",
            self.length,
            f"be at least {2 * passage + 4}, for a passage of {passage} and its copy",
        )

    def _lengths(self) -> tuple[int, int]:
        passage = self.length // 4 if self.passage_length is None else self.passage_length
        return passage, max(1, passage // 4) if self.hole_length is None else self.hole_length

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        length, hole = self._lengths()
        passage = self.draw(random, "p", length)
        start = int(random.integers(1, length - hole))
        missing = passage[start : start + hole]
        noise = self.draw(random, "n", self.length - 2 * length - 4)
        input_ids = [BEGIN, *passage, *noise, BEGIN, *passage[:start], BLANK, *passage[start + hole :], COPY, *missing]
        return input_ids, chosen_labels(input_ids, range(self.length - hole, self.length))

    def oracle(self, prefix: Sequence[int]) -> int:
        prefix = list(prefix)
        again = prefix.index(BEGIN, 1)
        before_hole = prefix.index(BLANK) - again
        return prefix[before_hole + len(prefix) - 1 - prefix.index(COPY)]


@dataclass(frozen=True, kw_only=True)
class Lookup(SymbolTask):
    """
    Key-value lookup: pairs of a key and a value scattered in noise, then questions for some of the values.

    Args:
        num_pairs, num_queries: pairs in the row, and how many of them are asked for, each once.

    >>> print(Lookup(length=18, vocab_size=50, num_pairs=3, num_queries=2).example())
    n2 n11 n9 n12 k8 v0 n7 k7 v1 n8 k10 v0 ? k7 v1 ? k10 v0 => v1 v0
    """

    name: ClassVar[str] = "lookup"
    kinds: ClassVar[tuple[str, ...]] = ("k", "v", "n")

    num_pairs: int = 16
    num_queries: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.require_length(3 * self.num_queries + 2, f"{self.num_queries} questions and a pair")
        most = min((self.length - 3 * self.num_queries) // 2, len(self.symbols("k")))
        require(
            1 <= self.num_pairs <= most,
            "num_pairs",
            self.num_pairs,
            f"be from 1 to {most}: keys of one row differ, and pairs and questions must fit; or use a larger vocab_size or length",
        )
        require(
            1 <= self.num_queries <= self.num_pairs,
            "num_queries",
            self.num_queries,
            f"be from 1 to num_pairs ({self.num_pairs})",
        )

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        keys = self.draw_distinct(random, "k", self.num_pairs)
        values = self.draw(random, "v", self.num_pairs)
        noise = self.draw(random, "n", self.length - 2 * self.num_pairs - 3 * self.num_queries)
        input_ids = scatter(random, [list(pair) for pair in zip(keys, values)], noise)
        for asked in random.choice(self.num_pairs, self.num_queries, replace=False).tolist():
            input_ids += [ASK, keys[asked], values[asked]]
        return input_ids, chosen_labels(input_ids, range(self.length - 3 * self.num_queries + 2, self.length, 3))

    def oracle(self, prefix: Sequence[int]) -> int:
        prefix = list(prefix)
        return prefix[prefix.index(prefix[-1]) + 1]


@dataclass(frozen=True, kw_only=True)
class Recall(SymbolTask):
    """
    Associative recall over one to three hops: scattered in noise, pairs that chain names (a b, b c, c d), in any order; `? a`
    asks for b, `?? a` for c, and `??? a` for d.

    Args:
        hops: pairs to follow for an answer.
        num_chains, num_queries: chains of so many hops, and how many of them are asked for, each once.

    >>> print(Recall(length=16, vocab_size=40, hops=2, num_chains=2, num_queries=1).example())
    a3 a6 n11 a7 a4 n10 n8 n8 a4 a9 a6 a0 n14 ?? a3 a0 => a0
    """

    name: ClassVar[str] = "recall"
    kinds: ClassVar[tuple[str, ...]] = ("a", "n")

    hops: int = 1
    num_chains: int = 8
    num_queries: int = 4

    def __post_init__(self):
        super().__post_init__()
        require(self.hops in (1, 2, 3), "hops", self.hops, "be 1, 2 or 3")
        used, least = self.symbols_per_kind, FIRST_SYMBOL + len(self.kinds) * (self.hops + 1)
        require(used is None or used > self.hops, "symbols_per_kind", used, f"be more than hops ({self.hops})")
        require(self.vocab_size >= least, "vocab_size", self.vocab_size, f"be at least {least} for {self.hops} hops")
        self.require_length(3 * self.num_queries + 2 * self.hops, f"{self.num_queries} questions and a chain")
        room = (self.length - 3 * self.num_queries) // (2 * self.hops)
        most = min(room, len(self.symbols("a")) // (self.hops + 1))
        require(
            1 <= self.num_chains <= most,
            "num_chains",
            self.num_chains,
            f"be from 1 to {most}: names of one row differ, and chains and questions must fit; or use a larger vocab_size or length",
        )
        require(
            1 <= self.num_queries <= self.num_chains,
            "num_queries",
            self.num_queries,
            f"be from 1 to num_chains ({self.num_chains})",
        )

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        names = self.draw_distinct(random, "a", self.num_chains * (self.hops + 1))
        chains = [names[i :: self.num_chains] for i in range(self.num_chains)]
        pairs = [list(pair) for chain in chains for pair in zip(chain, chain[1:])]
        pairs = [pairs[i] for i in random.permutation(len(pairs))]
        noise = self.draw(random, "n", self.length - 2 * len(pairs) - 3 * self.num_queries)
        input_ids = scatter(random, pairs, noise)
        for asked in random.choice(self.num_chains, self.num_queries, replace=False).tolist():
            input_ids += [(ASK, HOP2, HOP3)[self.hops - 1], chains[asked][0], chains[asked][-1]]
        return input_ids, chosen_labels(input_ids, range(self.length - 3 * self.num_queries + 2, self.length, 3))

    def oracle(self, prefix: Sequence[int]) -> int:
        prefix = list(prefix)
        hops = 1 + (ASK, HOP2, HOP3).index(prefix[-2])
        begin = next(i for i, token in enumerate(prefix) if token in (ASK, HOP2, HOP3))
        names = [(i, token) for i, token in enumerate(prefix[:begin]) if token in self.symbols("a")]
        # Noise and further names may stand between pairs, but a pair is never torn, and names come in pairs.
        follows = {names[i][1]: names[i + 1][1] for i in range(0, len(names), 2)}
        name = prefix[-1]
        for _ in range(hops):
            name = follows[name]
        return name


@dataclass(frozen=True, kw_only=True)
class Mqar(SymbolTask):
    """
    Multi-query associative recall (Arora et al., 2023), by its public definition: keys are ids 1 to V/2 - 1, values V/2 to
    V - 1; the row begins with all pairs; each key comes once more, after a gap drawn from a power law, and there, and only
    there, its value is asked for. Every other place holds a random id, also the one after a key asked for.

    Args:
        vocab_size: V, 8,192 in the paper.
        num_pairs: at most a quarter of the length.
        power: exponent of the law of gaps.

    >>> print(Mqar(length=16, vocab_size=40, num_pairs=3).example())
    12 39 10 21 15 20 12 21 22 37 10 32 26 0 15 34 => 39 21 20
    """

    name: ClassVar[str] = "mqar"

    vocab_size: int = 8192
    num_pairs: int = 16
    power: float = 0.01

    def __post_init__(self):
        self.require_length(4, "a pair and the key again")
        require(self.length % 2 == 0, "length", self.length, "be even")
        require(
            self.vocab_size > self.length, "vocab_size", self.vocab_size, f"be larger than the length ({self.length})"
        )
        most = min(self.length // 4, self.vocab_size // 2 - 1)
        require(
            1 <= self.num_pairs <= most, "num_pairs", self.num_pairs, f"be from 1 to {most}, a quarter of the length"
        )

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        half, count = self.vocab_size // 2, self.num_pairs
        keys = 1 + random.choice(half - 1, count, replace=False)
        values = half + random.choice(self.vocab_size - half, count, replace=False)
        input_ids = random.integers(0, self.vocab_size, self.length)
        input_ids[0 : 2 * count : 2], input_ids[1 : 2 * count : 2] = keys, values
        space = (self.length - 2 * count) // 2
        law = self.power * np.arange(1, space + 1) ** (self.power - 1.0)
        places = 2 * count + 2 * random.choice(space, count, replace=False, p=law / law.sum())
        input_ids[places] = keys
        labels = np.full(self.length, IGNORED)
        labels[places + 1] = values
        return input_ids.tolist(), labels.tolist()

    def oracle(self, prefix: Sequence[int]) -> int:
        keys = list(prefix[0 : 2 * self.num_pairs : 2])
        return prefix[2 * keys.index(prefix[-1]) + 1]

    def render(self, input_ids: Sequence[int]) -> str:
        return " ".join(map(str, input_ids))


@dataclass(frozen=True, kw_only=True)
class Needle(SymbolTask):
    """
    Needle in a haystack of noise: `= key` and its values somewhere, other needles elsewhere, and in the end `? key`.

    Args:
        num_needles: needles with different keys, one of which is asked for.
        needle_length: values of a needle.
        depth: where the needle that is asked for stands, from 0 (start) to 1 (end); None: anywhere.

    >>> print(Needle(length=18, vocab_size=50, num_needles=2, needle_length=2, depth=0.2).example())
    n0 = k11 v3 v4 n2 n11 = k8 v0 v1 n9 n12 n7 ? k11 v3 v4 => v3 v4
    """

    name: ClassVar[str] = "needle"
    kinds: ClassVar[tuple[str, ...]] = ("k", "v", "n")

    num_needles: int = 1
    needle_length: int = 4
    depth: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_depth(self.depth)
        require(self.needle_length >= 1, "needle_length", self.needle_length, "be at least 1")
        self.require_length(4 + 2 * self.needle_length, "a needle and the question for it")
        room = (self.length - 2 - self.needle_length) // (2 + self.needle_length)
        most = min(room, len(self.symbols("k")))
        require(
            1 <= self.num_needles <= most, "num_needles", self.num_needles, f"be from 1 to {most}; or use longer rows"
        )

    def compose(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        keys = self.draw_distinct(random, "k", self.num_needles)
        needles = [[COPY, key, *self.draw(random, "v", self.needle_length)] for key in keys]
        question = [ASK, *needles[0][1:]]
        noise = self.draw(random, "n", self.length - sum(map(len, needles)) - len(question))
        depths = random.random(self.num_needles)
        if self.depth is not None:
            depths[0] = self.depth
        order = depths.argsort()
        input_ids = scatter(random, [needles[i] for i in order], noise, depths[order].tolist()) + question
        return input_ids, chosen_labels(input_ids, range(self.length - self.needle_length, self.length))

    def oracle(self, prefix: Sequence[int]) -> int:
        prefix = list(prefix)
        asked = prefix.index(ASK)
        return prefix[prefix.index(prefix[asked + 1]) + len(prefix) - 1 - asked]
