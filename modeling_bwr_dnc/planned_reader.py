"""
How one layer reads tokens with gradients: planned first, gathered afterwards.

The walk through the segments runs on detached values, as it does in place (`bank_reader`), and only records which entry of a pool
sits where (integers). Keys and values are then gathered from that pool, each merged pair computed once, and every segment is
computed again in the backward pass instead of keeping its own copy of the keys.

Shapes: `R` sequences, `T` tokens of this call, `H` query heads, `G` key/value heads, `D` head width, `N` entries before the
window, `L` entries visible, `S` segment length, `P` entries of the pool.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .bank_reader import BankReader, Finished, is_biased, joined, row_pressure, with_holes
from .call import Tokens
from .layer_state import BankState, RowState
from .memory_ops import (
    Compress,
    Plan,
    add_entries,
    log_mass,
    merge_salience_bias,
    prefix_bias,
    prefix_positions,
    rotary_start,
    rotate,
    row_numbers,
    salience_bias,
    take_entries,
    take_rows,
)

# Tokens of a layer with slots that are read together, at most (one segment at least), when gradients are wanted.
READ_TOGETHER = 512
# With more segments' worth of entries before the window, each segment's copies of keys and values are computed twice instead of
# kept for the backward pass. With fewer they are small beside what the layer keeps for the tokens themselves.
RECOMPUTE_ABOVE = 4


@dataclass
class Pool:
    """Everything a slot may stand for in one call: raw entries in order of time, then merged pairs, [R, G, P, ...]."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor  # salience bias
    mass: torch.Tensor  # source tokens

    def take(self, index: torch.Tensor) -> "Pool":
        rows = row_numbers(index, self.keys.shape[2])
        return Pool(*(take_rows(tensor, rows) for tensor in (self.keys, self.values, self.bias, self.mass)))

    def extended(self, pairs: torch.Tensor, compress: Compress) -> "Pool":
        """With the pairs [R, G, K, 2] of pool indices merged, at the end."""
        parts = self.take(pairs)
        weights = log_mass(parts.mass, parts.bias.dtype)
        keys, values = compress(parts.keys, parts.values, weights)
        added = (keys, values, merge_salience_bias(parts.bias, weights), parts.mass.sum(-1))
        mine = (self.keys, self.values, self.bias, self.mass)
        return Pool(*(torch.cat(pair, dim=2) for pair in zip(mine, added, strict=True)))


@dataclass
class PlannedStretch:
    """What one stretch of tokens, at most up to the end of a segment, sees, as recorded by the plan."""

    start: int  # first token in the call
    stop: int
    row: RowState
    segment: int  # segments that have left the window since the call began
    source: torch.Tensor  # [R, G, N] pool indices of the entries before the window
    mass: torch.Tensor  # [R, G, N] of these entries
    level: torch.Tensor  # [R, G, N]
    salience: torch.Tensor  # [R, G, N], of these entries, without gradients
    holes: torch.Tensor | None  # [R, G, L]

    def __len__(self) -> int:
        return self.stop - self.start

    def is_like(self, other: "PlannedStretch") -> bool:
        """Whether both have the same shapes, and can be read together."""
        mine, theirs = (
            (len(s), s.row.seen - s.row.window_start, s.source.shape, s.row.slot_counts) for s in (self, other)
        )
        return mine == theirs and self.holes is None and other.holes is None


