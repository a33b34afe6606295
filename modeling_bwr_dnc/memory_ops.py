"""
The arithmetic of the StateBank: pure functions over tensors, no module and no batch remembered.

All entries of a row and key/value head form one array in order of time, which is also the order of RoPE ranks:

    [ sinks | slots of levels 0, 1, 2 | segment t-1 | segment t ]
      <------- prefix: N entries ----> <------ window --------->

Consolidation never reorders: it drops entries and rewrites some in place (a merged pair sits where its newer part sat).
How many entries each level holds depends on the position alone, so every shape here is known on the host.

Shapes: `B` rows, `T` tokens of this call, `H` query heads, `G` key/value heads, `R` = H / G, `D` head width, `N` entries
before the window, `L` entries visible, `S` segment length, `Q` stored queries of a segment.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

# Source positions that a slot can hold: two merges of two.
MAX_SOURCES = 4
# Every 8th query of a segment is kept to measure usage.
QUERY_STRIDE = 8
USAGE_DECAY = 0.9
# Tokens for which `recency_weight` counts once.
RECENCY_UNIT = 1024
# Up to so many the calls of operations take longer than what they compute.
FEW_NUMBERS = 1 << 14
SALIENCE_SHIFT = 3.0
COMPLEXITY_SHIFT = 4.0
# Weighs nothing after softmax, in every floating point type, without the NaNs of -inf.
MASKED = -1e4


@dataclass(frozen=True)
class BankSettings:
    """Run-time settings of a layer; see `BwrDncConfig` for their meaning."""

    segment_length: int
    num_sink_tokens: int
    memory_slots: tuple[int, ...]
    memory_position: str = "rank"
    routing_thresholds: tuple[float, ...] = (0.5, 0.8)
    use_hard_routing: bool = False
    usage_weight: float = 1.0
    salience_pooling: int = 1
    salience_boost: float = 0.0
    attention_boost: float = 0.0
    salience_scale: float = 1.0
    recency_weight: float = 0.0
    retention_score: str = "salience"

    @property
    def num_stored_queries(self) -> int:
        return -(-self.segment_length // QUERY_STRIDE)


@dataclass
class Entries:
    """
    What is known of the `N` entries before the window, beside their keys and values.

    An entry without a source position is a hole: it was forgotten, weighs nothing, and is the first to be displaced.
    """

    level: torch.Tensor  # [B, G, N] int8: 0 raw, 1 and 2 compressed; sinks are raw
    salience: torch.Tensor  # [B, G, N] float: largest (pooled) salience logit of the parts
    salience_bias: torch.Tensor  # [B, G, N] float: log-mean-exp, weighted by mass, of the parts' biases
    usage: torch.Tensor  # [B, G, N] float: decayed share of attention received
    positions: torch.Tensor  # [B, G, N, MAX_SOURCES] int64: source positions, -1 where unused
    token_ids: torch.Tensor  # [B, G, N, MAX_SOURCES] int64: their token ids, -1 where unknown

    @property
    def mass(self) -> torch.Tensor:
        """Number of source tokens, [B, G, N]."""
        return (self.positions >= 0).sum(-1)

    @property
    def is_hole(self) -> torch.Tensor:
        """[B, G, N]."""
        return self.positions[..., 0] < 0

    @property
    def time(self) -> torch.Tensor:
        """Position of the latest source token, -1 for a hole, [B, G, N]."""
        return self.positions.amax(-1)

    def __len__(self) -> int:
        return self.level.shape[2]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Entries":
        return Entries(*(function(getattr(self, name)) for name in ENTRY_COLUMNS))

    def take(self, index: torch.Tensor) -> "Entries":
        """Entries at `index` [B, G, K] along the entry dimension."""
        return self.take_rows(row_numbers(index, len(self)))

    def take_rows(self, rows: torch.Tensor) -> "Entries":
        """Entries by their `row_numbers` [B, G, K] or, of pairs, [B, G, K, 2]."""
        return self.map(lambda tensor: take_rows(tensor, rows))

    @staticmethod
    def cat(first: "Entries", second: "Entries") -> "Entries":
        pairs = ((getattr(first, name), getattr(second, name)) for name in ENTRY_COLUMNS)
        return Entries(*(torch.cat(pair, dim=2) for pair in pairs))

    @staticmethod
    def empty(batch_size: int, num_heads: int, device: torch.device, dtype: torch.dtype) -> "Entries":
        shape = (batch_size, num_heads, 0)
        number = torch.zeros(shape, device=device, dtype=dtype)
        source = torch.zeros((*shape, MAX_SOURCES), device=device, dtype=torch.int64)
        return Entries(number.to(torch.int8), number, number, number, source, source)


# Asked of the class once: a compiler does not follow `fields`.
ENTRY_COLUMNS = tuple(field.name for field in fields(Entries))


def row_numbers(index: torch.Tensor, length: int) -> torch.Tensor:
    """Where entries at `index` [B, G, ...] of a tensor [B, G, length, ...] are in its flattened form [B * G * length, ...]."""
    first = torch.arange(0, index.shape[0] * index.shape[1] * length, length, device=index.device)
    return index + first.view(*index.shape[:2], *(1,) * (index.dim() - 2))


def take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Entries of [B, G, N, ...] by their `row_numbers` [B, G, K] or, of pairs, [B, G, K, 2]."""
    # Whole rows at once: several times faster on a CPU than `gather`, which goes by elements.
    return tensor.flatten(0, 2).index_select(0, rows.flatten()).view(*rows.shape, *tensor.shape[3:])


