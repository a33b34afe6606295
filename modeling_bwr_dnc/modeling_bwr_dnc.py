"""
BWR-DNC: a Llama-style decoder that reads through an exact local window and a bounded bank of memory slots.

What is unusual here, compared with Llama:

* Attention reads `[sinks | slots | previous segment | current segment]`, segment by segment (`bank_reader`, `planned_reader`, `memory_ops`).
* `past_key_values` is a `StateBankCache` of constant size (`state_bank`).
* The model counts the real tokens of every row itself, on the host: padding is skipped wherever it stands, and
  `position_ids` only mark where packed documents start, by returning to 0.

Cost per token and layer beside the projections: at most 2 * H * D * (sinks + slots + 2S) multiply-adds to read, and per
segment one consolidation of about (slots + S) entries per key/value head.

Shapes: `B` rows, `T` tokens of this call, `H` query heads, `G` key/value heads, `D` head width, `L` entries visible,
`S` segment length, `K` taps of the short convolution.
"""

import copy
import functools
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .bank_reader import BankReader, refreshed, stays_lossless
from .call import Call, Layout, RotaryTable, Sequences, Tokens, check_positions, lay_out
from .configuration_bwr_dnc import BwrDncConfig, require, require_budget
from .layer_state import BankState, RowState, StateShapes, extend_history
from .linear import apply_linear, gated_linear
from .memory_ops import COMPLEXITY_SHIFT, BankSettings
from .planned_reader import PlannedReader
from .state_bank import StateBankCache, StateBankLayer, check_matches_config, check_pinned_fit
from .token_loss import IGNORED, autocast_dtype, is_plain_head, summed_cross_entropy

# Tokens read at a time from a long input of which only the last logits are wanted.
READ_BLOCK_LENGTH = 1024
# Bytes up to which the C library of a CPU (glibc) uses memory again instead of asking the system for new pages, which are touched
# one by one; half of its limit, to stay clear of it.
LARGEST_REUSED = 16 << 20
# Tokens whose logits the loss looks at together.
LOSS_CHUNK = 256


