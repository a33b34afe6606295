"""
Small random models whose memory really acts, the model written out over the naive reference, ways to compare banks.

Everything runs in float64, where only a defect, and no rounding, can swap two retentions.
"""

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies
from torch import Tensor
from torch.nn import functional as F

from modeling_bwr_dnc import BwrDncConfig, BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.modeling_bwr_dnc import bank_settings
from modeling_bwr_dnc.reference import Entry, naive_state_bank_attention

VOCABULARY = 61
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
# Each seed is a random configuration; a failing example is a number to call the test with again.
SEEDS = strategies.integers(0, 2**32 - 1)


def tiny_config(**settings) -> BwrDncConfig:
    """A config with two layers, four query and two key/value heads, segment 4 and a bank of 5 + 4 + 3 slots."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "segment_length": 4,
        "num_sink_tokens": 2,
        "memory_slots": [5, 4, 3],
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return BwrDncConfig(**{**defaults, **settings})


def tiny_model(config: BwrDncConfig, seed: int = 0) -> BwrDncForCausalLM:
    """A float64 model in evaluation mode, every parameter random, so that salience, routing and compressor all act."""
    generator = torch.Generator().manual_seed(seed)
    model = BwrDncForCausalLM(config).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif ".salience." in name or ".routing." in name:
                # Logits with a standard deviation of about 2: some tokens noise, some precious.
                parameter.copy_(2 * noise / parameter.shape[-1] ** 0.5)
            elif "latent_query" in name:
                parameter.copy_(2 * noise)
            elif name.endswith("bias") or "residual" in name or "short_conv" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model


def random_config(seed: int, max_segment: int = 12, max_slots: int = 20, **fixed) -> BwrDncConfig:
    """A config drawn by `seed`: heads grouped or not, mixed layers, slot lists and positions of every kind."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    num_layers = draw.randint(1, 3)
    layer_types = [draw.choice(["state_bank_attention"] * 2 + ["sink_window_attention"]) for _ in range(num_layers)]
    layer_types[draw.randrange(num_layers)] = "state_bank_attention"
    slots = [draw.randint(1, max_slots) for _ in range(3)]
    used = draw.choice([(1, 1, 1)] * 5 + [(1, 0, 0)] * 2 + [(1, 1, 0), (1, 0, 1), (0, 0, 0)])
    choices = {
        "hidden_size": draw.choice([16, 32, 48]),
        "head_dim": draw.choice([4, 8]),
        "num_hidden_layers": num_layers,
        "num_attention_heads": groups * draw.choice([ratio for ratio in (1, 2, 4, 8) if groups * ratio <= 8]),
        "num_key_value_heads": groups,
        "layer_types": layer_types,
        "segment_length": draw.randint(4, max_segment),
        "num_sink_tokens": draw.randint(0, 5),
        "memory_slots": [count * use for count, use in zip(slots, used, strict=True)],
        "slot_shares": draw.choice([None, None, [draw.choice([0.6, 1, 1.7]) for _ in range(num_layers)]]),
        "memory_position": draw.choice(["rank", "rank", "constant"]),
        "short_conv_kernel": draw.choice([0, 0, 3]),
        "use_qk_norm": draw.random() < 0.3,
        "attention_bias": draw.random() < 0.3,
        "attention_output_bias": draw.random() < 0.3,
        "tie_word_embeddings": draw.random() < 0.5,
        "use_hard_routing": draw.random() < 0.2,
        "usage_weight": draw.choice([1.0, 5.0]),
        "salience_pooling": draw.choice([1, 1, 3, 9, 31]),
        "salience_boost": draw.choice([0.0, 0.0, 3.0]),
        "attention_boost": draw.choice([0.0, 2.0, [draw.uniform(0, 3) for _ in range(num_layers)]]),
        "salience_scale": draw.choice([0.5, 1.0, 3.0]),
        "recency_weight": draw.choice([0.0, 0.0, 20.0]),
        "use_secondary_salience": draw.random() < 0.3,
    }
    return tiny_config(**{**choices, **fixed})


