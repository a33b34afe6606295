"""
What one forward pass is about: which of its tokens belong to which sequence, and what all layers share of it.

Shapes: `B` rows, `T` tokens of this call, `R` sequences, `H` query heads, `G` key/value heads, `D` head width, `N` entries before
the window, `L` entries visible, `S` segment length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .memory_ops import COMPLEXITY_SHIFT, BankSettings, causal_mask, prefix_positions, rotary_start
from .state_bank import StateBankCache


def shared(made: dict, key: tuple, make: Callable):
    """What is made once for all layers. Compiled, a look-up by position would compile anew for every one."""
    if torch.compiler.is_compiling():
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


class RotaryTable:
    """Cosines and sines of RoPE for one forward pass, see `rotate`, computed once per range of positions and shared by all layers."""

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
        """Cosines and sines [..., D] at integer positions [...], as `rotate` takes them."""
        angles = positions[..., None].to(self.precise) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1:
            cos, sin = cos * self.scaling, sin * self.scaling
        return torch.cat((cos, cos), dim=-1).to(self.dtype), torch.cat((-sin, sin), dim=-1).to(self.dtype)

    def range(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [stop - start, D] of consecutive positions."""
        return shared(self.ranges, (start, stop), lambda: self.at(torch.arange(start, stop, device=self.device)))

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
    noise_seed: int | torch.Tensor | None = None
    # [B, W] column of the batch's mask that each real token of a row stands in, where the whole history is known.
    key_columns: torch.Tensor | None = None
    num_columns: int = 0
    masks: dict[tuple, torch.Tensor] = field(default_factory=dict)
    rotations: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    neutral: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    numbers: dict[tuple, torch.Tensor] = field(default_factory=dict)
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
                rotations={},
                neutral={},
                numbers={},
            )
        return self.elsewhere[device]

    def on_device(self, numbers: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Numbers that the host knows, [K], shared by all layers; a GPU gets them without the host waiting for it."""
        if torch.compiler.is_compiling():
            return torch.tensor(numbers, dtype=dtype, device=self.rotary.device)
        if self.rotary.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # What a CUDA graph copies from the host must outlive it: here nothing is copied.
            return torch.stack([torch.full((), n, dtype=dtype, device=self.rotary.device) for n in numbers])
        key = (dtype, *numbers)
        if key not in self.numbers:
            host = torch.tensor(numbers, dtype=dtype, device="cpu")
            host = host.pin_memory() if self.rotary.device.type == "cuda" else host
            self.numbers[key] = host.to(self.rotary.device, non_blocking=True)
        return self.numbers[key]

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

    def rotations_of_rows(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [R, 1, 1, D] of one position per row, shared by all layers in which the rows stand there."""
        return shared(self.rotations, tuple(positions), lambda: self._rotations_of_rows(positions))

    def _rotations_of_rows(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary.at(self.on_device(positions))
        return cos[:, None, None], sin[:, None, None]

    def mask_of_rows(self, last: Sequence[int], num_keys: int) -> torch.Tensor:
        """Additive mask [R, 1, 1, L] of queries that see the entries up to one per row, shared by all layers."""
        return shared(self.masks, ("rows", num_keys, *last), lambda: self._mask_of_rows(last, num_keys))

    def _mask_of_rows(self, last: Sequence[int], num_keys: int) -> torch.Tensor:
        hidden = torch.arange(num_keys, device=self.rotary.device) > self.on_device(last)[:, None]
        return torch.zeros_like(hidden, dtype=self.rotary.dtype).masked_fill(hidden, float("-inf"))[:, None, None]


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


# ---------------------------------------------------------------------------------------------------------------------
# Which token belongs to which sequence
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """How the tokens of a call fall into sequences; all counts are known on the host."""

    sequences: list[Sequences]
    active: list[bool] | None = None  # see `Call`
    real: torch.Tensor | None = None  # [B, T] bool: tokens that are no padding; None: all
    counted: torch.Tensor | None = None  # [B, T] bool: tokens that extend the history of their row; None: all
    restarted: list[int] = field(default_factory=list)  # rows whose history starts anew
    key_columns: torch.Tensor | None = None  # see `Call`
    num_columns: int = 0


def lay_out(
    shape: tuple[int, ...],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: StateBankCache | None,
    segment_length: int,
    device: torch.device,
    wants_columns: bool = False,
) -> Layout:
    """
    Group the real tokens of a call [B, T] into sequences that can be read together.

    Raises `ValueError` for a mask or positions of another shape, or a mask that contradicts what the cache has read.
    """
    batch_size, num_tokens = shape
    everything = list(range(batch_size))
    phases = None
    if cache is not None and cache.states:
        phases = [tuple(layer.state.rows[row].phase for layer in cache.layers) for row in everything]
    seen = [row.seen for row in cache.rows] if phases else [0] * batch_size
    real = None if attention_mask is None else _real_tokens(attention_mask, shape, seen)
    starts = None if position_ids is None else _document_starts(position_ids, real, shape, seen)
    is_uniform = phases is None or all(phase == phases[0] for phase in phases)
    # Rows at different positions are read together in place only, without gradients.
    is_step = num_tokens == 1 and starts is None and not torch.is_grad_enabled()
    if real is None and starts is None:
        whole = Sequences(everything, [num_tokens] * batch_size, keeps_state=[True] * batch_size)
        layout = Layout([whole])
        if wants_columns and attention_mask is not None:
            _note_columns(layout, attention_mask, seen, whole.counts)
        if is_uniform:
            return layout
        if is_step:
            layout.active = [True] * batch_size
            return layout
    if real is None:
        real = torch.ones(shape, dtype=torch.bool, device=device)
    real_columns = [row.nonzero().squeeze(-1) for row in real]
    counts = [len(columns) for columns in real_columns]
    layout = Layout([], real=real, counted=real.clone())
    if wants_columns and attention_mask is not None and starts is None:
        _note_columns(layout, attention_mask, seen, counts)
    if is_step:
        layout.sequences = [Sequences(everything, counts, keeps_state=[True] * batch_size)]
        layout.active = [count == 1 for count in counts]
        return layout
    # By whether they start anew, and where they stand: (row, columns, whether it is the last of its row).
    documents: dict[tuple, list[tuple[int, torch.Tensor, bool]]] = {}
    for row, columns in enumerate(real_columns):
        begins = [] if starts is None else starts[row][columns].nonzero().squeeze(-1).tolist()
        cuts = [0, *(begin for begin in begins if begin > 0), len(columns)]
        for first, last in zip(cuts, cuts[1:], strict=False):
            if first == last:
                continue
            is_fresh = first in begins and (first > 0 or seen[row] > 0)
            key = ("fresh",) if is_fresh or phases is None else phases[row]
            documents.setdefault((is_fresh, key), []).append((row, columns[first:last], last == len(columns)))
            if is_fresh and last == len(columns):
                layout.restarted.append(row)
                layout.counted[row, : columns[first]] = False
    for (is_fresh, _), found in documents.items():
        layout.sequences += _grouped(found, num_tokens, is_fresh, 2 * segment_length)
    return layout


def _real_tokens(attention_mask: torch.Tensor, shape: tuple[int, ...], seen: list[int]) -> torch.Tensor | None:
    """Real tokens of a call, [B, T] bool, None if all are. The mask may cover the history, too, and must then agree with it."""
    batch_size, num_tokens = shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < num_tokens:
        raise ValueError(
            f"`attention_mask` has the shape {list(attention_mask.shape)}, but must be [{batch_size}, {num_tokens}], or wider by "
            "the history before; BWR-DNC makes its own causal mask, and takes no 4D one."
        )
    num_before = attention_mask.shape[1] - num_tokens
    if num_before:
        before = (attention_mask[:, :num_before] != 0).sum(1).tolist()
        if before != seen:
            raise ValueError(
                f"`attention_mask` says that the rows have read {before} tokens, but the cache has read {seen}; pass the mask of "
                "the whole history, or only that of the new tokens."
            )
    real = attention_mask[:, num_before:] != 0
    return None if bool(real.all()) else real


def check_positions(position_ids: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` for positions that are not those of tokens [B, T], or of one row for all, and perhaps the history before."""
    batch_size, num_tokens = shape
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] < num_tokens:
        raise ValueError(
            f"`position_ids` has the shape {list(position_ids.shape)}, but must be [{batch_size}, {num_tokens}], or wider by the history "
            "before; they only mark where packed documents start, leave them out otherwise."
        )


def _document_starts(
    position_ids: torch.Tensor, real: torch.Tensor | None, shape: tuple[int, ...], seen: list[int]
) -> torch.Tensor | None:
    """Where packed documents start, [B, T] bool; None if every row only continues."""
    check_positions(position_ids, shape)
    starts = (position_ids[:, -shape[1] :] == 0).expand(shape)
    if real is not None:
        starts = starts & real
    before_first = torch.ones(shape, dtype=torch.int64, device=starts.device) if real is None else real.long()
    is_first = (before_first.cumsum(1) == 1) & (before_first == 1)
    is_new = torch.tensor([count == 0 for count in seen], device=starts.device)[:, None]
    return starts if bool((starts & ~(is_first & is_new)).any()) else None


def _note_columns(layout: Layout, attention_mask: torch.Tensor, seen: list[int], counts: list[int]) -> None:
    """Remember the column of every real token of the history, if the mask covers all of it."""
    columns = [row.nonzero().squeeze(-1) for row in attention_mask]
    if [len(row) for row in columns] == [a + b for a, b in zip(seen, counts, strict=True)]:
        layout.num_columns = attention_mask.shape[1]
        layout.key_columns = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=layout.num_columns)


def _grouped(
    documents: list[tuple[int, torch.Tensor, bool]], num_tokens: int, is_fresh: bool, short: int
) -> list[Sequences]:
    """Documents that stand at the same position, in groups of similar length: at most half of a group is padding."""
    groups: list[list[tuple[int, torch.Tensor, bool]]] = []
    for document in sorted(documents, key=lambda item: -len(item[1])):
        longest = len(groups[-1][0][1]) if groups else 0
        if groups and (longest <= short or 2 * len(document[1]) >= longest):
            groups[-1].append(document)
        else:
            groups.append([document])
    sequences = []
    for group in groups:
        group.sort(key=lambda item: item[0])
        flat = [columns + row * num_tokens for row, columns, _ in group]
        longest = max(map(len, flat))
        padded = [torch.cat((columns, columns[:1].expand(longest - len(columns)))) for columns in flat]
        rows, counts = [row for row, _, _ in group], [len(columns) for columns in flat]
        sequences.append(Sequences(rows, counts, torch.stack(padded), is_fresh, [is_last for _, _, is_last in group]))
    return sequences
