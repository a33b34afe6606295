"""A converted model computes what its source computes, until its bank is full; what cannot be equalled is refused."""

import copy

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, SmolLM3Config

from modeling_bwr_dnc.conversion import converted_config, prove_equality, transfer_weights
from modeling_bwr_dnc.conversion.llama_family import parse_layer_types, source_window
from tests.tiny_sources import CONFIGS, SIZES, byte_tokenizer, random_source

BUDGET = {"segment_length": 8, "num_sink_tokens": 2, "memory_slots": [24, 8, 4]}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_full_attention_until_the_bank_is_full(name):
    source = random_source(CONFIGS[name])
    model = transfer_weights(source, converted_config(source.config, **BUDGET))
    length = model.config.lossless_length
    assert length == 40
    ids = torch.randint(source.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source.double()(ids).logits
        actual = model.double()(ids).logits
    # Transformers computes norms and angles in float32, also in a float64 model.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_one_token_past_the_lossless_length_differs():
    source = random_source(CONFIGS["llama"])
    model = transfer_weights(source, converted_config(source.config, **BUDGET))
    ids = torch.randint(source.config.vocab_size, (1, model.config.lossless_length + 1))
    with torch.no_grad():
        difference = (source(ids).logits - model(ids).logits).abs().amax(-1)[0]
    assert difference[:-1].max() < 1e-3 < difference[-1]


def test_proof_measures_the_difference_at_the_lossless_length():
    source = random_source(CONFIGS["qwen3"])
    model = transfer_weights(source, converted_config(source.config, **BUDGET))
    proof = prove_equality(source, model)
    assert proof.length == 40 and proof.max_difference < 1e-3 and proof.max_logit > 0.1
    assert "40 tokens" in str(proof)


def test_text_without_tokens_is_no_part_of_the_proof():
    source = random_source(CONFIGS["llama"])
    model = transfer_weights(source, converted_config(source.config, **BUDGET))
    assert prove_equality(source, model, byte_tokenizer(), "").rows == ("random tokens",)
    assert prove_equality(source, model, byte_tokenizer(), "text").rows == ("random tokens", "text")


def test_proof_fails_for_a_model_that_differs():
    source = random_source(CONFIGS["llama"])
    model = transfer_weights(copy.deepcopy(source), converted_config(source.config, **BUDGET))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    # What float32 cannot hold.
    source.double().model.embed_tokens.weight.data += 1e-12
    before = [parameter.data.clone() for parameter in (*source.parameters(), *model.parameters())]
    with pytest.raises(ValueError, match="does not equal its source"):
        prove_equality(source, model)
    after = [parameter.data for parameter in (*source.parameters(), *model.parameters())]
    assert all(torch.equal(old, new) and old.dtype == new.dtype for old, new in zip(before, after, strict=True))


def test_proof_covers_half_precision_weights_and_leaves_them_so():
    source = random_source(CONFIGS["llama"])
    for parameter in source.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model = transfer_weights(source, converted_config(source.config, **BUDGET))
    assert prove_equality(source, model).max_difference < 1e-3
    assert source.dtype == model.dtype == torch.bfloat16


def test_only_memory_parameters_are_beyond_the_source():
    source = random_source(CONFIGS["llama"])
    model = transfer_weights(source, converted_config(source.config, **BUDGET))
    added = set(model.state_dict()) - set(source.state_dict())
    assert added and all(".memory." in name for name in added)


def test_source_tensor_without_a_place_is_named():
    source = random_source(CONFIGS["llama"])
    source.model.layers[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.extra"):
        transfer_weights(source, converted_config(source.config, **BUDGET))


def test_place_without_a_source_tensor_is_named():
    source = random_source(CONFIGS["llama"])
    config = converted_config(source.config, **BUDGET)
    config.attention_bias = True
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        transfer_weights(source, config)


def test_source_tensor_of_another_shape_is_named():
    source = random_source(CONFIGS["llama"])
    config = converted_config(source.config, **BUDGET)
    config.intermediate_size = 40
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight.*\(48, 32\).*\(40, 32\)"):
        transfer_weights(source, config)


def test_window_layers_equal_the_source_within_their_window():
    source = random_source(CONFIGS["llama"])
    model = transfer_weights(source, converted_config(source.config, **BUDGET, layer_types="window,bank"))
    kinds = ["sink_window_attention", "state_bank_attention", "sink_window_attention"]
    assert model.config.layer_types == kinds
    assert prove_equality(source, model).length == 16


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(**SIZES, sliding_window=12), 12),
        (MistralConfig(**SIZES, sliding_window=None), None),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=12, max_window_layers=1), 12),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=12, max_window_layers=3), None),
        (Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=12), None),
        (CONFIGS["llama"], None),
    ],
)
def test_sliding_window_of_a_source_is_known(config, window):
    assert source_window(config) == window


def test_sliding_window_is_refused_unless_allowed_and_then_equal_within_it():
    source = random_source(MistralConfig(**SIZES, sliding_window=12))
    with pytest.raises(ValueError, match="sliding window of 12 tokens"):
        converted_config(source.config, **BUDGET)
    model = transfer_weights(source, converted_config(source.config, **BUDGET, allow_sliding_window=True))
    assert prove_equality(source, model).length == 12


def test_sliding_window_as_long_as_the_lossless_length_is_no_obstacle():
    converted_config(MistralConfig(**SIZES, sliding_window=40), **BUDGET)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "'gpt2' is not convertible"),
        (SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]), "layer 1 .* no rotary positions"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "'dynamic'",
        ),
        (
            LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "partial_rotary_factor",
        ),
    ],
)
def test_architecture_without_an_equal_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        converted_config(config, **BUDGET)


def test_budget_beyond_the_trained_positions_is_refused():
    with pytest.raises(ValueError, match="256"):
        converted_config(CONFIGS["llama"], segment_length=64, memory_slots=[512, 0, 0])


def test_layer_pattern_repeats():
    window, bank = "sink_window_attention", "state_bank_attention"
    assert parse_layer_types("window, window,bank", 5) == [window, window, bank, window, window]


@pytest.mark.parametrize("pattern", ["", "bank,full", "bank,,window"])
def test_unknown_layer_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="bank, window"):
        parse_layer_types(pattern, 3)


def test_a_source_that_asks_for_a_cache_of_its_own_generates_with_the_memory():
    source = random_source(CONFIGS["llama"])
    source.generation_config.cache_implementation = "static"
    model = transfer_weights(source, converted_config(source.config, 8, 2, [24, 8, 4]))
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)
    assert source.generation_config.cache_implementation == "static"