def random_model(seed: int, **bounds) -> BwrDncForCausalLM:
    """`tiny_model` of the `random_config` of this seed and these bounds."""
    return tiny_model(random_config(seed, **bounds), seed)


def token_ids(count: int, seed: int = 0) -> Tensor:
    """Random ids [1, count], none of them 0, which tests use for padding."""
    return torch.randint(1, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def overflowing_length(config: BwrDncConfig, rest: int = 1) -> int:
    """Enough tokens to fill every level, have some forgotten, and stop `rest` tokens after a boundary."""
    raw, pairs, fours = max(map(config.layer_slots, range(config.num_hidden_layers)))
    needed = config.num_sink_tokens + raw + 2 * pairs + 4 * fours
    return (min(needed, 200) // config.segment_length + 4) * config.segment_length + rest


def read(model, ids: Tensor, chunks=None, cache=None, **inputs) -> tuple[Tensor, StateBankCache]:
    """Logits [B, T, V] and the cache after reading `ids` [B, T], in chunks of the given lengths if any."""
    with torch.no_grad():
        if chunks is None:
            output = model(ids, past_key_values=cache, use_cache=True, **inputs)
            return output.logits, output.past_key_values
        assert sum(chunks) == ids.shape[1]
        logits, start = [], 0
        for length in chunks:
            output = model(ids[:, start : start + length], past_key_values=cache, use_cache=True, **inputs)
            logits.append(output.logits)
            cache, start = output.past_key_values, start + length
    return torch.cat(logits, dim=1), cache


def random_chunks(total: int, longest: int, seed: int) -> list[int]:
    """Lengths in 1..longest that add up to `total`."""
    generator, chunks = torch.Generator().manual_seed(seed), []
    while total > 0:
        length = min(total, int(torch.randint(1, longest + 1, (), generator=generator)))
        chunks.append(length)
        total -= length
    return chunks


# ---------------------------------------------------------------------------------------------------------------------
# The whole model over the naive reference
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ReferenceOutput:
    logits: Tensor  # [N, V]
    banks: list[list[list[Entry]]]  # per layer and key/value head, the slots in order of time


def reference_forward(model: BwrDncForCausalLM, ids: Tensor) -> ReferenceOutput:
    """One unpadded row of ids [N] through the model's weights, attention by the naive reference. Differentiable."""
    config = model.config
    inv_freq = model.model.rotary_emb.inv_freq.to(torch.float64)
    hidden, banks = model.model.embed_tokens.weight[ids], []
    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        inputs = _rms_norm(hidden, layer.input_layernorm.weight, config)
        attended, bank = _reference_attention(layer.self_attn, inputs, ids, inv_freq, kind, config)
        banks.append(bank)
        hidden = hidden + attended
        inputs = _rms_norm(hidden, layer.post_attention_layernorm.weight, config)
        mlp = layer.mlp
        hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs))
    return ReferenceOutput(model.lm_head(_rms_norm(hidden, model.model.norm.weight, config)), banks)


def _rms_norm(states: Tensor, weight: Tensor, config: BwrDncConfig) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weight


