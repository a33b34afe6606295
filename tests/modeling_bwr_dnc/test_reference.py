"""The fast path against the naive reference, and the reference against plain full attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_bwr_dnc.reference import naive_state_bank_attention
from tests.modeling_bwr_dnc.builders import (
    SEEDS,
    TOLERANCE,
    assert_bank_is_reference,
    overflowing_length,
    random_model,
    read,
    reference_forward,
    tiny_config,
    tiny_model,
    token_ids,
)

# The reference takes its time.
FEWER = settings(max_examples=settings().max_examples // 3)


def weighted_sum(logits, seed=0):
    """A scalar that depends on every logit differently."""
    generator = torch.Generator().manual_seed(seed)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


@FEWER
@given(SEEDS)
def test_outputs_and_bank_equal_the_reference(seed):
    model = random_model(seed, max_segment=9, max_slots=12)
    config = model.config
    ids = token_ids(overflowing_length(config, rest=1 + seed % config.segment_length), seed)
    with torch.no_grad():
        expected = reference_forward(model, ids[0])
    logits, cache = read(model, ids)
    torch.testing.assert_close(logits[0], expected.logits, **TOLERANCE)
    assert_bank_is_reference(cache, expected)


@FEWER
@given(SEEDS)
def test_gradients_equal_those_of_the_reference(seed):
    model = random_model(seed, max_segment=6, max_slots=6)
    config = model.config
    model.train()
    ids = token_ids(overflowing_length(config, rest=1 + seed % config.segment_length), seed)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(
        weighted_sum(reference_forward(model, ids[0]).logits), parameters.values(), allow_unused=True
    )
    logits = model(ids, use_cache=False).logits[0]
    actual = torch.autograd.grad(weighted_sum(logits), parameters.values(), allow_unused=True)
    for name, mine, theirs in zip(parameters, actual, expected, strict=True):
        zero = torch.zeros_like(parameters[name])
        mine, theirs = (zero if gradient is None else gradient for gradient in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_every_memory_parameter_learns_once_the_bank_overflows():
    model = tiny_model(tiny_config(num_hidden_layers=1)).train()
    weighted_sum(model(token_ids(70), use_cache=False).logits).backward()
    memory = {name: parameter for name, parameter in model.named_parameters() if ".memory." in name}
    assert len(memory) == 5
    for name, parameter in memory.items():
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    "ablation",
    [
        {"use_salience": False},
        {"use_routing": False},
        {"use_learned_compressor": False},
        {"use_memory": False},
        {"usage_weight": 0.0},
        {"use_hard_routing": True},
    ],
    ids=lambda ablation: "-".join(ablation),
)
def test_each_switch_equals_the_reference(ablation):
    config = tiny_config(**ablation)
    model, ids = tiny_model(config, seed=3), token_ids(66, seed=3)
    with torch.no_grad():
        expected = reference_forward(model, ids[0])
    logits, cache = read(model, ids)
    torch.testing.assert_close(logits[0], expected.logits, **TOLERANCE)
    assert_bank_is_reference(cache, expected)


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 12), SEEDS)
def test_reference_is_full_attention_while_nothing_is_lost(segment_length, num_sinks, raw_slots, seed):
    num_tokens = (raw_slots + num_sinks) // segment_length * segment_length + 2 * segment_length
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys, values = random(4, num_tokens, 8), random(2, num_tokens, 8), random(2, num_tokens, 8)
    inv_freq = 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    output, banks = naive_state_bank_attention(
        queries,
        keys,
        values,
        random(2, num_tokens),
        random(4, num_tokens),
        list(range(num_tokens)),
        inv_freq,
        merge=None,
        segment_length=segment_length,
        num_sink_tokens=num_sinks,
        memory_slots=[raw_slots, 0, 0],
    )
    angles = torch.arange(num_tokens)[:, None] * inv_freq

    def rotated(states):
        pairs = torch.view_as_complex(torch.stack(states.chunk(2, dim=-1), dim=-1)) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    expected = F.scaled_dot_product_attention(rotated(queries), rotated(keys), values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    assert all(entry.mass == 1 and entry.level == 0 for bank in banks for entry in bank)


def test_reference_merges_in_pairs_and_loses_the_least_retained():
    """A case small enough to follow by hand: segment 2, no sinks, two raw slots, one slot at each level above."""
    keys = torch.eye(8, dtype=torch.float64)[None]
    delta = torch.tensor([[9.0, 0, 0, 0, 0, 0, 8.0, 0]], dtype=torch.float64)
    _, (bank,) = naive_state_bank_attention(
        torch.zeros(1, 8, 8, dtype=torch.float64),
        keys,
        keys,
        delta,
        torch.full((1, 8), 4.0, dtype=torch.float64),
        list(b"abcdefgh"),
        torch.zeros(4, dtype=torch.float64),
        lambda g, key_a, value_a, mass_a, key_b, value_b, mass_b: (
            (mass_a * key_a + mass_b * key_b) / (mass_a + mass_b),
            (mass_a * value_a + mass_b * value_b) / (mass_a + mass_b),
        ),
        segment_length=2,
        num_sink_tokens=0,
        memory_slots=[2, 1, 1],
        usage_weight=0.0,
    )
    # Tokens 0 to 3 have left the window: 0 is precious and 3 the newest of equals, so 1 and 2 merge.
    assert [(entry.level, entry.positions) for entry in bank] == [(0, [0]), (1, [1, 2]), (0, [3])]
    torch.testing.assert_close(bank[1].value, (keys[0, 1] + keys[0, 2]) / 2)
    assert bank[1].token_ids == list(b"bc")
    assert float(bank[1].bias) == pytest.approx(0.0)