def take_entries(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather along dimension 2 of [B, G, N, ...] by an index [B, G, K] or, of pairs, [B, G, K, 2]."""
    return take_rows(tensor, row_numbers(index, tensor.shape[2]))


def put_rows(tensor: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` [B, G, K, ...] to the `row_numbers` [B, G, K] of a [B, G, N, ...] whose rows are evenly spaced."""
    tensor.view(-1, *tensor.shape[3:]).index_copy_(0, rows.flatten(), values.to(tensor.dtype).flatten(0, 2))


def add_entries(tensor: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add `values`, of the shape that `take_entries` gives, to the entries of a contiguous [B, G, N, ...] at `index`, repeats included."""
    rows = row_numbers(index, tensor.shape[2]).flatten()
    tensor.view(-1, *tensor.shape[3:]).index_add_(0, rows, values.flatten(0, index.dim() - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Biases
# ---------------------------------------------------------------------------------------------------------------------


def salience_bias(salience: torch.Tensor) -> torch.Tensor:
    """Logit bias of a raw entry: 0 at the start, at most 0.05 above, unboundedly negative for noise."""
    return F.logsigmoid(salience + SALIENCE_SHIFT) - math.log(1 / (1 + math.exp(-SALIENCE_SHIFT)))


def pooled_salience(salience: torch.Tensor, width: int) -> torch.Tensor:
    """
    Salience logits [B, G, T], of a window for example, as retention sees them: means over those of the `width` tokens around each
    that are among the T. What is worth keeping comes in clauses, not in tokens (SnapKV, Li et al., 2024, pools attention alike).
    """
    if width == 1:
        return salience
    return F.avg_pool1d(salience, width, stride=1, padding=width // 2, count_include_pad=False)


def log_mass(mass: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logarithm of a number of source tokens, 0 for a hole."""
    return mass.clamp(min=1).to(dtype).log()


def merge_salience_bias(bias: torch.Tensor, log_mass: torch.Tensor) -> torch.Tensor:
    """Carried bias [..., K] of pairs [..., K, 2]: its log-mean-exp weighted by mass, so that log(mass) + bias adds up."""
    return torch.logsumexp(bias + log_mass, dim=-1) - torch.logsumexp(log_mass, dim=-1)


def route_thresholds(settings: BankSettings) -> tuple[list[float], list[float]]:
    """Of levels 1 and 2: the logits of their thresholds, and what `route_gates` adds so that a query of the start gets 0."""
    logits = [math.log(tau / (1 - tau)) for tau in settings.routing_thresholds]
    return logits, [math.log1p(math.exp(logit - COMPLEXITY_SHIFT)) for logit in logits]


def route_gates(complexity: torch.Tensor, logits: torch.Tensor, offsets: torch.Tensor, is_hard: bool) -> torch.Tensor:
    """
    Logit biases that a query gives to levels 1 and 2, from its complexity (a logit, 4 at the start).

    Soft: logsigmoid(z - logit(tau)) less its value at the start, hence exactly 0 there. Hard: levels whose threshold is
    above sigmoid(z) are masked.

    Args: `logits` and `offsets` [2], see `route_thresholds`. Returns [..., 2] of their type.
    """
    complexity = complexity[..., None]
    if is_hard:
        return torch.where(complexity >= logits, 0.0, MASKED).to(logits.dtype)
    return F.logsigmoid(complexity - logits) + offsets


def pressure(raw_slots: int, window_start: int, settings: BankSettings) -> float:
    """1 - raw slots held / tokens before the window (sinks aside), `window_start` of them; 0 until the first demotion."""
    outside = window_start - settings.num_sink_tokens
    return 1.0 - raw_slots / outside if outside > 0 else 0.0


def prefix_bias(
    mass: torch.Tensor,
    salience_bias: torch.Tensor,
    salience: torch.Tensor,
    pressure_value: float | torch.Tensor,
    num_sinks: int,
    settings: BankSettings,
) -> torch.Tensor:
    """
    Logit bias of the entries before the window, routing aside, [B, G, N] like what it is made of:
    log(mass) + pressure * (salience_bias + attention_boost * salience / salience_scale, clamped to [0, 1]).
    """
    if settings.attention_boost:
        salience_bias = salience_bias + settings.attention_boost * (salience / settings.salience_scale).clamp(0, 1)
    bias = pressure_value * salience_bias
    bias[:, :, :num_sinks] = 0
    # The logarithm masks holes.
    return (bias + mass.to(bias.dtype).log()).clamp(min=MASKED)


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


def rotary_start(index: int, num_prefix: int, settings: BankSettings) -> int:
    """RoPE position of the window entry (or query) at array index `index`."""
    if settings.memory_position == "rank" or num_prefix <= settings.num_sink_tokens:
        return index
    return index - num_prefix + settings.num_sink_tokens + 1


def prefix_positions(num_prefix: int, settings: BankSettings, device: torch.device) -> torch.Tensor:
    """RoPE positions of the entries before the window, [N]."""
    ranks = torch.arange(num_prefix, device=device)
    return ranks if settings.memory_position == "rank" else ranks.clamp(max=settings.num_sink_tokens)


class Rotation(torch.autograd.Function):
    """
    `rotate` with gradients. Its derivative is the rotation back, for which only the angles are kept; written out as products and
    sums it would make five tensors as large as the states, each way.
    """

    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return rotate(gradient, cos, -sin), None, None


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = states.shape[-1] // 2
    if states.numel() <= FEW_NUMBERS:
        return torch.addcmul(states * cos, states.roll(half, -1), sin)
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary position embedding (Su et al., 2021) in the half-split layout of Llama; cos and sin end in [..., D], their halves
    are equal, but for the sign of sin's first.
    """
    return Rotation.apply(states, cos, sin) if torch.is_grad_enabled() else _rotated(states, cos, sin)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def causal_mask(num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [T, L] of queries that are the last `T` of the `L` entries."""
    mask = torch.full((num_queries, num_keys), float("-inf"), device=device, dtype=dtype)
    return mask.triu(num_keys - num_queries + 1)


def additive_bias(
    key_bias: torch.Tensor | None, gates: torch.Tensor | None, is_level: torch.Tensor | None
) -> torch.Tensor | None:
    """
    Biases of slots as one additive term [B, G, R or 1, T or 1, N].

    Args: `key_bias` [B, G, N], `gates` [B, H, T, 2], `is_level` [B, G, 2, N], indicators of levels 1 and 2, with N entries, the
    first, that carry a bias.
    """
    if key_bias is None:
        return None
    if gates is None:
        return key_bias[:, :, None, None]
    batch_size, num_groups, num_biased = key_bias.shape
    grouped = gates.reshape(batch_size * num_groups, -1, 2)  # [B * G, R * T, 2]
    # As one operation: one token of a small model takes longer to ask for than to compute.
    bias = torch.baddbmm(key_bias.reshape(-1, 1, num_biased), grouped, is_level.reshape(-1, 2, num_biased))
    return bias.view(batch_size, num_groups, -1, gates.shape[2], num_biased)


def attention_weights(
    queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """
    Softmax weights [B, G, R, T, L], in float32 at least, of rotated queries [B, H, T, D] over rotated keys [B, G, L, D];
    `mask` broadcasts to [B, 1, T, L], `bias` comes from `additive_bias`.
    """
    grouped = (queries * scaling).unflatten(1, (keys.shape[1], -1))  # [B, G, R, T, D]
    # Heads of a group folded into the query dimension: a broadcast product would copy the keys for each.
    logits = torch.matmul(grouped.flatten(2, 3), keys.transpose(-1, -2)).unflatten(2, grouped.shape[2:4])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits[..., : bias.shape[-1]].add_(bias)
    if mask is not None:
        logits += mask if mask.dim() == 2 else mask[:, :, None]
    return logits.softmax(dim=-1)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    key_bias: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    is_level: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """
    One fused attention call over everything visible.

    Query heads of a group are folded into the query dimension, so keys and values are never copied. With many queries the
    biases of slots are folded into the dot product by widening the head (q' = [q, gates, 1], k' = [k, onehot, bias]): a mask
    that differs by head and query, or needs a gradient, would leave the fused kernels. With few, an additive mask is less.

    Args:
        queries [B, H, T, D], keys and values [B, G, L, D]: rotated queries and keys.
        mask: additive, [T, L], the same once for each of the R query heads of a group, [R * T, L] (then it need not be copied
            and kept for every call), or [B, 1, T, L]; None when every query sees every key.
        key_bias, gates, is_level: see `additive_bias`.
        is_causal: T equals L and the mask is the plain causal one (then `mask` is None and there are no biases).

    Returns: [B, H, T, D].
    """
    batch_size, num_heads, num_queries, width = queries.shape
    num_groups, num_keys = keys.shape[1:3]
    repeats = num_heads // num_groups
    if is_causal:
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=num_queries > 1, scale=scaling, enable_gqa=repeats > 1
        )
    if key_bias is not None and (num_queries >= QUERY_STRIDE or queries.requires_grad or key_bias.requires_grad):
        queries, keys, values = widen(queries, keys, values, key_bias, gates, is_level, scaling)
        key_bias = None
    folded = queries.reshape(batch_size, num_groups, repeats * num_queries, -1)
    bias = additive_bias(key_bias, gates, is_level)
    if bias is not None:
        bias = F.pad(bias, (0, num_keys - bias.shape[-1])).to(folded.dtype).expand(-1, -1, repeats, num_queries, -1)
        if mask is not None:
            bias = bias + (mask[:num_queries] if mask.dim() == 2 else mask[:, :, None])
        mask = bias.reshape(batch_size, num_groups, repeats * num_queries, num_keys)
    elif mask is not None and mask.shape[-2] == num_queries:
        mask = mask.repeat(*(1,) * (mask.dim() - 2), repeats, 1)
    output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scaling)
    if output.shape[-1] != width:
        output = output[..., :width]
    return output.reshape(batch_size, num_heads, num_queries, width)


def widen(queries, keys, values, key_bias, gates, is_level, scaling):
    """Fold the biases of slots into wider heads; widths stay a multiple of 8, as fused kernels ask."""
    extra = 3 if gates is not None else 1
    padding = -(queries.shape[-1] + extra) % 8
    num_rest = keys.shape[2] - key_bias.shape[2]
    one = queries.new_full((*queries.shape[:-1], 1), 1.0 / scaling)
    query_parts, key_parts = [queries, one], [key_bias[..., None].to(keys.dtype)]
    if gates is not None:
        query_parts.append(gates.to(queries.dtype))
        # Divided here: a masking gate would leave the range of float16, and infinity times 0 is no number.
        key_parts.append(is_level.transpose(2, 3).to(keys.dtype) / scaling)
    key_extra = F.pad(torch.cat(key_parts, dim=-1), (0, padding, 0, num_rest))
    return (
        F.pad(torch.cat(query_parts, dim=-1), (0, padding)),
        torch.cat((keys, key_extra), dim=-1),
        F.pad(values, (0, extra + padding)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Retention: what stays
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Candidates:
    """Everything a retention score may look at: M entries that compete for slots (sinks included, but never demoted)."""

    entries: Entries
    all_keys: torch.Tensor  # [B, G, >= M, D], before RoPE: of the candidates, then of the window
    all_values: torch.Tensor  # [B, G, >= M, D]
    queries: torch.Tensor  # [B, H, Q, D], before RoPE: every 8th of the last full segment
    settings: BankSettings
    layer_idx: int

    @property
    def keys(self) -> torch.Tensor:
        """[B, G, M, D], before RoPE."""
        return self.all_keys[:, :, : len(self.entries)]

    @property
    def values(self) -> torch.Tensor:
        """[B, G, M, D]."""
        return self.all_values[:, :, : len(self.entries)]


def hashed_uniform(positions: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """
    Numbers in (0, 1), float32, from a hash of (seed, key/value head, position): equal on every device, process and recomputation.
    """
    mask = 0xFFFFFFFF
    heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
    state = (positions * 0x9E3779B1 + heads * 0x85EBCA77 + (seed * 0xC2B2AE3D & mask)) & mask
    for multiplier, shift in ((0x7FEB352D, 16), (0x2C1B3C6D, 15), (0x297A2D39, 16)):
        state = state ^ (state >> shift)
        state = (state * multiplier) & mask
    # 23 bits and a half are exact in float32, which every device has.
    return (((state ^ (state >> 16)) >> 9).to(torch.float32) + 0.5) / 2**23


def _score_salience(candidates: Candidates) -> torch.Tensor:
    """
    Salience and usage; and, with weights of their own, recency, for which everything fades alike, and what is positive of salience,
    for which the salient outlasts that.
    """
    entries, settings = candidates.entries, candidates.settings
    score = torch.add(entries.salience, entries.usage, alpha=settings.usage_weight)
    if settings.salience_boost:
        score = score + settings.salience_boost * entries.salience.clamp(min=0)
    if settings.recency_weight:
        score = score + settings.recency_weight / RECENCY_UNIT * entries.time
    return score


def _score_attention(candidates: Candidates) -> torch.Tensor:
    return candidates.entries.usage


def _score_expected_attention(candidates: Candidates) -> torch.Tensor:
    """Log of the expected exponential under a Gaussian fit of the recent queries (Devoto et al., 2025), before RoPE."""
    keys, queries = candidates.keys, candidates.queries
    dtype = candidates.entries.usage.dtype
    grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3).to(dtype)  # [B, G, R*Q, D]
    mean = grouped.mean(2, keepdim=True)
    projected = torch.matmul(keys.to(dtype), (grouped - mean).transpose(-1, -2))  # [B, G, M, R*Q]
    scaling = keys.shape[-1] ** -0.5
    expected = torch.matmul(keys.to(dtype), mean.transpose(-1, -2)).squeeze(-1) * scaling
    return expected + 0.5 * scaling**2 * projected.square().mean(-1) + candidates.values.to(dtype).norm(dim=-1).log()


def _score_key_norm(candidates: Candidates) -> torch.Tensor:
    """Keys of small norm receive much attention (Devoto et al., 2024)."""
    return -candidates.keys.to(candidates.entries.usage.dtype).norm(dim=-1)


def _score_key_difference(candidates: Candidates) -> torch.Tensor:
    """1 - cosine to the mean key (Park et al., 2025), in which what was forgotten has no part."""
    entries = candidates.entries
    keys = F.normalize(candidates.keys.to(entries.usage.dtype), dim=-1).masked_fill(entries.is_hole[..., None], 0)
    # Of the mean only the direction counts.
    return 1.0 - (keys * F.normalize(keys.mean(2, keepdim=True), dim=-1)).sum(-1)


def _score_recency(candidates: Candidates) -> torch.Tensor:
    return candidates.entries.time.to(candidates.entries.usage.dtype)


def _score_random(candidates: Candidates) -> torch.Tensor:
    entries = candidates.entries
    return hashed_uniform(entries.time.clamp(min=0), candidates.layer_idx + 1).to(entries.usage.dtype)


# Plug-in point: `config.retention_score` names one of these, [B, G, M] from `Candidates`, larger is kept longer.
RETENTION_SCORES: dict[str, Callable[[Candidates], torch.Tensor]] = {
    "salience": _score_salience,
    "attention": _score_attention,
    "expected_attention": _score_expected_attention,
    "key_norm": _score_key_norm,
    "key_difference": _score_key_difference,
    "recency": _score_recency,
    "random": _score_random,
}


def retention_scores(candidates: Candidates, noise_seed: int | torch.Tensor | None = None) -> torch.Tensor:
    """
    Retention of every candidate, [B, G, M]; holes come last.

    With a `noise_seed`, Gumbel noise is added to the cut, a hash of (seed, layer, head, position): in training, entries near
    the threshold are then tried on both sides of it.
    """
    entries = candidates.entries
    retention = RETENTION_SCORES[candidates.settings.retention_score](candidates)
    if noise_seed is not None:
        uniform = hashed_uniform(entries.time.clamp(min=0), noise_seed * 1009 + candidates.layer_idx)
        retention = retention - (-uniform.to(retention.dtype).log()).log()
    if retention.dtype == torch.float64:
        # Equal entries differ in their last bits, by the shapes of the products that made them; here they are to tie.
        retention = retention.float()
    # What is no number, of weights that have diverged, would sort before other levels, and upset their counts.
    return retention.masked_fill(entries.is_hole | retention.isnan(), float("-inf"))


# ---------------------------------------------------------------------------------------------------------------------
# Consolidation: what is demoted, merged and forgotten
# ---------------------------------------------------------------------------------------------------------------------

# Levels of candidates that compete in none.
SINK, GONE = -1, -2

# Keys and values [B, G, K, 2, D] and log masses [B, G, K, 2] of K pairs, older first, to merged keys and values [B, G, K, D].
Compress = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Plan:
    """
    Which pool entry each array entry is, in integers, so that values can be gathered later with gradients.

    The pool is [all raw entries | pairs merged into level 1 | pairs merged into level 2]; a level-1 pair has index
    `LEVEL1 + n`, a level-2 pair `LEVEL2 + n`, n counting from the first consolidation of the call.
    """

    # More than the entries of any call, and within 32 bits, to which compilers for GPUs narrow indices.
    LEVEL1 = 1 << 29
    LEVEL2 = 1 << 30

    source: torch.Tensor  # [B, G, N] int64
    pairs: tuple[
        list[torch.Tensor], list[torch.Tensor]
    ]  # per target level: [B, G, K, 2] pool indices, one per boundary


def consolidate(
    candidates: Candidates,
    slot_counts: tuple[int, ...],
    num_sinks: int,
    compress: Compress,
    pinned: torch.Tensor | None = None,
    plan: Plan | None = None,
    noise_seed: int | torch.Tensor | None = None,
) -> tuple[Entries, torch.Tensor, tuple[int, ...], Plan | None]:
    """
    Decide which of M candidates stay, move down a level, merge or are forgotten.

    Args:
        candidates: used up, what is merged is written into them; in order of time; the first `num_sinks` are sinks, `slot_counts` of the others are in levels 0, 1, 2.
        pinned [B, G, M]: entries that are never demoted.
        plan: carried along (its `source` is [B, G, M]) when values are to be gathered later.

    Returns the entries that stay, where they are among the candidates [B, G, K], the slots now held per level, and the plan.
    """
    settings, entries = candidates.settings, candidates.entries
    counts = list(slot_counts)
    # The level that each candidate competes in.
    level = entries.level
    level[:, :, :num_sinks] = SINK
    source = None if plan is None else plan.source
    for lower, capacity in enumerate(settings.memory_slots):
        excess = counts[lower] - capacity
        if excess <= 0:
            continue
        retention = retention_scores(candidates, noise_seed)
        if pinned is not None:
            retention = retention.masked_fill(pinned, torch.finfo(retention.dtype).max)
        # Ascending and stable: of equals the older comes first, and is demoted first. Other levels come last.
        order = retention.masked_fill(level != lower, float("inf")).sort(dim=-1, stable=True).indices
        demoted = order[:, :, :excess].sort(dim=-1).values
        counts[lower] = capacity
        if lower == 2 or settings.memory_slots[lower + 1] == 0:
            level.scatter_(2, demoted, GONE)
            continue
        counts[lower + 1] += -(-excess // 2)
        level.scatter_(2, demoted, lower + 1)
        pairs = demoted[:, :, : excess - excess % 2].unflatten(2, (-1, 2))
        older, newer = pairs.unbind(-1)
        is_newer_better = retention.gather(2, newer) >= retention.gather(2, older)
        mergeable = merge_in_place(candidates, pairs, is_newer_better, lower + 1, compress)
        level.scatter_(2, torch.where(mergeable | is_newer_better, older, newer), GONE)
        if source is not None:
            first_index = (Plan.LEVEL1, Plan.LEVEL2)[lower] + sum(pair.shape[2] for pair in plan.pairs[lower])
            index = torch.arange(first_index, first_index + newer.shape[2], device=source.device)
            plan.pairs[lower].append(take_entries(source, pairs))
            source = source.scatter(2, newer, torch.where(mergeable, index, source.gather(2, newer)))
    num_kept = num_sinks + sum(counts)
    kept = (level == GONE).view(torch.int8).sort(dim=-1, stable=True).indices[:, :, :num_kept]
    entries = entries.take(kept)
    entries.level.clamp_(min=0)
    if source is not None:
        plan = Plan(source.gather(2, kept), plan.pairs)
    return entries, kept, tuple(counts), plan


def merge_in_place(
    candidates: Candidates, pairs: torch.Tensor, is_newer_better: torch.Tensor, max_sources: int, compress: Compress
) -> torch.Tensor:
    """
    Merge pairs of candidates, at `pairs` [B, G, K, 2], older first, whose parts hold at most `max_sources` source tokens each.

    A merged pair takes the place of its newer part, so the order of time holds. What cannot be merged is written too, over the
    part that is to be forgotten, the worse one by `is_newer_better` [B, G, K]. See `Entries` for the rules. Returns which pairs
    were merged, [B, G, K].
    """
    entries, all_keys, all_values = candidates.entries, candidates.all_keys, candidates.all_values
    rows, wide_rows = (row_numbers(pairs, length) for length in (len(entries), all_keys.shape[2]))
    parts = entries.take_rows(rows)
    time = parts.time
    mergeable = ~parts.is_hole.any(-1) & (time[..., 1] - time[..., 0] <= candidates.settings.segment_length)
    is_at_newer = mergeable | ~is_newer_better
    place, wide_place = (torch.where(is_at_newer, both[..., 1], both[..., 0]) for both in (rows, wide_rows))
    weights = log_mass(parts.mass, parts.usage.dtype)
    keys, values = compress(take_rows(all_keys, wide_rows), take_rows(all_values, wide_rows), weights)
    put_rows(all_keys, wide_place, keys)
    put_rows(all_values, wide_place, values)
    put_rows(entries.salience, place, parts.salience.amax(-1))
    put_rows(entries.salience_bias, place, merge_salience_bias(parts.salience_bias, weights))
    put_rows(entries.usage, place, parts.usage.sum(-1))
    # Behind these an entry of the lower level has none.
    for column, sources in ((entries.positions, parts.positions), (entries.token_ids, parts.token_ids)):
        put_rows(column[..., : 2 * max_sources], place, sources[..., :max_sources].flatten(-2))
    return mergeable