class BwrDncRMSNorm(nn.Module):
    """Root mean square normalisation, in float32 at least."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype, weight = hidden_states.dtype, self.weight
        is_single = dtype == weight.dtype == torch.float32
        hidden_states = hidden_states if is_single else hidden_states.to(torch.promote_types(dtype, torch.float32))
        if not torch.is_grad_enabled():
            # The same numbers in fewer steps, which is 4% of the time of a decoded token; no faster with gradients.
            if is_single:
                return F.rms_norm(hidden_states, weight.shape, weight, self.eps)
            return weight * F.rms_norm(hidden_states, weight.shape, eps=self.eps).to(dtype)
        variance = hidden_states.square().mean(-1, keepdim=True)
        return weight * (hidden_states * torch.rsqrt(variance + self.eps)).to(dtype)


class BwrDncMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: BwrDncConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.width = config.intermediate_size
        self.hidden_act, self.act_fn = config.hidden_act, ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, is_checkpointed: bool = False) -> torch.Tensor:
        """`is_checkpointed`: the whole layer is computed again in the backward pass, and keeps nothing before."""
        # These are the largest tensors of a layer; without gradients as few as possible are made.
        if not torch.is_grad_enabled():
            gate = apply_linear(self.gate_proj, hidden_states)
            gate = F.silu(gate, inplace=True) if self.hidden_act == "silu" else self.act_fn(gate)
            return apply_linear(self.down_proj, gate.mul_(apply_linear(self.up_proj, hidden_states)))
        parts = [self._mixed(part, is_checkpointed) for part in self._parts(hidden_states)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _parts(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Parts [B, <= T, hidden] of the tokens, whose widest tensors the C library of a CPU can use again."""
        if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            return (hidden_states,)
        width = hidden_states.shape[0] * self.width * hidden_states.element_size()
        return hidden_states.split(max(LARGEST_REUSED // width, 1), dim=1)

    def _mixed(self, hidden_states: torch.Tensor, is_checkpointed: bool) -> torch.Tensor:
        gate, up = apply_linear(self.gate_proj, hidden_states), apply_linear(self.up_proj, hidden_states)
        if is_checkpointed:
            return self._gated(gate, up)
        # Two tensors are computed again in the backward pass instead of kept.
        mixed = gated_linear(self.down_proj, gate, up) if self.hidden_act == "silu" else None
        if mixed is not None:
            return mixed
        # Adapters may put dropout there; without, nothing is random.
        has_dropout = not isinstance(self.down_proj, nn.Linear)
        return checkpoint(self._gated, gate, up, use_reentrant=False, preserve_rng_state=has_dropout)

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return apply_linear(self.down_proj, self.act_fn(gate) * up)


class PreciseLinear(nn.Module):
    """
    A linear map without bias, zero at the start, computed in float32 at least, also under autocast.

    Deliberately no `nn.Linear`: quantisation and "all-linear" adapters leave the memory's own projections alone.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if not inputs.dtype == weight.dtype == torch.float32:
            dtype = torch.promote_types(inputs.dtype, torch.float32)
            inputs, weight = inputs.to(dtype), weight.to(dtype)
        if autocast_dtype(inputs.device.type) is None:
            return F.linear(inputs, weight)
        with torch.autocast(device_type=inputs.device.type, enabled=False):
            return F.linear(inputs, weight)


class Compressor(nn.Module):
    """
    Two entries into one, by cross-attention from a learned latent query over the pair (as in the Perceiver).

    At the start the latent query is zero, which makes it the mean weighted by mass, of keys before RoPE and of values. The
    residuals, zero at the start, can bring back what a mean loses.
    """

    def __init__(self, config: BwrDncConfig):
        super().__init__()
        width = config.head_dim
        self.is_learned = config.use_learned_compressor
        self.latent_query = nn.Parameter(torch.zeros(config.num_key_value_heads, width))
        self.key_residual = PreciseLinear(2 * width, width)
        self.value_residual = PreciseLinear(2 * width, width)

    def forward(
        self, keys: torch.Tensor, values: torch.Tensor, log_mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, K, 2, D] and log masses [B, G, K, 2] of K pairs; returns merged keys and values [B, G, K, D]."""
        dtype, precise, logits = keys.dtype, log_mass.dtype, log_mass
        if self.is_learned:
            latent = self.latent_query.to(precise)[:, None, None] * keys.shape[-1] ** -0.5  # [G, 1, 1, D]
            logits = logits + (keys.to(precise) * latent).sum(-1)
        weights = logits.softmax(-1)[..., None].to(dtype)
        merged_keys, merged_values = (keys * weights).sum(-2), (values * weights).sum(-2)
        if self.is_learned:
            merged_keys = merged_keys + self.key_residual(keys.flatten(-2)).to(dtype)
            merged_values = merged_values + self.value_residual(values.flatten(-2)).to(dtype)
        return merged_keys, merged_values


class Memory(nn.Module):
    """The learned parts of one state bank, all neutral at the start."""

    def __init__(self, config: BwrDncConfig):
        super().__init__()
        self.salience = PreciseLinear(config.hidden_size, config.num_key_value_heads)
        self.routing = PreciseLinear(config.hidden_size, config.num_attention_heads)
        self.compressor = Compressor(config)
        self.secondary_salience: PreciseLinear | None = None
        if config.use_secondary_salience:
            self.add_secondary_salience()

    def add_secondary_salience(self) -> None:
        """A second head, neutral at the start, for what is worth keeping where there is room; see `salience_logits`."""
        weight = self.salience.weight
        self.secondary_salience = PreciseLinear(*weight.shape[::-1])
        self.secondary_salience.weight = nn.Parameter(torch.zeros_like(weight))

    def salience_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Salience [B, T, G] of tokens [B, T, hidden]. The second head lifts it, but never above 0, where `salience_boost` and
        `attention_boost` begin: what it lifts goes before other tokens, and never before what the first head finds salient.
        """
        salience = self.salience(hidden_states)
        if self.secondary_salience is None:
            return salience
        # Clamped, and not by `relu`, whose gradient at 0, where a neutral head is, would never let it learn.
        return salience + torch.minimum(self.secondary_salience(hidden_states).clamp(min=0), (-salience).clamp(min=0))


class ShortConvolution(nn.Module):
    """
    Depthwise causal convolution over a sequence's own tokens, added to its input: it lets one slot bind a key to the value
    beside it. Zero at the start.
    """

    def __init__(self, config: BwrDncConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, 1, config.short_conv_kernel))

    def forward(
        self, hidden_states: torch.Tensor, call: Call, state: BankState
    ) -> tuple[torch.Tensor, dict[int, tuple[RowState, torch.Tensor]]]:
        """
        Output [B, T, hidden]; and for every row that goes on, its counters before this call, and its inputs from the K - 1
        before its window to the latest one, for `inputs_at`.
        """
        reach = self.weight.shape[-1] - 1
        output = torch.zeros_like(hidden_states)
        inputs: dict[int, tuple[RowState, torch.Tensor]] = {}
        for sequences in call.sequences:
            tokens = sequences.take(hidden_states)
            before = [RowState() if sequences.is_fresh else replace(state.rows[row]) for row in sequences.rows]
            held = []
            for row, counters in zip(sequences.rows, before, strict=True):
                past = state.conv_inputs[row, : reach + counters.seen - counters.window_start]
                held.append(past.new_zeros(reach, past.shape[-1]) if sequences.is_fresh else past)
            recent = torch.cat((torch.stack([past[len(past) - reach :] for past in held]), tokens), dim=1)
            mixed = F.conv1d(recent.transpose(1, 2), self.weight.to(recent.dtype), groups=recent.shape[-1])
            output = sequences.put(output, mixed.transpose(1, 2), hidden_states.shape[:2])
            for index, row in enumerate(sequences.rows):
                if sequences.keeps_state[index]:
                    real = tokens[index, : sequences.counts[index]]
                    inputs[row] = (before[index], torch.cat((held[index], real)))
        return hidden_states + output, inputs

    def inputs_at(self, row: RowState, before: RowState, inputs: torch.Tensor, room: int) -> torch.Tensor:
        """What a state at `row` holds of `inputs`, which begin K - 1 tokens before the window of `before`, [room, hidden]."""
        first = row.window_start - before.window_start
        count = self.weight.shape[-1] - 1 + row.seen - row.window_start
        return F.pad(inputs[first : first + count], (0, 0, 0, room - count))


class SinkWindowAttention(nn.Module):
    """Grouped-query attention over sinks and the exact window: the previous segment, and the current one causally."""

    layer_type = "sink_window_attention"

    def __init__(self, config: BwrDncConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        # Asking a config takes microseconds, and a token has many layers.
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_key_value_heads
        self.q_norm = BwrDncRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = BwrDncRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.short_conv = ShortConvolution(config) if config.short_conv_kernel else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        call: Call,
        state: BankState | None = None,
        layer: StateBankLayer | None = None,
        num_kept: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, BankState | None]:
        """
        Args:
            hidden_states [B, T, hidden].
            state: what the rows have read before, None for nothing. Without gradients it is used up.
            layer: cache layer that is told when its state is used up, and of consolidations, so that it can take them back.
            num_kept: of how many of the last tokens the output is wanted; None: all.

        Returns the output [B, T or num_kept, hidden], attention weights [B, H, T, L] and the state after, where the call wants them.
        """
        shape = hidden_states.shape[:2]
        call = call.on(hidden_states.device)
        settings = call.settings[self.layer_idx]
        is_continued = state is not None
        if state is None:
            state = self._empty_state(settings, shape[0], hidden_states)
        else:
            # A compiler with dynamic shapes cannot compare them: change settings between texts then, not within one.
            if not torch.compiler.is_compiling() and state.settings != settings:
                state = state.under(settings)
            state = refreshed(state, call.rotary)
        conv_inputs = {}
        if self.short_conv is not None:
            hidden_states, conv_inputs = self.short_conv(hidden_states, call, state)
        projected = self._project(hidden_states, call)
        dtype = projected[0].dtype
        if is_continued and state.keys.dtype != dtype and autocast_dtype(hidden_states.device.type) is None:
            raise ValueError(
                f"The state is in {state.keys.dtype}, but the model computes in {dtype}; continue it in the precision, or under the autocast, "
                "that it was read in, or read the text again."
            )
        shows_columns = call.key_columns is not None and all(
            stays_lossless(state.rows[row], count, settings)
            for sequences in call.sequences
            for row, count in zip(sequences.rows, sequences.counts, strict=True)
        )
        compressor, uses_routing = self._learned_parts(call)
        needs_gradient = False
        if torch.is_grad_enabled():
            learned = () if compressor is None else compressor.parameters()
            held = state.tensors().values() if is_continued else ()
            needs_gradient = any(tensor.requires_grad for tensor in (*projected, *learned, *held))
            if is_continued and not needs_gradient:
                # Reading in place would change what a checkpoint reads once more.
                state = state.map(torch.Tensor.clone)
        if layer is not None and not torch.is_grad_enabled():
            # From here on the state that it holds is used up.
            layer.is_unfinished = True
        output = weights = None
        rows: list[int] = []
        parts: list[BankState] = []
        for sequences in call.sequences:
            queries, keys, values, salience, complexity = (sequences.take(part).transpose(1, 2) for part in projected)
            tokens = Tokens(queries, keys, values, salience, complexity, sequences.take(call.token_ids))
            part = state
            if sequences.is_fresh:
                part = self._empty_state(settings, len(sequences.rows), hidden_states)
            elif sequences.rows != list(range(shape[0])):
                part = state.select(sequences.rows)
            note = self._journal(layer, sequences, shape[0], conv_inputs)
            reader = (PlannedReader if needs_gradient else BankReader)(
                call,
                settings,
                self.layer_idx,
                sequences,
                self.scaling,
                compressor,
                uses_routing,
                note,
                shows_columns,
                num_kept == 0,
            )
            part_output, part_weights, part = reader.read(tokens, part)
            if part_output is not None:
                output = sequences.put(output, part_output.transpose(1, 2).flatten(2), shape)
            weights = part_weights if weights is None else _sum_of_parts(weights, part_weights)
            if call.keeps_state:
                kept = [i for i, keeps in enumerate(sequences.keeps_state) if keeps]
                rows += [sequences.rows[i] for i in kept]
                parts.append(part if len(kept) == len(part.rows) else part.select(kept))
        after = None
        if call.keeps_state:
            after = BankState.stack(parts) if len(parts) > 1 else parts[0] if parts else state
            after = state.replaced(rows, after) if rows else state
            after = self._with_conv_inputs(after, conv_inputs, list(range(shape[0])))
        if output is None:
            output = projected[0].new_zeros(projected[0].shape).flatten(2)
            if self.training and needs_gradient:
                output = _with_unused(output, (projected[0], *self.parameters()))
        return apply_linear(self.o_proj, last_positions(output, num_kept)), weights, after

    def _with_conv_inputs(self, state: BankState, conv_inputs: dict, rows: list[int]) -> BankState:
        """A state whose rows are `rows` of the batch, with the inputs of the short convolution that belong to it."""
        if not conv_inputs:
            return state
        held = list(state.conv_inputs)
        for index, row in enumerate(rows):
            if row in conv_inputs:
                before, inputs = conv_inputs[row]
                held[index] = self.short_conv.inputs_at(state.rows[index], before, inputs, state.conv_inputs.shape[1])
        return replace(state, conv_inputs=torch.stack(held))

    def _journal(self, layer: StateBankLayer | None, sequences: Sequences, batch_size: int, conv_inputs: dict):
        """What tells a recording cache layer of consolidations in these sequences."""

        def note(before: BankState, indices: list[int]) -> None:
            # Of packed documents the last one of a row is gone back over.
            indices = [i for i in indices if sequences.keeps_state[i]]
            if layer is not None and layer.record_past and indices:
                rows = [sequences.rows[i] for i in indices]
                before = before if len(indices) == len(before.rows) else before.select(indices)
                layer.note_consolidation(self._with_conv_inputs(before, conv_inputs, rows), rows, batch_size)

        return note

    def _learned_parts(self, call: Call):
        """Compressor and whether queries route between levels."""
        return None, False

    def _empty_state(self, settings: BankSettings, batch_size: int, like: torch.Tensor) -> BankState:
        config = self.config
        shapes = StateShapes(
            config.num_attention_heads,
            config.num_key_value_heads,
            self.head_dim,
            config.hidden_size,
            config.short_conv_kernel,
        )
        dtype = autocast_dtype(like.device.type) or like.dtype
        return BankState.empty(settings, batch_size, shapes, dtype, like.device)

    def _project(self, hidden_states: torch.Tensor, call: Call) -> tuple[torch.Tensor, ...]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], salience [B, T, G] and complexity [B, T, H] logits."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = apply_linear(self.q_proj, hidden_states).view(heads)
        keys = apply_linear(self.k_proj, hidden_states).view(heads)
        values = apply_linear(self.v_proj, hidden_states).view(heads)
        if self.q_norm is not None:
            # Under autocast norms are in float32, and what is stored is not.
            queries, keys = self.q_norm(queries).to(values.dtype), self.k_norm(keys).to(values.dtype)
        return queries, keys, values, *self._memory_logits(hidden_states, call)

    def _memory_logits(self, hidden_states: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        return call.neutral_logits(hidden_states, self.num_groups, self.num_heads)


class StateBankAttention(SinkWindowAttention):
    """Attention over sinks, window, and a bank of memory slots that learned salience and use keep."""

    layer_type = "state_bank_attention"

    def __init__(self, config: BwrDncConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory = Memory(config)

    def forward(self, hidden_states, call, state=None, layer=None, num_kept=None):
        output, weights, after = super().forward(hidden_states, call, state, layer, num_kept)
        if self.training and torch.is_grad_enabled():
            output = _with_unused(output, self.memory.parameters())
        return output, weights, after

    def _learned_parts(self, call):
        return self.memory.compressor, call.use_routing

    def _memory_logits(self, hidden_states, call):
        memory, neutral = self.memory, (None, None)
        if not (call.use_salience and call.use_routing):
            neutral = super()._memory_logits(hidden_states, call)
        salience = memory.salience_logits(hidden_states) if call.use_salience else neutral[0]
        complexity = memory.routing(hidden_states) + COMPLEXITY_SHIFT if call.use_routing else neutral[1]
        return salience, complexity


ATTENTION_CLASSES = {kind.layer_type: kind for kind in (SinkWindowAttention, StateBankAttention)}


def _with_unused(output: torch.Tensor, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """`output`, with all of `tensors` in its graph, also where no slot or no token uses them: DDP and its like count on it."""
    return output + 0.0 * sum(tensor.sum() for tensor in tensors if tensor.requires_grad)


def _sum_of_parts(weights: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Attention weights [B, H, T, L] of different tokens of a batch in one tensor, as wide as the wider."""
    widest = max(weights.shape[-1], others.shape[-1])
    return F.pad(weights, (0, widest - weights.shape[-1])) + F.pad(others, (0, widest - others.shape[-1]))


class BwrDncDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: BwrDncConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[config.layer_types[layer_idx]](config, layer_idx)
        self.mlp = BwrDncMLP(config)
        self.input_layernorm = BwrDncRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BwrDncRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        call: Call,
        state: BankState | None = None,
        layer: StateBankLayer | None = None,
        num_kept: int | None = None,
    ) -> tuple[torch.Tensor, BankState | None]:
        attended, _, state = self.self_attn(self.input_layernorm(hidden_states), call, state, layer, num_kept)
        hidden_states = last_positions(hidden_states, num_kept)
        # Asked of the dropout itself: it may be switched on alone (Monte Carlo dropout); off, a call of it is not free.
        has_dropout = self.dropout.training
        hidden_states = hidden_states + (self.dropout(attended) if has_dropout else attended)
        mixed = self.mlp(self.post_attention_layernorm(hidden_states), self.gradient_checkpointing and self.training)
        return hidden_states + (self.dropout(mixed) if has_dropout else mixed), state


class BwrDncRotaryEmbedding(LlamaRotaryEmbedding):
    """The library's rotary embedding; its inverse frequencies serve the positions that `bank_reader` gives to entries."""

    def _apply(self, fn, recurse=True):
        """Casts of a model leave the frequencies as they are: types below float32 are too coarse for angles."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, frequencies in before.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, frequencies.to(after.device))
        return self

    def table(self, hidden_states: torch.Tensor) -> RotaryTable:
        """For one forward pass."""
        return RotaryTable(self.inv_freq.to(hidden_states.device), self.attention_scaling, hidden_states.dtype)


class BwrDncPreTrainedModel(PreTrainedModel):
    config_class = BwrDncConfig
    config: BwrDncConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BwrDncDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "state", "call", "layer"]
    _supports_sdpa = True
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": BwrDncDecoderLayer, "attentions": SinkWindowAttention}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def add_secondary_salience(self) -> None:
        """Give every bank the second salience head (`use_secondary_salience`) unless it has one."""
        self.config.use_secondary_salience = True
        for module in self.modules():
            if isinstance(module, Memory) and module.secondary_salience is None:
                module.add_secondary_salience()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **options) -> None:
        # torch's own default, the reentrant variant, runs a layer without gradients first, and would write its memory twice.
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Gradient checkpointing was asked for with use_reentrant=True, but must be the other variant, since this one would write "
                "the memory twice; leave it out, or use False."
            )
        function = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (PreciseLinear, ShortConvolution)):
            init.zeros_(module.weight)
        elif isinstance(module, Compressor):
            init.zeros_(module.latent_query)


class BwrDncModel(BwrDncPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: BwrDncConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        rule = f"be below vocab_size ({self.vocab_size}), or None"
        require((self.padding_idx or 0) < self.vocab_size, "pad_token_id", self.padding_idx, rule)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(BwrDncDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = BwrDncRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = BwrDncRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        use_memory: bool | None = None,
        retention_noise_seed: int | torch.Tensor | None = None,
        output_attentions: bool | None = None,
        hidden_states_to_keep: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids [B, T], or inputs_embeds [B, T, hidden].
            attention_mask [B, T] of these tokens, or [B, past + T]: 0 marks padding, wherever it stands.
            position_ids [B, T]: only mark where packed documents start, by being 0 on a real token.
            past_key_values: a `StateBankCache`, or any cache made of its layers. It is updated and returned; with gradients its
                new tensors carry them, and the old ones are left as they were.
            use_cache: whether to keep state; by default `config.use_cache`, and not under gradient checkpointing.
            use_memory: `False` reads sinks and window only, and empties the slots of `past_key_values`; defaults to `config.use_memory`.
            retention_noise_seed: in training, seeds Gumbel noise on which entries stay; pass the step number (as a tensor [] on the
                device, where a CUDA graph is recorded).
            hidden_states_to_keep: the last layer computes, and `last_hidden_state` holds, only the last so many tokens, 0 for none
                (None: all). The memory is the same.
        """
        rule = "be at least 0, or None for all"
        require((hidden_states_to_keep or 0) >= 0, "hidden_states_to_keep", hidden_states_to_keep, rule)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`forward` takes either `input_ids` or `inputs_embeds`, and exactly one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.dim() != 3 or 0 in inputs_embeds.shape:
            raise ValueError(
                f"The tokens have the shape {list(inputs_embeds.shape[:-1])}, but must be [B, T] with at least one row and one token; an "
                "empty text has none: begin with `bos_token_id`, for example."
            )
        is_checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not is_checkpointing
        cache = None
        if past_key_values is not None:
            cache = StateBankCache.wrap(past_key_values)
        elif use_cache:
            cache = StateBankCache(config=self.config)
        settings = bank_settings(self.config, self.config.use_memory if use_memory is None else use_memory)
        if cache is not None and cache.states:
            check_matches_config(cache, self.config)
            check_pinned_fit(cache, settings)
            if cache.layers[0].batch_size != inputs_embeds.shape[0]:
                raise ValueError(
                    f"`past_key_values` has {cache.layers[0].batch_size} rows, but the input has {inputs_embeds.shape[0]}; "
                    "they must be equal: use `cache.batch_repeat_interleave`, `StateBankCache.stack` or `unstack`."
                )
        if cache is not None:
            cache.written_by(self)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        layout = lay_out(
            inputs_embeds.shape[:2],
            attention_mask,
            position_ids,
            cache,
            self.config.segment_length,
            inputs_embeds.device,
            bool(output_attentions),
        )
        if input_ids is None:
            input_ids = torch.full(inputs_embeds.shape[:2], -1, dtype=torch.int64, device=inputs_embeds.device)
        call = Call(
            rotary=self.rotary_emb.table(inputs_embeds),
            sequences=layout.sequences,
            token_ids=input_ids,
            settings=settings,
            use_salience=self.config.use_salience,
            use_routing=self.config.use_routing,
            keeps_state=bool(use_cache),
            active=layout.active,
            eager=self.config._attn_implementation == "eager",
            output_attentions=bool(output_attentions),
            noise_seed=retention_noise_seed,
            key_columns=layout.key_columns,
            num_columns=layout.num_columns,
        )
        hidden_states = inputs_embeds
        # Fewer than there are while `generate` drafts with the first layers (`assistant_early_exit`).
        decoder_layers = list(self.layers)[: self.config.num_hidden_layers]
        # A compiler cannot ask.
        writes_any = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
        for index, decoder_layer in enumerate(decoder_layers):
            cache_layer = None if cache is None else cache.layers[index]
            state = None if cache_layer is None else cache_layer.state
            is_kept = is_checkpointing or not call.keeps_state
            if state is not None and (is_kept or (not writes_any and state.is_inference)):
                # The layer may run twice, must leave no trace, or cannot write what inference mode has left.
                state = state.map(torch.Tensor.clone)
            num_kept = hidden_states_to_keep if decoder_layer is decoder_layers[-1] else None
            recording = cache_layer if call.keeps_state else None
            hidden_states, state = decoder_layer(
                hidden_states, call=call, state=state, layer=recording, num_kept=num_kept
            )
            if call.keeps_state and cache_layer is not None:
                cache_layer.state, cache_layer.is_unfinished = state, True
        if cache is not None and call.keeps_state:
            _extend_histories(cache, input_ids, layout)
            for cache_layer in cache.layers:
                cache_layer.is_unfinished = False
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=cache if use_cache else None
        )


