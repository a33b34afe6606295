"""
What one layer of a StateBank remembers: tensors in a `BankState`, and counters of each row, known on the host.

Shapes: `B` rows, `H` query heads, `G` key/value heads, `D` head width, `S` segment length, `N` entries before the window,
`C` = N + 2S entries that there is room for, `Q` stored queries of a segment, `K` taps of the short convolution.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F

from .memory_ops import ENTRY_COLUMNS, QUERY_STRIDE, BankSettings, Entries

# Multiplier of the rolling hash of token ids (odd, so that it can be undone), modulo 2**64.
HASH_BASE = 6364136223846793005
HASH_INVERSE = pow(HASH_BASE, -1, 1 << 64)


@dataclass
class RowState:
    """Host-side counters of one row; they are functions of how many tokens it has read, never of data."""

    seen: int = 0  # real tokens read
    window_start: int = 0  # position of the first token in the window
    slot_counts: tuple[int, ...] = (0, 0, 0)
    pinned: tuple[tuple[int, int], ...] = ()  # spans of positions that are never demoted
    # How the row was fed, which its memory does not depend on: columns of input, padding included (what the library calls
    # the length of a cache), and the runs of padding: how many real tokens stand before one, and its length.
    columns: int = field(default=0, compare=False)
    pads: tuple[tuple[int, int], ...] = field(default=(), compare=False)

    def feed(self, num_columns: int, pads: tuple[int, ...], segment_length: int) -> None:
        """Count columns of input, of which those at `pads` were padding; the others are in `seen` already."""
        if not pads and not self.pads:
            self.columns += num_columns
            return
        runs = dict(self.pads)
        for index, pad in enumerate(pads):
            position = self.seen - (num_columns - pad) + len(pads) - index
            runs[position] = runs.get(position, 0) + 1
        self.columns += num_columns
        # A window, and the segment that has left it last: further back `crop` never goes, however often.
        first = max(self.seen - 3 * segment_length, 0)
        self.pads = tuple(run for run in runs.items() if run[0] >= first)

    def unfed(self, num_columns: int) -> "RowState":
        """As it was before the last `num_columns` columns; `seen` is too low, if anything, beyond the padding remembered."""
        seen, pads, left = self.seen, list(self.pads), num_columns
        while left and pads:
            position, count = pads.pop()
            real = min(left, seen - position)
            padding = min(left - real, count)
            seen, left = seen - real, left - real - padding
            if padding < count:
                pads.append((position, count - padding))
        return replace(self, seen=seen - left, columns=self.columns - num_columns, pads=tuple(pads))

    @property
    def num_slots(self) -> int:
        return sum(self.slot_counts)

    def num_pinned(self, num_sink_tokens: int) -> int:
        """Positions in pinned spans that need a raw slot."""
        count, counted = 0, num_sink_tokens
        for first, last in sorted(self.pinned):
            count += max(last - max(first, counted), 0)
            counted = max(last, counted)
        return count

    def num_prefix(self, num_sink_tokens: int) -> int:
        """Entries before the window: sinks that have left it, and slots."""
        return min(num_sink_tokens, self.window_start) + self.num_slots

    @property
    def phase(self) -> tuple:
        """Rows of equal phase have equal shapes."""
        return (self.seen, self.window_start, self.slot_counts)


@dataclass
class BankState:
    """
    The memory of one layer for `B` rows.

    `keys` and `values` hold the entries of a row in order of time: those before the window, then the window. A row fills the
    front; what lies behind its length is empty, and no value there is ever read. Rows are described by `rows`.
    """

    settings: BankSettings
    rows: list[RowState]
    keys: torch.Tensor  # [B, G, C, D], before RoPE
    values: torch.Tensor  # [B, G, C, D]
    entries: Entries  # the N entries before the window
    window_salience: torch.Tensor  # [B, G, 2S] salience logits of the window
    window_ids: torch.Tensor  # [B, 2S] int64 token ids of the window, -1 where unknown
    queries: torch.Tensor  # [B, H, Q, D], before RoPE: every 8th of the current segment
    complexity: torch.Tensor  # [B, H, Q]: their routing logits
    conv_inputs: torch.Tensor  # [B, K - 1 + 2S, hidden]: inputs of the short convolution, before and in the window
    history: torch.Tensor  # [B] int64: rolling hash of the token ids read
    holes: torch.Tensor | None = None  # [B, G, C]: MASKED at forgotten entries of the window, 0 elsewhere
    # Working copies, rebuilt from the above whenever they are None.
    rotated: torch.Tensor | None = field(default=None, repr=False)  # [B, G, C, D] keys after RoPE
    key_bias: torch.Tensor | None = field(default=None, repr=False)  # [B, G, N]

    DERIVED = ("rotated", "key_bias")

    @staticmethod
    def empty(
        settings: BankSettings, batch_size: int, shapes: "StateShapes", dtype: torch.dtype, device: torch.device
    ) -> "BankState":
        """Rows that have read nothing."""
        precise = torch.promote_types(dtype, torch.float32)
        room = 2 * settings.segment_length
        groups, heads, width = shapes.num_key_value_heads, shapes.num_attention_heads, shapes.head_dim
        stored = settings.num_stored_queries

        def zeros(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        conv_length = room + shapes.conv_kernel - 1 if shapes.conv_kernel else 0
        return BankState(
            settings=settings,
            rows=[RowState() for _ in range(batch_size)],
            keys=zeros(batch_size, groups, room, width),
            values=zeros(batch_size, groups, room, width),
            entries=Entries.empty(batch_size, groups, device, precise),
            window_salience=zeros(batch_size, groups, room, dtype=precise),
            window_ids=zeros(batch_size, room, dtype=torch.int64),
            queries=zeros(batch_size, heads, stored, width),
            complexity=zeros(batch_size, heads, stored, dtype=precise),
            conv_inputs=zeros(batch_size, conv_length, shapes.hidden_size if conv_length else 0),
            history=zeros(batch_size, dtype=torch.int64),
            rotated=zeros(batch_size, groups, room, width),
            key_bias=zeros(batch_size, groups, 0, dtype=precise),
        )

    @property
    def is_uniform(self) -> bool:
        return all(row.phase == self.rows[0].phase for row in self.rows)

    @property
    def is_inference(self) -> bool:
        """Whether tensors stem from `torch.inference_mode`: outside of it they cannot be written."""
        # What else is written is made together with one of these.
        return self.keys.is_inference() or (self.rotated is not None and self.rotated.is_inference())

    def num_prefix(self, row: int = 0) -> int:
        return self.rows[row].num_prefix(self.settings.num_sink_tokens)

    @property
    def conv_reach(self) -> int:
        """Earlier inputs that the short convolution looks back at."""
        return max(self.conv_inputs.shape[1] - 2 * self.settings.segment_length, 0)

    def length(self, row: int = 0) -> int:
        """Entries of a row: before the window and in it."""
        return self.num_prefix(row) + self.rows[row].seen - self.rows[row].window_start

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, those of `entries` with a dotted one."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        named |= {f"entries.{name}": getattr(self.entries, name) for name in ENTRY_COLUMNS}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], rows: list[RowState] | None = None) -> "BankState":
        """Same state with `function` applied to every tensor (batch first in each), and with other rows if given."""
        changed: dict = {name: function(tensor) for name, tensor in self.tensors().items() if "." not in name}
        rows = [replace(row) for row in self.rows] if rows is None else rows
        return replace(self, rows=rows, entries=self.entries.map(function), **changed)

    def select(self, indices: list[int]) -> "BankState":
        """Copies of the rows at `indices`, in that order, without the room that only other rows needed."""
        index = torch.tensor(indices, dtype=torch.int64, device=self.keys.device)
        rows = [replace(self.rows[i]) for i in indices]
        picked = self.map(lambda tensor: tensor.index_select(0, index), rows)
        return picked.resized(max((picked.num_prefix(i) for i in range(len(rows))), default=0))

    def resized(self, num_prefix: int) -> "BankState":
        """Same rows with room for `num_prefix` entries before the window."""
        extra = num_prefix - len(self.entries)
        if extra == 0:
            return self

        def fit(tensor, value=0):
            if tensor is None:
                return None
            return F.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, extra), value=value)

        entries = self.entries.map(fit)
        entries.positions = fit(self.entries.positions, -1)
        entries.token_ids = fit(self.entries.token_ids, -1)
        wide: dict = {name: fit(getattr(self, name)) for name in ("keys", "values", "rotated", "key_bias", "holes")}
        return replace(self, entries=entries, **wide)

    def cleared(self) -> "BankState":
        """Same rows with zeros behind the length of each."""
        segment_length = self.settings.segment_length
        state = self.map(torch.Tensor.clone)
        for index, row in enumerate(state.rows):
            in_window = row.seen - row.window_start
            wide = {name: getattr(state, name) for name in ("keys", "values", "rotated", "holes")}
            for tensor in (tensor for tensor in wide.values() if tensor is not None):
                tensor[index, :, state.length(index) :] = 0
            state.conv_inputs[index, state.conv_reach + in_window :] = 0
            state.window_salience[index, :, in_window:] = 0
            state.window_ids[index, in_window:] = 0
            segment_start = (row.seen - 1) // segment_length * segment_length if row.seen else 0
            stored = -(-(row.seen - segment_start) // QUERY_STRIDE) if segment_start else 0
            state.queries[index, :, stored:] = 0
            state.complexity[index, :, stored:] = 0
        return state

    def under(self, settings: BankSettings) -> "BankState":
        """Same rows under other run-time settings, without the working copies that were made with the former ones."""
        state = replace(self, settings=settings, **dict.fromkeys(BankState.DERIVED))
        return state if any(settings.memory_slots) else state.without_slots()

    def without_slots(self) -> "BankState":
        """Same rows with sinks and window only."""
        if not any(row.num_slots for row in self.rows):
            return self
        if not self.is_uniform:
            return BankState.stack([self.select([i]).without_slots() for i in range(len(self.rows))])
        end, rows = self.num_prefix(), [replace(row, slot_counts=(0, 0, 0)) for row in self.rows]
        first = end - self.rows[0].num_slots

        def cut(tensor):
            return None if tensor is None else torch.cat((tensor[:, :, :first], tensor[:, :, end:]), dim=2)

        wide: dict = {name: cut(getattr(self, name)) for name in ("keys", "values", "holes")}
        entries = self.entries.map(cut)
        return replace(self, rows=rows, entries=entries, **wide, **dict.fromkeys(BankState.DERIVED))

    @staticmethod
    def stack(states: "list[BankState]") -> "BankState":
        """Rows of several states in one batch; they may stand at different positions."""
        room = max(len(state.entries) for state in states)
        if any(state.holes is not None for state in states):
            states = [state.with_holes() for state in states]
        for name in BankState.DERIVED:
            if any(getattr(state, name) is None for state in states):
                states = [replace(state, **{name: None}) for state in states]
        states = [state.resized(room) for state in states]
        rows = [replace(row) for state in states for row in state.rows]
        names = [name for name in states[0].tensors() if "." not in name]
        joined = {name: torch.cat([getattr(state, name) for state in states]) for name in names}
        entries = Entries(*(torch.cat([getattr(state.entries, name) for state in states]) for name in ENTRY_COLUMNS))
        return replace(states[0], rows=rows, entries=entries, **joined)

    def replaced(self, indices: list[int], other: "BankState") -> "BankState":
        """This state with its rows at `indices` taken from `other`, in that order."""
        rest = [i for i in range(len(self.rows)) if i not in indices]
        if not rest and indices == list(range(len(self.rows))):
            return other
        together = BankState.stack([self.select(rest), other]) if rest else other
        order = rest + indices
        return together.select([order.index(i) for i in range(len(self.rows))])

    def without_columns(self) -> "BankState":
        """Same rows, their padding forgotten: as if only real tokens had ever been fed."""
        return replace(self, rows=[replace(row, columns=row.seen, pads=()) for row in self.rows])

    def with_holes(self) -> "BankState":
        if self.holes is not None:
            return self
        return replace(self, holes=self.window_salience.new_zeros(self.keys.shape[:3]))


@dataclass(frozen=True)
class StateShapes:
    """Sizes of a layer that its state depends on."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    conv_kernel: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Rolling hash of token ids
