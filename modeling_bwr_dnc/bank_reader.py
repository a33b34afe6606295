"""
How one layer reads tokens into its state: in place, the arrays of the state being the working memory. `planned_reader` walks the
same segments, through the same consolidation, where gradients are wanted.

Shapes: `R` sequences, `T` tokens of this call, `H` query heads, `G` key/value heads, `D` head width, `N` entries before the
window, `L` entries visible, `S` segment length.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from .call import Call, RotaryTable, Sequences, Tokens
from .layer_state import BankState, RowState
from .memory_ops import (
    MASKED,
    MAX_SOURCES,
    QUERY_STRIDE,
    USAGE_DECAY,
    BankSettings,
    Candidates,
    Compress,
    Entries,
    Plan,
    additive_bias,
    attend,
    attention_weights,
    consolidate,
    pooled_salience,
    prefix_bias,
    pressure,
    rotary_start,
    rotate,
    route_gates,
    route_thresholds,
    row_numbers,
    salience_bias,
    take_rows,
)


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
        rotated = rotate(state.keys, *rotary.entries(num_prefix, settings)).to(state.keys.dtype)
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
            on_consolidation: told the state before each consolidation, and the sequences in it that go on.
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
            rotated=rotate(keys, *self.call.rotary.entries(len(entries), settings)).to(keys.dtype),
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
        """`key_bias`, `gates` and `is_level` for `attend`; all None where no entry carries a bias."""
        if state.holes is None and not is_biased(state.rows, self.settings):
            return None, None, None
        routing = self._routing(state.rows, complexity, state.entries.level)
        return with_holes(state.key_bias, *routing, state.holes, num_keys)

    def _routing(
        self, rows: list[RowState], complexity: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`gates` and `is_level` for `attend`, of queries of some `complexity` over entries of a `level`; None where all are raw."""
        if not self.uses_routing or not any(row.slot_counts[1] or row.slot_counts[2] for row in rows):
            return None, None
        dtype = torch.promote_types(complexity.dtype, torch.float32)
        logits, offsets = (self.call.on_device(numbers, dtype) for numbers in route_thresholds(self.settings))
        is_level = (level[:, :, None] == self.call.on_device((1, 2), torch.int8)[:, None]).to(dtype)
        return route_gates(complexity, logits, offsets, self.settings.use_hard_routing), is_level

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

    def read(self, tokens: Tokens, state: BankState):
        """
        Output [R, H, T, D] (None if this only writes), attention weights or None, and the state after each sequence's own end.
        `state` is used up.
        """
        return self._read_in_place(tokens, state) if self.call.active is None else self._read_one_token(tokens, state)

    def _read_in_place(self, tokens: Tokens, state: BankState):
        """`read`, of rows that stand at the same position."""
        outputs: list[torch.Tensor] = []
        weights, finished = [], Finished(self.counts)
        start = 0
        while start < len(tokens):
            row = state.rows[0]
            room = row.window_start + 2 * self.settings.segment_length - row.seen
            if room == 0:
                self.on_consolidation(state, [i for i, count in enumerate(self.counts) if count > start])
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
        return joined(outputs), self.joined_weights(weights), finished.state()

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

    def _read_one_token(self, tokens: Tokens, state: BankState):
        """`read`, of one token per active row; rows may stand at different positions."""
        active, length = self.call.active, self.settings.segment_length
        due: dict[tuple, list[int]] = {}
        for index, row in enumerate(state.rows):
            if active[index] and row.seen - row.window_start == 2 * length:
                due.setdefault(row.phase, []).append(index)
        for indices in due.values():
            self.on_consolidation(state, indices)
            part = state.select(indices) if len(indices) < len(state.rows) else state
            state = state.replaced(indices, self.begin_segment(part)[0])
        if all(active) and state.is_uniform:
            return self._read_in_place(tokens, state)
        lengths = [state.length(index) for index in range(len(state.rows))]
        num_keys = max(length + is_read for length, is_read in zip(lengths, active, strict=True))
        positions = [rotary_start(n, state.num_prefix(i), self.settings) for i, n in enumerate(lengths)]
        cos, sin = self.call.rotations_of_rows(positions)
        is_active = None if all(active) else self.call.on_device(active).bool()

        def write(buffer, index, value):
            """Write one entry per active row at its own `index`."""
            dim, one = 1 if buffer.dim() == 2 else 2, (1,) * (buffer.dim() - 1)
            index = self.call.on_device([min(i, buffer.shape[dim] - 1) for i in index])
            index, value = index.view(-1, *one).expand_as(value), value.to(buffer.dtype)
            if is_active is not None:
                value = torch.where(is_active.view(-1, *one), value, buffer.gather(dim, index))
            buffer.scatter_(dim, index, value)

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
        output, weight = self._attend(
            rotate(tokens.queries, cos, sin),
            state.rotated[:, :, :num_keys],
            state.values[:, :, :num_keys],
            self._biases(state, tokens.complexity, num_keys),
            mask=self.call.mask_of_rows(lengths, num_keys).to(tokens.queries.dtype),
        )
        if is_active is not None:
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

    def joined_weights(self, weights: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Weights of consecutive stretches as [B, H, T, L], those that saw fewer entries padded with zeros."""
        if len(weights) == 1:
            return weights[0]
        if weights[0] is None:
            return None
        widest = max(weight.shape[-1] for weight in weights)
        return self._put_weights(joined([F.pad(weight, (0, widest - weight.shape[-1])) for weight in weights]))


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


def with_holes(key_bias, gates, is_level, holes, num_keys):
    """Biases of the entries before the window, extended over it where some of its entries were forgotten."""
    if holes is None:
        return key_bias, gates, is_level
    rest = num_keys - key_bias.shape[2]
    key_bias = (F.pad(key_bias, (0, rest)) + holes[:, :, :num_keys]).clamp(min=MASKED)
    return key_bias, gates, None if is_level is None else F.pad(is_level, (0, rest))


def _pinned(entries: Entries, rows: list[RowState]) -> torch.Tensor | None:
    """Entries [R, G, M] that a pinned span holds, None where there is none."""
    if not any(row.pinned for row in rows):
        return None
    pinned = torch.zeros_like(entries.level, dtype=torch.bool)
    for index, row in enumerate(rows):
        for start, end in row.pinned:
            pinned[index] |= ((entries.positions[index] >= start) & (entries.positions[index] < end)).any(-1)
    return pinned


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts [R, H, T, ...] one after the other, laid out as [R, T, H, ...], as what reads them wants it."""
    return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)