def bank_settings(config: BwrDncConfig, use_memory: bool) -> list[BankSettings]:
    """Run-time settings of each layer. They may have been changed since the config was made; `ValueError` for those that cannot be."""
    boosts, slots = config.attention_boost, tuple(config.memory_slots)
    window = BankSettings(
        segment_length=config.segment_length,
        num_sink_tokens=config.num_sink_tokens,
        memory_slots=(0, 0, 0),
        memory_position=config.memory_position,
        routing_thresholds=tuple(config.routing_thresholds),
        use_hard_routing=config.use_hard_routing,
        usage_weight=float(config.usage_weight),
        salience_pooling=config.salience_pooling,
        salience_boost=float(config.salience_boost),
        attention_boost=float(boosts) if isinstance(boosts, (int, float)) else 0.0,
        salience_scale=float(config.salience_scale),
        recency_weight=float(config.recency_weight),
        retention_score=config.retention_score,
    )
    require_budget(window.segment_length, window.num_sink_tokens, slots)
    bank = replace(window, memory_slots=slots) if use_memory else window
    by_type = {"sink_window_attention": window, "state_bank_attention": bank}
    settings = [by_type[layer_type] for layer_type in config.layer_types]
    if use_memory and config.slot_shares is not None:
        settings = [replace(one, memory_slots=config.layer_slots(index)) for index, one in enumerate(settings)]
    if not isinstance(boosts, (int, float)):
        settings = [replace(one, attention_boost=boost) for one, boost in zip(settings, boosts, strict=True)]
    return settings