# ---------------------------------------------------------------------------------------------------------------------


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number


def extend_history(
    history: torch.Tensor, token_ids: torch.Tensor, is_real: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Hash of a history extended by new ids: h <- h * BASE + mix(id), modulo 2**64, over the real tokens of each row.

    Args: `history` [B] int64, `token_ids` [B, T] int64, `is_real` [B, T] bool (None: all). Returns [B] int64.
    """
    num_tokens = token_ids.shape[1]
    if num_tokens == 1 and is_real is None:
        return history * _signed(HASH_BASE) + _mix(token_ids[:, 0])
    powers = torch.full((num_tokens,), _signed(HASH_BASE), dtype=torch.int64, device=token_ids.device).cumprod(0)
    powers = F.pad(powers, (1, 0), value=1)
    mixed = _mix(token_ids)
    if is_real is None:
        after = torch.arange(num_tokens - 1, -1, -1, device=token_ids.device)
        return history * powers[num_tokens] + (mixed * powers[after]).sum(1)
    counts = is_real.sum(1)
    after = (counts[:, None] - is_real.cumsum(1)).clamp(min=0)
    return history * powers[counts] + (mixed * powers[after] * is_real).sum(1)


def shorten_history(history: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Undo `extend_history` for the last ids [n] of one row; `history` is its hash, a scalar tensor."""
    for mixed in reversed(_mix(token_ids).tolist()):
        history = (history - mixed) * _signed(HASH_INVERSE)
    return history


def _mix(token_ids: torch.Tensor) -> torch.Tensor:
    state = (token_ids.long() + 1) * _signed(0x9E3779B97F4A7C15)
    return state ^ ((state >> 29) & ((1 << 35) - 1))