@dataclass
class Cut:
    """
    What a call reads, cut once, so that the gradients of the pieces are joined once: one slice per segment would give each a
    gradient as large as the whole. Everything is rotated to its index in the pool; only differences of positions matter.
    """

    queries: tuple[torch.Tensor, ...]  # [R, H, K * T, D] of each group of K stretches
    complexity: tuple[torch.Tensor, ...]  # [R, H, K * T] of each group
    keys: tuple[torch.Tensor, ...]  # [R, G, <= S, D] of each segment, from the first in the window on
    values: tuple[torch.Tensor, ...]
    first: int  # pool index of the first entry in the window
    rotary: tuple[torch.Tensor, torch.Tensor]  # cosines and sines of all raw entries, [P, D]

    def window(self, stretches: list[PlannedStretch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R * K, G, <= 2S, D] in the windows of K consecutive stretches."""
        first, last = stretches[0].segment, stretches[-1].segment

        def of(segments):
            if first == last:
                return torch.cat(segments[first : first + 2], dim=2)
            # One tensor of all, and not a pair for each: what a layer leaves scattered in memory can often not be used again.
            together = torch.stack(segments[first : last + 2], dim=1)
            return torch.cat((together[:, :-1], together[:, 1:]), dim=3).flatten(0, 1)

        return of(self.keys), of(self.values)


class SharedGather:
    """
    Gathers along dimension 2 from one tensor [B, G, P, ...], whose gradients add up in one buffer.

    The gradient of an ordinary gather is as large as what it reads from: one per segment makes training quadratic.
    """

    def __init__(self, tensor: torch.Tensor):
        # A compiler takes no shared buffer.
        self.total = None if torch.compiler.is_compiling() else _GradientTotal()
        self.tensor = tensor if self.total is None else _CollectGradient.apply(tensor, self.total)

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        """Entries at `index` [B, G, K]."""
        if self.total is None:
            return take_entries(self.tensor, index)
        return _TakeEntries.apply(self.tensor, index, self.total)


class _GradientTotal:
    """Sum of the gradients of all gathers so far, None before the first."""

    value: torch.Tensor | None = None


class _CollectGradient(torch.autograd.Function):
    """Identity; its backward pass runs after those of all gathers, and hands on their sum."""

    @staticmethod
    def forward(ctx, tensor, total):
        ctx.total = total
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gathered, ctx.total.value = ctx.total.value, None
        if gathered is None or gradient is None:
            return gradient if gathered is None else gathered, None
        return gathered + gradient, None


class _TakeEntries(torch.autograd.Function):
    """`take_entries`, whose gradient goes into a total."""

    @staticmethod
    def forward(ctx, tensor, index, total):
        ctx.save_for_backward(index)
        ctx.shape, ctx.total = tensor.shape, total
        return take_entries(tensor, index)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a gradient with `create_graph=True` is to be differentiated again, but those of BWR-DNC are sums in shared buffers, "
                "which have no derivative; leave `create_graph` out"
            )
        (index,) = ctx.saved_tensors
        if ctx.total.value is None:
            ctx.total.value = gradient.new_zeros(ctx.shape)
        add_entries(ctx.total.value, index, gradient)
        return None, None, None


@dataclass
class Slots:
    """The pool as the stretches read it: keys, values and salience bias at given indices."""

    keys: SharedGather
    values: SharedGather
    bias: SharedGather


def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """K tensors [R, ...] as one [R * K, ...], rows in the outer order."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=1).flatten(0, 1)


def unstrung(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """[R, G, K * N, ...] as [R * K, G, N, ...]."""
    return tensor if count == 1 else tensor.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


class PlannedReader(BankReader):
    """Reads with gradients, and leaves the state that it begins with as it was."""

    def read(self, tokens: Tokens, state: BankState):
        """As in place, but `state` stays as it was."""
        has_slots = any(self.settings.memory_slots) or state.rows[0].num_slots
        if self.call.keeps_state or has_slots or state.holes is not None:
            stretches, finished, merged = self._plan(tokens.map(lambda tensor: tensor.detach()), state)
        else:
            stretches, finished, merged = self._count_stretches(len(tokens), state), None, ([], [])
        num_raw, num_level1 = state.length() + len(tokens), sum(pairs.shape[2] for pairs in merged[0])
        pairs = [_resolved(torch.cat(level, dim=2), num_raw, num_level1) for level in merged if level]
        pool = self._pool(tokens, state, pairs)
        groups = self._groups(stretches)
        cut = self._cut(tokens, state, groups, pool)
        slots = Slots(SharedGather(pool.keys), SharedGather(pool.values), SharedGather(pool.bias))
        outputs, weights = [], []
        for group, queries, complexity in zip(groups, cut.queries, cut.complexity, strict=True):
            for stretch in group:
                stretch.source = _resolved(stretch.source, num_raw, num_level1)
            output, weight = self._read_group(group, queries, complexity, cut, slots)
            outputs += output.unflatten(0, (-1, len(group))).unbind(1)
            weights.append(weight)
        after = None
        if self.call.keeps_state:
            for index, (indices, part, source) in enumerate(finished.parts):
                source = _resolved(source, num_raw, num_level1)
                part = self._differentiable(part, source, indices, tokens, state, pool)
                finished.parts[index] = (indices, part, None)
            after = finished.state()
        return joined(outputs), self.joined_weights(weights), after

    def _plan(self, tokens: Tokens, state: BankState) -> tuple[list[PlannedStretch], Finished, tuple[list, list]]:
        """Walk the segments on detached values; record what each sees and, see `Plan.pairs`, which pairs merge."""
        length, num_prefix = self.settings.segment_length, len(state.entries)
        first_position, shape = state.rows[0].window_start, state.entries.level.shape
        device = state.keys.device
        stretches: list[PlannedStretch] = []
        finished, start = Finished(self.counts), 0
        with torch.no_grad():
            state = state.map(lambda tensor: tensor.detach().clone())
            plan = Plan(torch.arange(num_prefix, device=device).expand(shape), ([], []))
            while start < len(tokens):
                row = state.rows[0]
                room = row.window_start + 2 * length - row.seen
                if room == 0:
                    left = num_prefix + row.window_start - first_position
                    leaving = torch.arange(left, left + length, device=device).expand(*shape[:2], length)
                    plan = Plan(torch.cat((plan.source, leaving), dim=2), plan.pairs)
                    self.on_consolidation(state, [i for i, count in enumerate(self.counts) if count > start])
                    state, plan = self.begin_segment(state, plan)
                    room = length
                stop = min(start + room, len(tokens))
                part = tokens.slice(start, stop)
                self.append(state, part, self._rotated(state, part.keys))
                row, entries = replace(state.rows[0]), state.entries
                holes = None if state.holes is None else state.holes[:, :, : state.length()].clone()
                segment = (row.window_start - first_position) // length
                seen = (plan.source, entries.mass, entries.level, entries.salience, holes)
                stretches.append(PlannedStretch(start, stop, row, segment, *seen))
                start = stop
                finished.note(start, state, plan.source)
        return stretches, finished, plan.pairs

    def _count_stretches(self, num_tokens: int, state: BankState) -> list[PlannedStretch]:
        """The plan of a layer without slots, whose state is not wanted: before the window are the sinks."""
        length, first_position = self.settings.segment_length, state.rows[0].window_start
        stretches: list[PlannedStretch] = []
        row, start = replace(state.rows[0]), 0
        while start < num_tokens:
            if row.seen == row.window_start + 2 * length:
                row = replace(row, window_start=row.window_start + length)
            stop = min(start + row.window_start + 2 * length - row.seen, num_tokens)
            row = replace(row, seen=row.seen + stop - start)
            num_sinks = row.num_prefix(self.settings.num_sink_tokens)
            source = torch.arange(num_sinks, device=state.keys.device).expand(*state.keys.shape[:2], -1)
            segment = (row.window_start - first_position) // length
            nothing = torch.zeros_like(source)
            seen = (source, torch.ones_like(source), nothing, nothing, None)
            stretches.append(PlannedStretch(start, stop, row, segment, *seen))
            start = stop
        return stretches

    def _pool(self, tokens: Tokens, state: BankState, pairs: list[torch.Tensor]) -> Pool:
        """All entries of the call; `pairs` [R, G, K, 2] of pool indices merge into level 1, then further ones into level 2."""
        held = state.length()
        in_window = held - len(state.entries)
        bias = torch.cat(
            (
                state.entries.salience_bias,
                salience_bias(torch.cat((state.window_salience[:, :, :in_window], tokens.salience), dim=2)),
            ),
            dim=2,
        )
        mass = F.pad(state.entries.mass, (0, in_window + len(tokens)), value=1)
        keys = torch.cat((state.keys[:, :, :held], tokens.keys), dim=2)
        values = torch.cat((state.values[:, :, :held], tokens.values), dim=2)
        pool = Pool(keys, values, bias, mass)
        for pairs_of_level in pairs:
            pool = pool.extended(pairs_of_level, self.compress)
        return pool

    def _cut(self, tokens: Tokens, state: BankState, groups: list[list[PlannedStretch]], pool: Pool) -> Cut:
        """What the groups read, see `Cut`."""
        length, num_raw, first = self.settings.segment_length, state.length() + len(tokens), len(state.entries)
        cos, sin = self.call.rotary.range(0, num_raw)
        queries = rotate(tokens.queries, cos[-len(tokens) :], sin[-len(tokens) :])
        keys, values = pool.keys[:, :, first:num_raw], pool.values[:, :, first:num_raw]
        counts = [sum(map(len, group)) for group in groups]
        return Cut(
            queries.split(counts, dim=2),
            tokens.complexity.split(counts, dim=2),
            rotate(keys, cos[first:], sin[first:]).split(length, dim=2),
            values.split(length, dim=2),
            first,
            (cos, sin),
        )

    def _groups(self, stretches: list[PlannedStretch]) -> list[list[PlannedStretch]]:
        """Consecutive stretches to be read as one batch."""
        groups = [stretches[:1]]
        for stretch in stretches[1:]:
            group = groups[-1]
            has_room = stretch.row.num_slots == 0 or (len(group) + 1) * len(stretch) <= READ_TOGETHER
            if stretch.is_like(group[0]) and has_room and not self.call.output_attentions:
                group.append(stretch)
            else:
                groups.append([stretch])
        return groups

    def _read_group(self, group: list[PlannedStretch], queries, complexity, cut: Cut, slots: Slots):
        """
        Output [R * K, H, T, D] of K stretches of the same shapes, rows in the outer order, and weights if asked for.

        Args: `queries` [R, H, K * T, D] and `complexity` [R, H, K * T] of theirs.
        """
        settings, row, holes = self.settings, group[0].row, group[0].holes
        num_prefix = group[0].source.shape[2]

        def read():
            keys, values = cut.window(group)
            index = torch.cat([stretch.source for stretch in group], dim=2)  # [R, G, K * N]
            if num_prefix:
                cos, sin = (torch.cat([t[at] for at in self._prefix_index(group, cut)]) for t in cut.rotary)
                prefix = rotate(slots.keys(index), cos, sin), slots.values(index)
                keys, values = (
                    torch.cat((unstrung(before, len(group)), window), dim=2)
                    for before, window in zip(prefix, (keys, values), strict=True)
                )
            biases = (None, None, None)
            if holes is not None or is_biased([stretch.row for stretch in group], settings):
                mass, level, salience = (
                    stacked([getattr(s, name) for s in group]) for name in ("mass", "level", "salience")
                )
                bias = unstrung(slots.bias(index), len(group))
                # Filled on the device: a list would be copied there, and the host would wait for it.
                pressures = torch.stack([bias.new_full((), row_pressure(s.row, settings)) for s in group])
                pressures = pressures.repeat(len(mass) // len(group))[:, None, None]
                key_bias = prefix_bias(mass, bias, salience, pressures, num_prefix - row.num_slots, settings)
                routing = self._routing([row], unstrung(complexity, len(group)), level)
                biases = with_holes(key_bias, *routing, holes, keys.shape[2])
            return self._attend(unstrung(queries, len(group)), keys, values, biases)

        if num_prefix <= RECOMPUTE_ABOVE * settings.segment_length:
            return read()
        return checkpoint(read, use_reentrant=False, preserve_rng_state=False)

    def _prefix_index(self, group: list[PlannedStretch], cut: Cut) -> list[slice | torch.Tensor]:
        """Where `cut.rotary` has the positions of the entries before the window of each stretch."""
        num_prefix, settings = group[0].source.shape[2], self.settings
        starts = [cut.first + stretch.segment * settings.segment_length for stretch in group]
        if rotary_start(num_prefix, num_prefix, settings) == num_prefix:
            return [slice(start - num_prefix, start) for start in starts]
        positions = prefix_positions(num_prefix, settings, group[0].source.device)
        return [positions + start - rotary_start(num_prefix, num_prefix, settings) for start in starts]

    def _differentiable(
        self, part: BankState, source, indices, tokens: Tokens, state: BankState, pool: Pool
    ) -> BankState:
        """The planned state `part` of the sequences at `indices`, with gradients in what it holds."""

        def rows_of(tensor):
            return tensor if len(indices) == len(self.counts) else tensor[indices]

        window_start = part.rows[0].window_start
        in_window = max(row.seen for row in part.rows) - window_start
        offset = window_start - state.rows[0].window_start
        first, spare = len(state.entries) + offset, 2 * self.settings.segment_length - in_window
        window, room = slice(first, first + in_window), (0, 0, 0, spare)
        keys, values = (
            F.pad(torch.cat((take_entries(held, source), held[:, :, window]), dim=2), room)
            for held in (rows_of(pool.keys), rows_of(pool.values))
        )
        salience = torch.cat(
            (state.window_salience[:, :, : state.length() - len(state.entries)], tokens.salience), dim=2
        )
        salience = F.pad(rows_of(salience)[:, :, offset : offset + in_window], (0, spare))
        entries = replace(part.entries, salience_bias=take_entries(rows_of(pool.bias), source))
        assert len(entries) == source.shape[2]
        after = replace(part, keys=keys, values=values, window_salience=salience, entries=entries)
        return after if len(set(self.counts)) == 1 else after.cleared()


def _resolved(source: torch.Tensor, num_raw: int, num_level1: int) -> torch.Tensor:
    """Pool indices of a plan, now that the number of raw entries and of level-1 pairs is known."""
    source = torch.where(source >= Plan.LEVEL2, source - Plan.LEVEL2 + num_raw + num_level1, source)
    return torch.where(source >= Plan.LEVEL1, source - Plan.LEVEL1 + num_raw, source)