def _extend_histories(cache: StateBankCache, token_ids: torch.Tensor, layout: Layout) -> None:
    """Extend the hash of the token ids that each row has read, once for all layers."""
    history = cache.history
    if layout.restarted:
        history = history.clone()
        history[layout.restarted] = 0
    history = extend_history(history, token_ids, layout.counted)
    num_tokens = token_ids.shape[1]
    pads: list[tuple[int, ...]] = [()] * token_ids.shape[0]
    if layout.real is not None:
        pads = [tuple(index for index, is_real in enumerate(row) if not is_real) for row in layout.real.tolist()]
    for state in cache.states:
        state.history = history.to(state.history.device)
        for row, row_pads in zip(state.rows, pads, strict=True):
            row.feed(num_tokens, row_pads, state.settings.segment_length)


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


class FinishedRows(StoppingCriteriaList):
    """The stopping criteria of a `generate` call, which also remember at which column each row has finished."""

    def __init__(self):
        super().__init__()
        self.columns: torch.Tensor | None = None  # [B] of the last token of finished rows, beyond reach for others

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if self.columns is None:
            self.columns = torch.full_like(input_ids[:, 0], torch.iinfo(torch.int64).max)
        now = torch.full_like(self.columns, input_ids.shape[1] - 1)
        self.columns = torch.where(done.to(self.columns.device), torch.minimum(self.columns, now), self.columns)
        return done

    def mask(self, attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
        """`attention_mask` [B, W] without what a row was fed after it has finished, its last token included."""
        if self.columns is None or input_ids.shape[0] == 1:
            return attention_mask
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        alive = (columns < self.columns.to(input_ids.device)[:, None]).long()
        if attention_mask is None:
            return alive
        # Before the ids may stand embeddings, or what a memory has read.
        return attention_mask.long() * F.pad(alive, (attention_mask.shape[1] - alive.shape[1], 0), value=1)


class BwrDncForCausalLM(BwrDncPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head. `generate` continues a `StateBankCache` with new tokens or full histories."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BwrDncConfig):
        super().__init__(config)
        self.model = BwrDncModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_memory: bool | None = None,
        read_block_length: int | None = None,
        skip_logits: bool = False,
        new_tokens_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        The arguments of `BwrDncModel.forward`, and:

        Args:
            labels [B, T]: token ids to predict, -100 where none is; the loss is their mean cross-entropy.
            logits_to_keep: logits of the last so many tokens (0: all), or of the positions in a tensor.
            read_block_length: without gradients, and with `logits_to_keep` > 0, a longer input is read in blocks of so many
                tokens, in memory that does not grow with its length.
            skip_logits: with `labels`, leave `logits` of the output None: only those of a few hundred tokens exist at a time.
            new_tokens_mask [B, T]: `attention_mask` of these tokens alone, and in its place; from `generate`, since wrappers such
                as PEFT's prompt tuning take any `attention_mask` for that of the whole history, and put their own part before.
        """
        if skip_logits and labels is None:
            raise ValueError("`skip_logits` leaves only the loss, which needs `labels`; pass them, or leave it False.")
        is_count = isinstance(logits_to_keep, int)
        require(not is_count or logits_to_keep >= 0, "logits_to_keep", logits_to_keep, "be at least 0 (0: all)")
        require((read_block_length or 1) > 0, "read_block_length", read_block_length, "be at least 1, or None")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        tokens = inputs_embeds if input_ids is None else input_ids
        # Without any, the decoder says what is missing.
        num_tokens = 0 if tokens is None or tokens.dim() < 2 else tokens.shape[1]
        if new_tokens_mask is not None:
            if new_tokens_mask.shape[1] != num_tokens:
                raise ValueError(
                    f"`generate` prepared {new_tokens_mask.shape[1]} new tokens, but the model got {num_tokens}: PEFT's prompt tuning passes "
                    "on only the last one when a memory is continued. Read the others before, with "
                    "`model.get_base_model()(ids[:, :-1], past_key_values=cache)`, and generate from `ids[:, -1:]`."
                )
            inputs["attention_mask"] = new_tokens_mask
        if num_tokens and (labels is not None or not is_count):
            self._check_wanted(tokens, labels, logits_to_keep, kwargs)
        block_length = read_block_length or READ_BLOCK_LENGTH
        only_last = is_count and logits_to_keep > 0
        shows_all = any(
            kwargs.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        )
        options = {"past_key_values": past_key_values, "use_cache": use_cache, "use_memory": use_memory, **kwargs}
        only_last = only_last and labels is None and not shows_all
        if only_last and num_tokens > block_length and not torch.is_grad_enabled():
            outputs = self._read_in_blocks(inputs, num_tokens, block_length, logits_to_keep, options)
        else:
            num_kept = logits_to_keep if only_last else None
            outputs = self.model(**inputs, **options, hidden_states_to_keep=num_kept)
        hidden_states = _kept_positions(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if labels is not None and self._has_plain_loss(hidden_states, labels, kwargs):
            loss, logits = self._loss_and_logits(hidden_states, labels, skip_logits, kwargs.get("num_items_in_batch"))
        else:
            logits = apply_linear(self.lm_head, hidden_states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_wanted(self, tokens, labels, logits_to_keep: int | torch.Tensor, options: dict) -> None:
        """
        Raise `ValueError` for labels, or positions whose logits are wanted, that do not fit ids [B, T] or embeddings [B, T, hidden], before
        these are read. What labels hold is not looked at: a host would wait for its GPU.
        """
        if torch.compiler.is_compiling():
            return
        try:
            kept = _kept_positions(tokens[:, :, None] if tokens.dim() == 2 else tokens, logits_to_keep)
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"`logits_to_keep` is {logits_to_keep}, but must be a number of tokens, or positions among {list(tokens.shape[:2])} ({error})."
            ) from None
        # Other losses may take labels of other shapes.
        is_plain = self.loss_function is ForCausalLMLoss and options.get("shift_labels") is None
        if labels is not None and is_plain and labels.shape != kept.shape[:-1]:
            raise ValueError(
                f"`labels` has the shape {list(labels.shape)}, but must have that of the tokens whose logits are kept, {list(kept.shape[:-1])}."
            )

    def _has_plain_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, options: dict) -> bool:
        """Whether the loss is the library's own, of a head that is only a matrix, and nothing else is asked of it."""
        return (
            self.loss_function is ForCausalLMLoss
            and is_plain_head(self.lm_head)
            and hidden_states.shape[:2] == labels.shape
            and not {"shift_labels", "ignore_index"} & {name for name, value in options.items() if value is not None}
            and not torch.compiler.is_compiling()
        )

    def _loss_and_logits(self, hidden_states, labels, skip_logits: bool, num_items_in_batch):
        """What the library's loss gives, without its further copies of all logits."""
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(hidden_states.device)
        total, logits = summed_cross_entropy(hidden_states, self.lm_head.weight, labels, LOSS_CHUNK, not skip_logits)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count), logits

    def _read_in_blocks(self, inputs: dict, num_tokens: int, block_length: int, num_kept: int, options: dict):
        """Read a long input block by block; the outputs of the last, with the last `num_kept` hidden states."""
        keeps_cache = self.config.use_cache if options["use_cache"] is None else options["use_cache"]
        cache = options["past_key_values"]
        if cache is None:
            cache = StateBankCache(config=self.config)
        elif not keeps_cache:
            cache = StateBankCache.wrap(cache).clone()
        if inputs["position_ids"] is not None:
            tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
            check_positions(inputs["position_ids"], tokens.shape[:2])
            # They may reach back over the history, as a mask may.
            inputs = inputs | {"position_ids": inputs["position_ids"][:, -num_tokens:]}
        mask = inputs["attention_mask"]
        num_before = 0 if mask is None or mask.dim() != 2 else mask.shape[1] - num_tokens
        kept: list[torch.Tensor] = []
        for start in range(0, num_tokens, block_length):
            stop = min(start + block_length, num_tokens)
            block = {name: None if value is None else value[:, start:stop] for name, value in inputs.items()}
            if mask is not None:
                block["attention_mask"] = mask[:, (num_before + start if start else 0) : num_before + stop]
            wanted = {"hidden_states_to_keep": max(stop - max(start, num_tokens - num_kept), 0)}
            outputs = self.model(**block, **options | {"past_key_values": cache, "use_cache": True} | wanted)
            cache = outputs.past_key_values
            kept.append(outputs.last_hidden_state)
        outputs.last_hidden_state = torch.cat(kept, dim=1)
        outputs.past_key_values = cache if keeps_cache else None
        return outputs

    # ----------------------------------------------------------------------------------------------------- generation

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` is {generation_config.cache_implementation!r}, but the memory of a BWR-DNC model is its own "
                "cache, of constant size; leave it unset."
            )
        exit_layer, num_layers = generation_config.assistant_early_exit, self.config.num_hidden_layers
        if exit_layer is not None and not 1 <= exit_layer <= num_layers:
            raise ValueError(
                f"`assistant_early_exit` is {exit_layer}, but must be the number of layers that draft, from 1 to {num_layers}."
            )
        memory = model_kwargs.get("past_key_values")
        if generation_config.use_cache is False and isinstance(memory, Cache) and memory.get_seq_length() > 0:
            # Each step would be given all ids again, of which the memory has read some. A copy reads on, and the memory is left as it is.
            model_kwargs["past_key_values"] = StateBankCache.wrap(memory).clone()
            generation_config.use_cache = True
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            # Rows that have finished are fed padding until all have; it must not enter their memory.
            generation_config._finished_rows = model_kwargs["finished_rows"] = FinishedRows()

    def _get_candidate_generator(self, *args, **kwargs):
        generator = super()._get_candidate_generator(*args, **kwargs)
        update = generator.update_candidate_strategy

        def limit_draft() -> None:
            """Of a longer draft the memory could not take back what is rejected."""
            for name in ("num_assistant_tokens", "num_output_tokens"):
                if hasattr(generator, name):
                    setattr(generator, name, min(getattr(generator, name), self.config.segment_length))

        def update_candidate_strategy(*args, **kwargs) -> None:
            update(*args, **kwargs)
            limit_draft()

        limit_draft()
        generator.update_candidate_strategy = update_candidate_strategy
        return generator

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        if generation_config.is_assistant and generation_config.max_new_tokens is not None:
            # This model drafts for another, which may reject all of it: see `_get_candidate_generator`.
            for name in ("max_new_tokens", "min_new_tokens"):
                setattr(
                    generation_config, name, min(getattr(generation_config, name) or 0, self.config.segment_length)
                )
        return super()._prepare_generated_length(generation_config, *args, **kwargs)

    # The library looks at the names of its parameters.
    @functools.wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, *args, **kwargs):
        num_layers = self.config.num_hidden_layers
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            # An early exit lowers it for every draft, and what interrupts a draft would leave it so.
            self.config.num_hidden_layers = num_layers

    def _get_stopping_criteria(self, generation_config, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        finished_rows = getattr(generation_config, "_finished_rows", None)
        if finished_rows is None:
            return criteria
        finished_rows.extend(criteria)
        return finished_rows

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        options = dict(model_kwargs)
        # The model reads long prompts in blocks by itself, which knows better where a history ends.
        if generation_config.prefill_chunk_size is not None:
            options["read_block_length"] = generation_config.prefill_chunk_size
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        # The library has dropped a mask of ones, but one wider than the ids says that all of these are new.
        mask_length = getattr(generation_config, "_mask_length", 0)
        if options.get("attention_mask") is None and mask_length > input_ids.shape[1]:
            options["attention_mask"] = input_ids.new_ones(len(input_ids), mask_length)
        return super()._prefill(input_ids, generation_config, options, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        finished_rows: FinishedRows | None = None,
        **kwargs,
    ) -> dict:
        """The library's, with masks of the new tokens only, and without positions: the model counts by itself."""
        kwargs.pop("position_ids", None)
        if finished_rows is not None:
            attention_mask = finished_rows.mask(attention_mask, input_ids)
        is_continued = past_key_values is not None and past_key_values.get_seq_length() > 0
        if is_first_iteration and is_continued:
            memory, next_sequence_length = StateBankCache.wrap(past_key_values), None
            if inputs_embeds is None:
                input_ids, attention_mask = _new_tokens(memory, input_ids, attention_mask)
            else:
                inputs_embeds, new = _new_tokens(memory, inputs_embeds, attention_mask)
                before = new[:, :0] if attention_mask is None else attention_mask[:, : -new.shape[1]]
                attention_mask = torch.cat((before, new), dim=1)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        inputs.pop("position_ids", None)
        if is_continued and "attention_mask" in inputs:
            fed = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            mask, count = inputs["attention_mask"], fed.shape[1]
            # Attention is shown over the columns of the whole history, whose mask there is for a cache that `generate` has made (what a
            # wrapper puts before is added to it), but for embeddings.
            is_own = inputs_embeds is None and not getattr(past_key_values, "_is_user_defined", False)
            shows_all = inputs.get("output_attentions") and (is_own or _covers(mask[:, :-count], past_key_values))
            if not shows_all:
                inputs["new_tokens_mask"] = inputs.pop("attention_mask")[:, -count:]
        return inputs

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "Continuous batching keeps its own paged cache, which has no place for the memory of a BWR-DNC model; batch with "
            "`generate` on padded rows, or with `StateBankCache.stack`."
        )

    generate_batch = init_continuous_batching


def last_positions(hidden_states: torch.Tensor, count: int | None) -> torch.Tensor:
    """The last `count` tokens, at most all, of [B, T, ...]; None: all."""
    return hidden_states if count is None else hidden_states[:, max(hidden_states.shape[1] - count, 0) :]


def _kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Hidden states of the last so many tokens (0: all), or at given positions ([P], or [B, P]; bool masks flatten)."""
    if isinstance(logits_to_keep, int):
        return last_positions(hidden_states, logits_to_keep or None)
    if logits_to_keep.dim() == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        # `take_along_dim` would wrap a position that there is not.
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        return hidden_states[rows[:, None], logits_to_keep]
    return hidden_states[:, logits_to_keep]


def _covers(mask: torch.Tensor, cache: Cache) -> bool:
    """Whether a mask [B, W] is that of all that the rows of a cache have read."""
    return (mask != 0).sum(1).tolist() == [row.seen for row in StateBankCache.wrap(cache).rows]


def _new_tokens(
    cache: StateBankCache, tokens: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The part of `tokens`, ids [B, T] or embeddings [B, T, hidden], that each row has not read, and its mask.

    Ids that begin with what a row has read (by its hash) are its full history; anything else is new. Embeddings, which have no ids
    to compare, are always the full history.
    """
    (batch_size, num_tokens), is_embedded = tokens.shape[:2], tokens.dim() == 3
    num_rows = len(cache.rows)
    if batch_size % num_rows:
        raise ValueError(
            f"`past_key_values` has {num_rows} rows, but the input has {batch_size}; give every row of the memory as many "
            "(`cache.batch_repeat_interleave`, `StateBankCache.stack`, `unstack`)."
        )
    repeats = batch_size // num_rows
    real = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=tokens.device)
    if attention_mask is not None:
        real = attention_mask[:, -num_tokens:] != 0
    if is_embedded or attention_mask is None or attention_mask.shape[1] == num_tokens:
        # Without a mask, embeddings stand in the columns that were read, padding included.
        counter = "columns" if is_embedded and bool(real.all()) else "seen"
        seen = torch.tensor([getattr(row, counter) for row in cache.rows], device=tokens.device)
        seen, read = seen.repeat_interleave(repeats)[:, None], cache.history.repeat_interleave(repeats)
        history = real & (real.cumsum(1) <= seen)
        if not is_embedded:
            digest = extend_history(torch.zeros_like(read), tokens.to(read.device), history)
            history = history & (digest == read)[:, None] & (real.sum(1, keepdim=True) >= seen)
        real = real & ~history
    if not bool(real.any(1).all()):
        name, remedy = "input_ids", "pass at least one new token per row."
        if is_embedded:
            name, remedy = (
                "inputs_embeds",
                "embeddings have no ids to compare, and are taken for the full history. Pass all of it, ",
            )
            remedy += "or read the new ones before, with `model(inputs_embeds=..., past_key_values=cache)`, and generate from the ids that follow."
        raise ValueError(f"A row of `{name}` has no token that the cache has not read already; {remedy}")
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    first = int(real.any(0).int().argmax())
    return tokens[:, first:], real[:, first:].long()


class BwrDncForSequenceClassification(GenericForSequenceClassification, BwrDncPreTrainedModel):
    """The decoder with a classifier on the last real token of each row."""

    def __init__(self, config: BwrDncConfig):
        # The library's own looks the decoder up by the class of the config, of which a saved folder may bring another copy.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = BwrDncModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class BwrDncForTokenClassification(GenericForTokenClassification, BwrDncPreTrainedModel):
    """The decoder with a classifier on every token."""

    def __init__(self, config: BwrDncConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = BwrDncModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "BwrDncForCausalLM",
    "BwrDncForSequenceClassification",
    "BwrDncForTokenClassification",
    "BwrDncModel",
    "BwrDncPreTrainedModel",
]
