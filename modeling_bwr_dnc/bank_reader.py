"""
How one layer reads tokens into its state: in place without gradients, or planned first and gathered afterwards with them.

Both walk the same segments through the same consolidation. In place, the arrays of the state are the working memory. With
gradients, the walk runs on detached values and only records which pool entry sits where (integers); keys and values are then
gathered from one pool, each merged pair computed once, and every segment is recomputed in the backward pass instead of keeping
its own copy of the keys.

Shapes: `R` sequences, `T` tokens of this call, `H` query heads, `G` key/value heads, `D` head width, `N` entries before the
window, `L` entries visible, `S` segment length, `P` entries of the pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .memory_ops import (
    COMPLEXITY_SHIFT,
    MASKED,
    MAX_SOURCES,
    QUERY_STRIDE,
    USAGE_DECAY,
    BankSettings,
    Candidates,
    Compress,
    Entries,
    Plan,
    add_entries,
    additive_bias,
    attend,
    attention_weights,
    causal_mask,
    consolidate,
    log_mass,
    merge_salience_bias,
    pooled_salience,
    prefix_bias,
    prefix_positions,
    pressure,
    rotary_start,
    rotate,
    route_gates,
    row_numbers,
    salience_bias,
    take_entries,
    take_rows,
)
from .state_bank import BankState, RowState

# Tokens of a layer with slots that are read together, at most (one segment at least), when gradients are wanted.
READ_TOGETHER = 512
# With more segments' worth of entries before the window, each segment's copies of keys and values are computed twice instead of
# kept for the backward pass. With fewer they are small beside what the layer keeps for the tokens themselves.
RECOMPUTE_ABOVE = 4


class RotaryTable:
    """Cosines and sines of RoPE for one forward pass, computed once per range of positions and shared by all layers."""

    def __init__(self, inverse_frequencies: torch.Tensor, scaling: float, dtype: torch.dtype):
        """From inverse frequencies [D / 2], and the factor that some RoPE variants put on cosines and sines."""
        self.dtype, self.device = dtype, inverse_frequencies.device
        # Angles as exact as Llama's and no more: its weights have learned with these, and a converted model is to equal its source.
        self.precise = torch.promote_types(dtype, torch.float32)
        self.frequencies, self.scaling = inverse_frequencies.to(self.precise), scaling
        self.ranges: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def to(self, device: torch.device) -> "RotaryTable":
        return RotaryTable(self.frequencies.to(device), self.scaling, self.dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [..., D] at integer positions [...]."""
        angles = positions[..., None].to(self.precise) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(self.dtype), sin.to(self.dtype)

    def range(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [stop - start, D] of consecutive positions."""
        if torch.compiler.is_compiling():
            # A look-up by position would compile anew for every one.
            return self.at(torch.arange(start, stop, device=self.device))
        if (start, stop) not in self.ranges:
            self.ranges[start, stop] = self.at(torch.arange(start, stop, device=self.device))
        return self.ranges[start, stop]

    def entries(self, num_prefix: int, settings: BankSettings) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [N + 2S, D] of the entries before a window and of those in it."""
        start, room = rotary_start(num_prefix, num_prefix, settings), 2 * settings.segment_length
        if start == num_prefix:
            return self.range(0, num_prefix + room)
        prefix, window = self.at(prefix_positions(num_prefix, settings, self.device)), self.range(start, start + room)
        return torch.cat((prefix[0], window[0])), torch.cat((prefix[1], window[1]))


@dataclass
class Sequences:
    """
    Sequences that stand at the same position and are read together, left-aligned, the shorter ones padded at the end.

    What follows the end of a sequence cannot reach it, by causality; its state is taken at its own end.
    """

    rows: list[int]  # row of the batch that each sequence is in
    counts: list[int]  # real tokens of each
    columns: torch.Tensor | None = None  # [R, T] index of each token in the flattened batch; None: the batch as it is
    is_fresh: bool = False  # starts from an empty state, whatever its row has read
    keeps_state: list[bool] = field(default_factory=list)  # whether a sequence is the last of its row

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """Tokens of these sequences, [R, T, ...], from [B, T, ...]."""
        return batch if self.columns is None else batch.flatten(0, 1)[self.columns]

    def put(self, batch: torch.Tensor | None, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """`batch` [B, T, F] (None: zeros) with the real tokens of these sequences set to `values` [R, T, F]."""
        if self.columns is None:
            return values
        if batch is None:
            batch = values.new_zeros(*shape, values.shape[-1])
        index = torch.cat([self.columns[i, :count] for i, count in enumerate(self.counts)])
        real = torch.cat([values[i, :count] for i, count in enumerate(self.counts)])
        return batch.flatten(0, 1).index_copy(0, index, real).view_as(batch)


@dataclass
class Call:
    """One forward pass: which tokens belong to which sequence, and what its layers share."""

    rotary: RotaryTable
    sequences: list[Sequences]
    token_ids: torch.Tensor  # [B, T], -1 where unknown
    settings: list[BankSettings]  # of each layer
    use_salience: bool
    use_routing: bool
    keeps_state: bool
    # Set when every row goes one token further or none: rows may stand anywhere, and are read together.
    active: list[bool] | None = None
    eager: bool = False
    output_attentions: bool = False
    noise_seed: int | None = None
    # [B, W] column of the batch's mask that each real token of a row stands in, where the whole history is known.
    key_columns: torch.Tensor | None = None
    num_columns: int = 0
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    neutral: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    integers: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    elsewhere: "dict[torch.device, Call]" = field(default_factory=dict)

    def on(self, device: torch.device) -> "Call":
        """The same for layers on another device: those of a model may be spread over several."""
        if device == self.rotary.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = replace(
                self,
                rotary=self.rotary.to(device),
                sequences=[
                    s if s.columns is None else replace(s, columns=s.columns.to(device)) for s in self.sequences
                ],
                token_ids=self.token_ids.to(device),
                key_columns=None if self.key_columns is None else self.key_columns.to(device),
                masks={},
                neutral={},
                integers={},
            )
        return self.elsewhere[device]

    def on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        """Integers that the host knows, [K] int64, shared by all layers; a GPU gets them without the host waiting for it."""
        if torch.compiler.is_compiling():
            return torch.tensor(numbers, device=self.rotary.device)
        key = tuple(numbers)
        if key not in self.integers:
            host = torch.tensor(key, dtype=torch.int64)
            host = host.pin_memory() if self.rotary.device.type == "cuda" else host
            self.integers[key] = host.to(self.rotary.device, non_blocking=True)
        return self.integers[key]

    def neutral_logits(self, like: torch.Tensor, num_groups: int, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Salience [B, T, G] and complexity [B, T, H] of tokens [B, T, ...] where nothing is learned, shared by all layers."""
        if (num_groups, num_heads) not in self.neutral:
            options: dict = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
            salience = torch.zeros(*like.shape[:2], num_groups, **options)
            complexity = torch.full((*like.shape[:2], num_heads), COMPLEXITY_SHIFT, **options)
            self.neutral[num_groups, num_heads] = salience, complexity
        return self.neutral[num_groups, num_heads]

    def causal_mask(self, num_queries: int, num_keys: int, repeats: int = 1) -> torch.Tensor:
        """Additive mask [repeats * T, L], shared by all layers."""
        if (num_queries, num_keys, repeats) not in self.masks:
            mask = causal_mask(num_queries, num_keys, self.rotary.device, self.rotary.dtype)
            self.masks[num_queries, num_keys, repeats] = mask.repeat(repeats, 1)
        return self.masks[num_queries, num_keys, repeats]


@dataclass
class Tokens:
    """What a layer projects from the tokens of some sequences, before RoPE."""

    queries: torch.Tensor  # [R, H, T, D]
    keys: torch.Tensor  # [R, G, T, D]
    values: torch.Tensor  # [R, G, T, D]
    salience: torch.Tensor  # [R, G, T]
    complexity: torch.Tensor  # [R, H, T]
    token_ids: torch.Tensor  # [R, T]

    def __len__(self) -> int:
        return self.keys.shape[2]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        per_head = (self.queries, self.keys, self.values, self.salience, self.complexity)
        queries, keys, values, salience, complexity = map(function, per_head)
        return Tokens(queries, keys, values, salience, complexity, self.token_ids)

    def slice(self, start: int, stop: int) -> "Tokens":
        if start == 0 and stop == len(self):
            return self
        return replace(self.map(lambda tensor: tensor[:, :, start:stop]), token_ids=self.token_ids[:, start:stop])


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


def refreshed(state: BankState, rotary: RotaryTable) -> BankState:
    """Same state with its working copies (rotated keys, slot biases) rebuilt, without gradients, where they are missing."""
    if state.rotated is not None and state.key_bias is not None:
        return state
    with torch.no_grad():
        if not state.is_uniform:
            parts = [refreshed(state.select([i]), rotary) for i in range(len(state.rows))]
            return BankState.stack(parts)
        settings, num_prefix = state.settings, state.num_prefix()
        state = state.resized(num_prefix)
        rotated = rotate(state.keys, *rotary.entries(num_prefix, settings))
        return replace(state, rotated=rotated, key_bias=entries_bias(state.entries, state.rows[0], settings))


def entries_bias(entries: Entries, row: RowState, settings: BankSettings) -> torch.Tensor:
    """See `prefix_bias`."""
    num_sinks, pressure_value = len(entries) - row.num_slots, row_pressure(row, settings)
    return prefix_bias(entries.mass, entries.salience_bias, entries.salience, pressure_value, num_sinks, settings)


def row_pressure(row: RowState, settings: BankSettings) -> float:
    return pressure(row.slot_counts[0], row.window_start, settings)


def is_biased(rows: list[RowState], settings: BankSettings) -> bool:
    """Whether any slot can carry a bias; before the first demotion none does."""
    return any(row.num_slots and (sum(row.slot_counts[1:]) or row_pressure(row, settings) > 0) for row in rows)


def stays_lossless(row: RowState, num_tokens: int, settings: BankSettings) -> bool:
    """Whether every token of a row will still be held, raw, after `num_tokens` more."""
    if row.num_prefix(settings.num_sink_tokens) != row.window_start or row.slot_counts[1] or row.slot_counts[2]:
        return False
    num_segments = -(-(row.seen + num_tokens) // settings.segment_length)
    outside = max(num_segments - 2, 0) * settings.segment_length
    return outside - settings.num_sink_tokens <= settings.memory_slots[0]


class BankReader:
    """Reads the tokens of some sequences in one layer."""

    def __init__(
        self,
        call: Call,
        settings: BankSettings,
        layer_idx: int,
        sequences: Sequences,
        scaling: float,
        compress: Compress | None,
        uses_routing: bool,
        on_consolidation: Callable[[BankState, list[int]], None],
        shows_columns: bool = False,
        only_writes: bool = False,
    ):
        """
        Args:
            compress: the layer's compressor; None without slots.
            on_consolidation: told the state before each consolidation, and the sequences in it.
            shows_columns: attention weights are shown over the columns of the batch, not over the entries read.
            only_writes: no output is wanted of what is read in place, only the state after it.
        """
        self.call, self.settings, self.layer_idx = call, settings, layer_idx
        self.sequences, self.scaling = sequences, scaling
        self.counts = sequences.counts
        self.compress, self.uses_routing, self.on_consolidation = compress, uses_routing, on_consolidation
        self.shows_columns, self.only_writes = shows_columns, only_writes

    # ------------------------------------------------------------------------------------------------- consolidation

    def begin_segment(self, state: BankState, plan: Plan | None = None) -> tuple[BankState, Plan | None]:
        """The state after the older segment of a full window has left it. All rows stand at the same position. `state` is used up."""
        settings, row = self.settings, state.rows[0]
        length, num_prefix = settings.segment_length, len(state.entries)
        num_sinks = min(settings.num_sink_tokens, row.window_start + length)
        if any(settings.memory_slots):
            entries, kept, slot_counts, plan = self._consolidated(state, num_sinks, plan)
            rows = row_numbers(kept, state.keys.shape[2])
            before = take_rows(state.keys, rows), take_rows(state.values, rows)
        else:
            entries, slot_counts = self._sinks(state, num_sinks), (0, 0, 0)
            plan = None if plan is None else Plan(plan.source[:, :, :num_sinks], plan.pairs)
            before = state.keys[:, :, :num_sinks], state.values[:, :, :num_sinks]
        newer = slice(num_prefix + length, num_prefix + 2 * length)
        room = torch.zeros_like(state.keys[:, :, newer])
        keys = torch.cat((before[0], state.keys[:, :, newer], room), dim=2)
        values = torch.cat((before[1], state.values[:, :, newer], room), dim=2)
        counters = [replace(r, window_start=r.window_start + length, slot_counts=slot_counts) for r in state.rows]
        is_same = entries is state.entries
        consolidated = replace(
            state,
            rows=counters,
            entries=entries,
            keys=keys,
            values=values,
            rotated=rotate(keys, *self.call.rotary.entries(len(entries), settings)),
            window_salience=F.pad(state.window_salience[:, :, length:], (0, length)),
            window_ids=F.pad(state.window_ids[:, length:], (0, length)),
            holes=None if state.holes is None else F.pad(state.holes[:, :, newer], (len(entries), length)),
            key_bias=state.key_bias if is_same else entries_bias(entries, counters[0], settings),
        )
        return consolidated, plan

    def _sinks(self, state: BankState, num_sinks: int) -> Entries:
        """The first `num_sinks` of the entries before the window and of its older segment."""
        num_prefix, length = len(state.entries), self.settings.segment_length
        if num_prefix == num_sinks:
            return state.entries
        unused = torch.zeros_like(state.window_salience[:, :, :length])
        entered = self._leaving_entries(state, unused, slice(num_prefix, num_prefix + length))
        return Entries.cat(
            state.entries.map(lambda tensor: tensor[:, :, :num_sinks]),
            entered.map(lambda tensor: tensor[:, :, : max(num_sinks - num_prefix, 0)]),
        )

    def _consolidated(
        self, state: BankState, num_sinks: int, plan: Plan | None
    ) -> tuple[Entries, torch.Tensor, tuple[int, ...], Plan | None]:
        """What stays of the entries before the window and of its older segment, see `consolidate`."""
        settings, num_prefix, row = self.settings, len(state.entries), state.rows[0]
        candidates_end = num_prefix + settings.segment_length
        usage = self.measure_usage(state)
        entered = self._leaving_entries(state, usage[:, :, num_prefix:], slice(num_prefix, candidates_end))
        used = usage[:, :, :num_prefix].lerp(state.entries.usage, USAGE_DECAY)
        entries = Entries.cat(replace(state.entries, usage=used), entered)
        _, paired, quartered = row.slot_counts
        return consolidate(
            Candidates(entries, state.keys, state.values, state.queries, settings, self.layer_idx),
            (candidates_end - num_sinks - paired - quartered, paired, quartered),
            num_sinks,
            self.compress,
            pinned=_pinned(entries, state.rows),
            plan=plan,
            noise_seed=self.call.noise_seed,
        )

    def _leaving_entries(self, state: BankState, usage: torch.Tensor, leaving: slice) -> Entries:
        """The segment that leaves the window, as raw entries."""
        length, row = self.settings.segment_length, state.rows[0]
        shape = usage.shape
        own = state.window_salience[:, :, :length]
        salience = pooled_salience(state.window_salience, self.settings.salience_pooling)[:, :, :length]
        positions = torch.arange(row.window_start, row.window_start + length, device=usage.device).expand(shape)
        token_ids = state.window_ids[:, None, :length].expand(shape)
        if state.holes is not None:
            gone = state.holes[:, :, leaving] < 0
            positions, token_ids = positions.masked_fill(gone, -1), token_ids.masked_fill(gone, -1)

        def alone(source):
            return F.pad(source[..., None], (0, MAX_SOURCES - 1), value=-1)

        level = torch.zeros(shape, dtype=torch.int8, device=usage.device)
        return Entries(level, salience, salience_bias(own), usage, alone(positions), alone(token_ids))

    def measure_usage(self, state: BankState) -> torch.Tensor:
        """
        Share of attention [R, G, N + S] that the entries before the window and its older segment received from the newer one:
        mean over every 8th of its queries, and over the query heads of the group.
        """
        settings = self.settings
        length, num_prefix = settings.segment_length, len(state.entries)
        num_keys = num_prefix + 2 * length
        start = rotary_start(num_prefix + length, num_prefix, settings)
        cos, sin = self.call.rotary.range(start, start + length)
        queries = rotate(state.queries, cos[::QUERY_STRIDE], sin[::QUERY_STRIDE])
        mask = self.call.causal_mask(length, num_keys)[::QUERY_STRIDE]
        bias = additive_bias(*self._biases(state, state.complexity, num_keys))
        weights = attention_weights(queries, state.rotated[:, :, :num_keys], mask, bias, self.scaling)
        return weights.mean(dim=(2, 3))[:, :, : num_prefix + length]

    def _biases(self, state: BankState, complexity: torch.Tensor, num_keys: int):
        """`key_bias`, `gates` and `level` for `attend`; all None where no entry carries a bias."""
        if state.holes is None and not is_biased(state.rows, self.settings):
            return None, None, None
        gates = level = None
        if self.uses_routing and any(row.slot_counts[1] or row.slot_counts[2] for row in state.rows):
            gates, level = route_gates(complexity, self.settings), state.entries.level
        return _with_holes(state.key_bias, gates, level, state.holes, num_keys)

    # --------------------------------------------------------------------------------------------------------- in place

    def _rotated(self, state: BankState, states: torch.Tensor) -> torch.Tensor:
        """Keys or queries [R, :, T, D] of tokens that come next in the window, rotated."""
        start = rotary_start(state.length(), state.num_prefix(), self.settings)
        return rotate(states, *self.call.rotary.range(start, start + states.shape[2]))

    def append(self, state: BankState, tokens: Tokens, rotated: torch.Tensor) -> None:
        """Write tokens, and their `rotated` keys, into the window of rows that stand at the same position; there is room for them."""
        row, count = state.rows[0], len(tokens)
        first, in_window = state.length(), row.seen - row.window_start
        state.keys[:, :, first : first + count] = tokens.keys
        state.values[:, :, first : first + count] = tokens.values
        state.rotated[:, :, first : first + count] = rotated
        state.window_salience[:, :, in_window : in_window + count] = tokens.salience
        state.window_ids[:, in_window : in_window + count] = tokens.token_ids
        # Queries of the segment that the last token is in, at offsets 0, 8, 16, ... (usage begins with segment 1).
        segment_start = (row.seen + count - 1) // self.settings.segment_length * self.settings.segment_length
        slot = -(-(max(row.seen, segment_start) - segment_start) // QUERY_STRIDE)
        first_stored = segment_start + slot * QUERY_STRIDE - row.seen
        if segment_start and first_stored < count:
            stored = slice(first_stored, count, QUERY_STRIDE)
            queries = tokens.queries[:, :, stored]
            state.queries[:, :, slot : slot + queries.shape[2]] = queries
            state.complexity[:, :, slot : slot + queries.shape[2]] = tokens.complexity[:, :, stored]
        for row in state.rows:
            row.seen += count

    def read_in_place(self, tokens: Tokens, state: BankState):
        """
        Output [R, H, T, D] (None if this only writes), attention weights or None, and the state after each sequence's own end.
        `state` is used up.
        """
        outputs: list[torch.Tensor] = []
        weights, finished = [], Finished(self.counts)
        start = 0
        while start < len(tokens):
            row = state.rows[0]
            room = row.window_start + 2 * self.settings.segment_length - row.seen
            if room == 0:
                self.on_consolidation(state, list(range(len(state.rows))))
                state, _ = self.begin_segment(state)
                room = self.settings.segment_length
            count = self._segments_together(state, start)
            if count > 1:
                stop = start + count * room
                outputs += self._read_segments(tokens.slice(start, stop), state)
            else:
                stop = min(start + room, len(tokens))
                read = self._read_stretch(tokens.slice(start, stop), state)
                if read is not None:
                    outputs.append(read[0])
                    weights.append(read[1])
            start = stop
            finished.note(start, state)
        if not outputs:
            return None, None, finished.state()
        return _joined(outputs), self._joined_weights(weights), finished.state()

    def _read_stretch(self, tokens: Tokens, state: BankState):
        """
        Output [R, H, T, D] and attention weights, or None, of tokens for which the window has room; None if this only writes.
        In place.
        """
        if self.only_writes:
            self.append(state, tokens, self._rotated(state, tokens.keys))
            return None
        rotated = self._rotated(state, torch.cat((tokens.keys, tokens.queries), dim=1))
        num_groups = tokens.keys.shape[1]
        self.append(state, tokens, rotated[:, :num_groups])
        num_keys = state.length()
        return self._attend(
            rotated[:, num_groups:],
            state.rotated[:, :, :num_keys],
            state.values[:, :, :num_keys],
            self._biases(state, tokens.complexity, num_keys),
        )

    def _segments_together(self, state: BankState, start: int) -> int:
        """
        Whole segments that `_read_segments` can read from token `start` on. The last before the end of a sequence is left out, so
        that the state before the last consolidation exists.
        """
        row, length = state.rows[0], self.settings.segment_length
        is_eager = self.call.eager or self.call.output_attentions
        if any(self.settings.memory_slots) or state.holes is not None or is_eager:
            return 0
        if state.num_prefix() != self.settings.num_sink_tokens or row.seen - row.window_start != length:
            return 0
        end = min(count for count in self.counts if count > start)
        return -(-(end - start) // length) - 1

    def _read_segments(self, tokens: Tokens, state: BankState) -> tuple[torch.Tensor, ...]:
        """
        Outputs [R, H, S, D] of K > 1 whole segments (none if this only writes), read as one batch by a layer without slots whose
        window holds one segment before them. In place.
        """
        length, num_prefix = self.settings.segment_length, state.num_prefix()
        count = len(tokens) // length
        start = rotary_start(num_prefix, num_prefix, self.settings)
        cos, sin = self.call.rotary.range(start, start + 2 * length)

        def windows(held, new):
            """[R, K, G, 2S, D]"""
            both = torch.cat((held[:, :, num_prefix : num_prefix + length], new), dim=2)
            return both.unfold(2, 2 * length, length).permute(0, 2, 1, 4, 3)

        def with_sinks(held, windows):
            """[R * K, G, N + 2S, D]"""
            sinks = held[:, None, :, :num_prefix].expand(-1, count, -1, -1, -1)
            return torch.cat((sinks, windows), dim=3).flatten(0, 1)

        keys, values = windows(state.keys, tokens.keys), windows(state.values, tokens.values)
        rotated, outputs = rotate(keys, cos, sin), ()
        if not self.only_writes:
            queries = tokens.queries.unflatten(2, (count, length)).transpose(1, 2)
            output, _ = self._attend(
                rotate(queries, cos[length:], sin[length:]).flatten(0, 1),
                with_sinks(state.rotated, rotated),
                with_sinks(state.values, values),
                (None, None, None),
            )
            outputs = output.unflatten(0, (-1, count)).unbind(1)
        for held, last in ((state.keys, keys), (state.values, values), (state.rotated, rotated)):
            held[:, :, num_prefix:] = last[:, -1]
        state.window_salience[:] = tokens.salience[:, :, -2 * length :]
        state.window_ids[:] = tokens.token_ids[:, -2 * length :]
        state.queries[:] = tokens.queries[:, :, -length::QUERY_STRIDE]
        state.complexity[:] = tokens.complexity[:, :, -length::QUERY_STRIDE]
        for row in state.rows:
            row.window_start += (count - 1) * length
            row.seen += count * length
        return outputs

    def read_one_token(self, tokens: Tokens, state: BankState):
        """Like `read_in_place` for one token per active row, of rows that may stand at different positions."""
        active, length = self.call.active, self.settings.segment_length
        due: dict[tuple, list[int]] = {}
        for index, row in enumerate(state.rows):
            if active[index] and row.seen - row.window_start == 2 * length:
                due.setdefault(row.phase, []).append(index)
        for indices in due.values():
            part = state.select(indices) if len(indices) < len(state.rows) else state
            self.on_consolidation(part, indices)
            state = state.replaced(indices, self.begin_segment(part)[0])
        if all(active) and state.is_uniform:
            return self.read_in_place(tokens, state)
        device = state.keys.device
        lengths = [state.length(index) for index in range(len(state.rows))]
        num_keys = min(max(lengths) + 1, state.keys.shape[2])
        positions = [rotary_start(n, state.num_prefix(i), self.settings) for i, n in enumerate(lengths)]
        cos, sin = (t[:, None, None] for t in self.call.rotary.at(self.call.on_device(positions)))
        is_active = self.call.on_device(active).bool()

        def write(buffer, index, value):
            """Write one entry per active row at its own `index`."""
            dim = 1 if buffer.dim() == 2 else 2
            index = self.call.on_device(index).clamp(max=buffer.shape[dim] - 1)
            index = index.view(-1, *(1,) * (buffer.dim() - 1)).expand_as(value)
            keep = is_active.view(-1, *(1,) * (buffer.dim() - 1))
            buffer.scatter_(dim, index, torch.where(keep, value.to(buffer.dtype), buffer.gather(dim, index)))

        write(state.keys, lengths, tokens.keys)
        write(state.values, lengths, tokens.values)
        write(state.rotated, lengths, rotate(tokens.keys, cos, sin))
        in_window = [row.seen - row.window_start for row in state.rows]
        write(state.window_salience, in_window, tokens.salience)
        write(state.window_ids, in_window, tokens.token_ids)
        storing = [
            index
            for index, row in enumerate(state.rows)
            if active[index] and row.seen >= length and row.seen % length % QUERY_STRIDE == 0
        ]
        slots = [state.rows[i].seen % length // QUERY_STRIDE for i in storing]
        if storing:
            rows, places = self.call.on_device(storing), self.call.on_device(slots)
            state.queries[rows, :, places] = tokens.queries[rows, :, 0]
            state.complexity[rows, :, places] = tokens.complexity[rows, :, 0]
        for index, row in enumerate(state.rows):
            row.seen += active[index]
        last = self.call.on_device(lengths)[:, None]
        hidden = torch.arange(num_keys, device=device) > last  # [R, L]
        mask = torch.zeros_like(hidden, dtype=tokens.queries.dtype).masked_fill(hidden, float("-inf"))[:, None, None]
        output, weight = self._attend(
            rotate(tokens.queries, cos, sin),
            state.rotated[:, :, :num_keys],
            state.values[:, :, :num_keys],
            self._biases(state, tokens.complexity, num_keys),
            mask=mask,
        )
        output = output.masked_fill(~is_active[:, None, None, None], 0)
        return output, weight, state

    def _attend(self, queries, keys, values, biases, mask=None):
        """Output [R, H, T, D], and weights if asked for, of rotated queries, the last T of the L entries of their rows."""
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        is_eager = self.call.eager or self.call.output_attentions
        is_causal = num_queries == num_keys and biases[0] is None and not is_eager
        if mask is None and num_queries > 1 and not is_causal:
            mask = self.call.causal_mask(num_queries, num_keys, 1 if is_eager else queries.shape[1] // keys.shape[1])
        if is_eager:
            bias = additive_bias(*biases)
            weights = attention_weights(queries, keys, mask, bias, self.scaling).to(values.dtype).flatten(1, 2)
            shown = None
            if self.call.output_attentions:
                weights, shown = self._shown(weights)
            output = torch.matmul(weights.unflatten(1, (keys.shape[1], -1)), values[:, :, None])
            return output.flatten(1, 2), shown
        return attend(queries, keys, values, None if is_causal else mask, self.scaling, *biases, is_causal), None

    def _shown(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weights [R, H, T, L] to compute with, and as the caller sees them, from which the former derive: over the columns of the
        batch as long as nothing has been dropped and those are known, else over `[sinks | slots | window]`. Of one stretch that
        is the whole call, [B, H, T, L].
        """
        index = None
        if self.shows_columns:
            index = self.call.key_columns[self.sequences.rows, : weights.shape[-1]][:, None, None].expand_as(weights)
            wide = weights.new_zeros(*weights.shape[:-1], self.call.num_columns + 1)
            weights = wide.scatter(-1, index, weights)[..., :-1]
        shown = weights
        is_whole = weights.shape[2] == max(self.counts)
        if is_whole:
            shown = self._put_weights(weights)
            if self.sequences.columns is not None:
                weights = self.sequences.take(shown.transpose(1, 2)).transpose(1, 2)
        if index is not None:
            weights = F.pad(weights, (0, 1)).gather(-1, index)
        return weights, shown

    def _put_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights [B, H, T, L] of the batch from those of these sequences, [R, H, T, L]."""
        if self.sequences.columns is None:
            return weights
        flat = weights.transpose(1, 2).flatten(2)
        batch = self.sequences.put(None, flat, tuple(self.call.token_ids.shape))
        return batch.unflatten(2, weights.shape[1::2]).transpose(1, 2)

    def _joined_weights(self, weights: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Weights of consecutive stretches as [B, H, T, L], those that saw fewer entries padded with zeros."""
        if len(weights) == 1:
            return weights[0]
        if weights[0] is None:
            return None
        widest = max(weight.shape[-1] for weight in weights)
        return self._put_weights(_joined([F.pad(weight, (0, widest - weight.shape[-1])) for weight in weights]))

    # --------------------------------------------------------------------------------------------------- with gradients

    def read_with_gradient(self, tokens: Tokens, state: BankState):
        """Like `read_in_place`, differentiable, and `state` is left as it was."""
        if (
            self.call.keeps_state
            or any(self.settings.memory_slots)
            or state.rows[0].num_slots
            or state.holes is not None
        ):
            stretches, finished, plan = self._plan(tokens.map(lambda tensor: tensor.detach()), state)
        else:
            stretches, finished, plan = (
                self._count_stretches(len(tokens), state),
                None,
                Plan(state.window_ids, ([], [])),
            )
        pool = self._pool(tokens, state, plan)
        num_raw, num_level1 = state.length() + len(tokens), sum(pairs.shape[2] for pairs in plan.pairs[0])
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
                after_part = self._differentiable(part, source, indices, tokens, state, pool)
                finished.parts[index] = (indices, after_part, None)
            after = finished.state()
        return _joined(outputs), self._joined_weights(weights), after

    def _plan(self, tokens: Tokens, state: BankState) -> tuple[list[PlannedStretch], "Finished", Plan]:
        """Walk the segments on detached values; record what each sees and which pairs merge."""
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
                    self.on_consolidation(state, list(range(len(state.rows))))
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
        return stretches, finished, plan

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

    def _pool(self, tokens: Tokens, state: BankState, plan: Plan) -> Pool:
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
        num_raw, num_level1 = keys.shape[2], sum(pairs.shape[2] for pairs in plan.pairs[0])
        for pairs in plan.pairs:
            if pairs:
                pool = pool.extended(_resolved(torch.cat(pairs, dim=2), num_raw, num_level1), self.compress)
        return pool

    def _cut(self, tokens: Tokens, state: BankState, groups: list[list[PlannedStretch]], pool: Pool) -> Cut:
        length, num_raw, first = self.settings.segment_length, state.length() + len(tokens), len(state.entries)
        cos, sin = self.call.rotary.range(0, num_raw)
        queries = rotate(tokens.queries, cos[-len(tokens) :], sin[-len(tokens) :])
        keys, values = (
            rotate(pool.keys[:, :, first:num_raw], cos[first:], sin[first:]),
            pool.values[:, :, first:num_raw],
        )
        counts = [sum(map(len, group)) for group in groups]
        return Cut(
            queries.split(counts, dim=2),
            tokens.complexity.split(counts, dim=2),
            keys.split(length, dim=2),
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
                num_sinks, gates = num_prefix - row.num_slots, None
                key_bias = prefix_bias(mass, bias, salience, pressures, num_sinks, settings)
                if self.uses_routing and (row.slot_counts[1] or row.slot_counts[2]):
                    gates = route_gates(unstrung(complexity, len(group)), settings)
                biases = _with_holes(key_bias, gates, None if gates is None else level, holes, keys.shape[2])
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

        num_prefix, row = source.shape[2], part.rows[0]
        in_window = max(row.seen for row in part.rows) - row.window_start
        first = len(state.entries) + row.window_start - state.rows[0].window_start
        spare = 2 * self.settings.segment_length - in_window
        before = take_entries(rows_of(pool.keys), source), take_entries(rows_of(pool.values), source)
        window = (
            rows_of(pool.keys)[:, :, first : first + in_window],
            rows_of(pool.values)[:, :, first : first + in_window],
        )
        keys, values = (F.pad(torch.cat(both, dim=2), (0, 0, 0, spare)) for both in zip(before, window, strict=True))
        salience = torch.cat(
            (state.window_salience[:, :, : state.length() - len(state.entries)], tokens.salience), dim=2
        )
        offset = row.window_start - state.rows[0].window_start
        salience = F.pad(rows_of(salience)[:, :, offset : offset + in_window], (0, spare))
        entries = replace(part.entries, salience_bias=take_entries(rows_of(pool.bias), source))
        assert entries.level.shape[2] == num_prefix
        after = replace(part, keys=keys, values=values, window_salience=salience, entries=entries)
        return after if len(set(self.counts)) == 1 else after.cleared()


class Finished:
    """States of sequences, each taken where the sequence ends."""

    def __init__(self, counts: list[int]):
        self.counts = counts
        self.parts: list[tuple[list[int], BankState, torch.Tensor | None]] = []

    def note(self, num_read: int, state: BankState, source: torch.Tensor | None = None) -> None:
        """Take the states of the sequences that end within the stretch just read, after `num_read` tokens."""
        done = {index for indices, _, _ in self.parts for index in indices}
        ends = [i for i, count in enumerate(self.counts) if count <= num_read and i not in done]
        if not ends:
            return
        if len(ends) == len(self.counts) and all(self.counts[i] == num_read for i in ends):
            self.parts.append((ends, state, source))
            return
        part = state.select(ends)
        for row, index in zip(part.rows, ends, strict=True):
            row.seen -= num_read - self.counts[index]
        self.parts.append((ends, part.cleared(), None if source is None else source[ends]))

    def state(self) -> BankState:
        """All sequences in their order."""
        if len(self.parts) == 1:
            return self.parts[0][1]
        order = [index for indices, _, _ in self.parts for index in indices]
        together = BankState.stack([part for _, part, _ in self.parts])
        return together.select([order.index(i) for i in range(len(order))])


def _resolved(source: torch.Tensor, num_raw: int, num_level1: int) -> torch.Tensor:
    """Pool indices of a plan, now that the number of raw entries and of level-1 pairs is known."""
    source = torch.where(source >= Plan.LEVEL2, source - Plan.LEVEL2 + num_raw + num_level1, source)
    return torch.where(source >= Plan.LEVEL1, source - Plan.LEVEL1 + num_raw, source)


def _with_holes(key_bias, gates, level, holes, num_keys):
    """Biases of the entries before the window, extended over it where some of its entries were forgotten."""
    if holes is None:
        return key_bias, gates, level
    rest = num_keys - key_bias.shape[2]
    key_bias = (F.pad(key_bias, (0, rest)) + holes[:, :, :num_keys]).clamp(min=MASKED)
    return key_bias, gates, None if level is None else F.pad(level, (0, rest))


def _pinned(entries: Entries, rows: list[RowState]) -> torch.Tensor | None:
    """Entries [R, G, M] that a pinned span holds, None where there is none."""
    if not any(row.pinned for row in rows):
        return None
    pinned = torch.zeros_like(entries.level, dtype=torch.bool)
    for index, row in enumerate(rows):
        for start, end in row.pinned:
            pinned[index] |= ((entries.positions[index] >= start) & (entries.positions[index] < end)).any(-1)
    return pinned


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts [R, H, T, ...] one after the other, laid out as [R, T, H, ...], as what reads them wants it."""
    return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)