def _reference_attention(attention, inputs, ids, inv_freq, kind, config):
    if config.short_conv_kernel:
        taps = attention.short_conv.weight  # [hidden, 1, K]
        padded = F.pad(inputs.T[None], (config.short_conv_kernel - 1, 0))
        inputs = inputs + F.conv1d(padded, taps, groups=taps.shape[0])[0].T

    def heads(projection, norm=None):
        states = projection(inputs).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        return states if norm is None else _rms_norm(states, norm.weight, config)

    query_norm, key_norm = (attention.q_norm, attention.k_norm) if config.use_qk_norm else (None, None)
    queries, keys, values = (
        heads(attention.q_proj, query_norm),
        heads(attention.k_proj, key_norm),
        heads(attention.v_proj),
    )
    if kind == "state_bank_attention" and config.use_memory:
        memory = attention.memory
        delta, complexity = (inputs @ memory.salience.weight.T).T, 4 + (inputs @ memory.routing.weight.T).T
        if config.use_secondary_salience:
            second = (inputs @ memory.secondary_salience.weight.T).T
            delta = torch.where((second > 0) & (delta < 0), (delta + second).clamp(max=0), delta)
        delta = delta if config.use_salience else torch.zeros_like(delta)
        complexity = complexity if config.use_routing else torch.full_like(complexity, 4.0)
        merge, slots = _reference_merge(memory.compressor, config), config.layer_slots(attention.layer_idx)
    else:
        delta, complexity = inputs.new_zeros(keys.shape[:2]), inputs.new_full(queries.shape[:2], 4.0)
        merge, slots = None, [0, 0, 0]
    output, banks = naive_state_bank_attention(
        queries,
        keys,
        values,
        delta,
        complexity,
        ids.tolist(),
        inv_freq,
        merge,
        segment_length=config.segment_length,
        num_sink_tokens=config.num_sink_tokens,
        memory_slots=slots,
        memory_position=config.memory_position,
        routing_thresholds=config.routing_thresholds,
        use_hard_routing=config.use_hard_routing,
        usage_weight=config.usage_weight,
        salience_pooling=config.salience_pooling,
        salience_boost=config.salience_boost,
        attention_boost=bank_settings(config, True)[attention.layer_idx].attention_boost,
        salience_scale=config.salience_scale,
        recency_weight=config.recency_weight,
    )
    return attention.o_proj(output.transpose(0, 1).flatten(1)), banks


def _reference_merge(compressor, config: BwrDncConfig):
    def merge(g, key_a, value_a, mass_a, key_b, value_b, mass_b):
        masses = key_a.new_tensor([mass_a, mass_b])
        keys, values = torch.stack([key_a, key_b]), torch.stack([value_a, value_b])
        if not config.use_learned_compressor:
            weights = masses / masses.sum()
            return weights @ keys, weights @ values
        weights = (keys @ compressor.latent_query[g] / config.head_dim**0.5 + masses.log()).softmax(dim=0)
        return (
            weights @ keys + compressor.key_residual.weight @ torch.cat([key_a, key_b]),
            weights @ values + compressor.value_residual.weight @ torch.cat([value_a, value_b]),
        )

    return merge


# ---------------------------------------------------------------------------------------------------------------------
# Comparing banks
# ---------------------------------------------------------------------------------------------------------------------


def assert_bank_is_reference(cache: StateBankCache, reference: ReferenceOutput, row: int = 0) -> None:
    """The slots a cache lists are exactly those of the reference, in content and in order."""
    expected = [
        (layer, head, entry)
        for layer, heads in enumerate(reference.banks)
        for head, entries in enumerate(heads)
        for entry in entries
    ]
    held = cache.tokens(row=row)
    assert [(slot["layer"], slot["head"], slot["level"], slot["positions"], slot["token_ids"]) for slot in held] == [
        (layer, head, entry.level, entry.positions, entry.token_ids) for layer, head, entry in expected
    ]
    for name, attribute in (("salience", "delta"), ("usage", "usage")):
        torch.testing.assert_close(
            torch.tensor([slot[name] for slot in held], dtype=torch.float64),
            torch.tensor([float(getattr(entry, attribute)) for *_, entry in expected], dtype=torch.float64),
            **TOLERANCE,
        )


def bank_tensors(cache: StateBankCache, row: int) -> dict[str, Tensor]:
    """Every tensor of one row of a cache, by layer and name, with the room that nothing occupies set to zero."""
    (single,) = [one for index, one in enumerate(cache.unstack()) if index == row]
    return {
        f"{index}.{name}": tensor
        for index, layer in enumerate(single.layers)
        for name, tensor in layer.state.cleared().tensors().items()
    }


def assert_same_bank(
    first: StateBankCache, second: StateBankCache, first_row: int = 0, second_row: int = 0, but: str = "nothing"
) -> None:
    """Two rows hold the same: counters, provenance and every tensor `but` those of one name."""
    mine, theirs = bank_tensors(first, first_row), bank_tensors(second, second_row)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if name.endswith(but):
            continue
        assert tensor.shape == theirs[name].shape, name
        torch.testing.assert_close(tensor, theirs[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        assert mine.state.rows[first_row] == theirs.state.rows[second_row]
