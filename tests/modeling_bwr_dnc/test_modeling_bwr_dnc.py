"""The model as a Transformers model: what it refuses, what travels with a saved folder, and the ecosystem around it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports, get_relative_import_files
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import modeling_bwr_dnc
from modeling_bwr_dnc import (
    BwrDncConfig,
    BwrDncForCausalLM,
    BwrDncForSequenceClassification,
    BwrDncForTokenClassification,
    StateBankCache,
)
from tests.modeling_bwr_dnc.builders import assert_same_bank, overflowing_length, tiny_config, tiny_model, token_ids
from tests.modeling_bwr_dnc.test_state_bank import read, small_model

SURFACE = Path(modeling_bwr_dnc.__file__).with_name("modeling_bwr_dnc.py")


@pytest.fixture
def model():
    return small_model()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_act": "swish2"}, "hidden_act"),
        ({"memory_slots": [300, 0, 0]}, "max_position_embeddings"),
        ({"memory_slots": [0, 4, 2]}, "memory_slots"),
        ({"memory_slots": [4, 2]}, "memory_slots"),
        ({"memory_slots": [4, -2, 1]}, "memory_slots"),
        ({"slot_shares": [1.0]}, "slot_shares"),
        ({"slot_shares": [1.0, float("nan")]}, "slot_shares"),
        ({"slot_shares": [1.0, 0.01]}, "at least one raw slot"),
        ({"slot_shares": [1.0, 50.0]}, "max_position_embeddings"),
        ({"segment_length": 0}, "segment_length"),
        ({"salience_pooling": 4}, "salience_pooling"),
        ({"salience_boost": -1.0}, "salience_boost"),
        ({"attention_boost": float("inf")}, "attention_boost"),
        ({"attention_boost": [1.0]}, "attention_boost"),
        ({"salience_scale": 0}, "salience_scale"),
        ({"recency_weight": -0.1}, "recency_weight"),
        ({"memory_position": "nowhere"}, "memory_position"),
        ({"retention_score": "luck"}, "retention_score"),
        ({"routing_thresholds": [0.5, 1.0]}, "routing_thresholds"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "foo"}}, "'foo'"),
        ({"rope_parameters": {"state_bank_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "all layers"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor.*'linear' needs"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "two"}}, "factor.*'yarn' needs"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "leave it out"),
        ({"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["state_bank_attention"]}, "layer_types"),
        ({"segment_lenght": 8}, "segment_length"),
        ({"memory_slot": [6, 4, 2]}, "memory_slots"),
        ({"usage_weight": float("nan")}, "usage_weight"),
        ({"usage_weight": -1.0}, "usage_weight"),
        ({"usage_weight": float("inf")}, "usage_weight"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"pad_token_id": 50}, "pad_token_id.*vocab_size"),
        ({"segment_length": 4.0}, "segment_length.*4.0"),
        ({"memory_slots": 8}, "memory_slots.*8"),
        ({"hidden_size": "x"}, "hidden_size.*'x'"),
    ],
)
def test_a_bad_setting_is_a_value_error_that_names_it(fields, named):
    with pytest.raises(ValueError, match=named):
        small_model(**fields)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"segment_length": 0}, "be at least 1"),
        ({"segment_length": "many"}, "'many'"),
        ({"memory_slots": [4, 2]}, "three counts"),
        ({"recency_weight": float("inf")}, "recency_weight"),
    ],
)
def test_a_setting_given_to_a_saved_model_is_checked_like_its_own(settings, words, tmp_path):
    small_model().save_pretrained(tmp_path)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=words):
            auto.from_pretrained(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_slots", [0, 4, 2]),
        ("memory_slots", [-3, 0, 0]),
        ("memory_slots", [8, 4]),
        ("segment_length", 0),
        ("num_sink_tokens", -1),
    ],
)
def test_a_setting_changed_on_the_model_is_checked_when_it_reads(model, name, value):
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=name):
        model(torch.ones(1, 90, dtype=torch.int64))


def test_settings_left_open_fit_the_trained_positions():
    for positions in (64, 512, 1000, 2048, 8192):
        config = BwrDncConfig(max_position_embeddings=positions)
        assert config.num_sink_tokens + sum(config.memory_slots) + 2 * config.segment_length <= positions
    assert (config.segment_length, config.memory_slots) == (256, [512, 256, 128])


def test_lists_of_a_config_may_be_tuples():
    given = {
        "memory_slots": (6, 4, 2),
        "slot_shares": (1.5, 1),
        "routing_thresholds": (0.5, 0.8),
        "attention_boost": (2.0, 1),
    }
    config = small_model(**given).config
    assert {name: getattr(config, name) for name in given} == {name: list(values) for name, values in given.items()}


def test_layers_share_the_slots_out_until_others_are_given(tmp_path):
    model = small_model(memory_slots=[6, 4, 2], slot_shares=[0.5, 1.5], segment_length=4, num_sink_tokens=2)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert [config.layer_slots(index) for index in range(2)] == [(3, 2, 1), (9, 6, 3)]
    assert config.max_keys == 2 + 18 + 8 and config.lossless_length == 4 + 8
    cache = model(torch.ones(1, 200, dtype=torch.int64), use_cache=True).past_key_values
    assert [line["capacity"] for line in cache.memory_report()] == [3, 2, 1, 9, 6, 3]
    same = BwrDncForCausalLM.from_pretrained(tmp_path, memory_slots=[6, 4, 2]).config
    assert same.slot_shares is None and same.layer_slots(0) == same.layer_slots(1) == (6, 4, 2)
    types = ["state_bank_attention", "sink_window_attention"]
    assert AutoConfig.from_pretrained(tmp_path, layer_types=types).max_keys == 2 + 6 + 8
    others = AutoConfig.from_pretrained(tmp_path, memory_slots=[6, 4, 2], slot_shares=[2, 1])
    assert [others.layer_slots(index)[0] for index in range(2)] == [12, 6]


def test_the_second_salience_head_lifts_nothing_above_zero():
    memory = tiny_model(tiny_config(use_secondary_salience=True)).model.layers[0].self_attn.memory
    inputs = torch.randn(1, 300, memory.salience.weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, both = memory.salience(inputs), memory.salience_logits(inputs)
        assert (
            torch.equal(both[alone > 0], alone[alone > 0]) and (both >= alone).all() and (both[alone <= 0] <= 0).all()
        )
        assert (both > alone).any() and ((both > alone) & (both < 0)).any()
        memory.secondary_salience.weight.zero_()
        assert torch.equal(memory.salience_logits(inputs), alone)
    # A neutral one can learn.
    memory.salience_logits(inputs).sum().backward()
    assert memory.secondary_salience.weight.grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_have_diverged_show_in_the_loss(training):
    model, ids = tiny_model(tiny_config()).train(training), token_ids(90)
    model.model.layers[0].self_attn.memory.salience.weight.data[:] = float("nan")
    with torch.set_grad_enabled(training):
        assert model(ids, labels=ids).loss.isnan()


def test_a_model_with_every_learned_part_can_be_built_of_fake_tensors():
    with FakeTensorMode():
        model = small_model(use_secondary_salience=True, short_conv_kernel=3)
    assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())


def test_historical_names_are_other_names():
    config = BwrDncConfig(d_model=64, n_layers=3, n_heads=4, max_seq_len=512)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert config.max_seq_len == config.max_position_embeddings == 512


def test_a_foreign_cache_is_refused(model):
    ids = torch.tensor([[1, 2, 3]])
    for cache in (DynamicCache(), DynamicCache(config=LlamaConfig(num_hidden_layers=2))):
        with pytest.raises(ValueError, match="DynamicCache"):
            model(ids, past_key_values=cache)


def test_a_cache_of_the_bank_layers_is_taken_and_returned_as_a_state_bank(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        returned = model(torch.tensor([[1, 2, 3]]), past_key_values=cache).past_key_values
    assert isinstance(returned, StateBankCache)
    assert cache.get_seq_length() == returned.get_seq_length() == 3


@pytest.mark.parametrize("implementation", ["static", "offloaded", "offloaded_static", "quantized", "sliding_window"])
def test_cache_implementations_without_a_bank_are_refused(model, implementation):
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(torch.tensor([[1, 2, 3]]), cache_implementation=implementation, max_new_tokens=2)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="Continuous batching"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="Continuous batching"):
        model.generate(torch.tensor([[1, 2, 3]]), cache_implementation="paged", max_new_tokens=2)


def test_a_mask_that_contradicts_the_history_is_refused_and_nothing_is_lost(model):
    cache = read(model, length=10)
    ids = torch.tensor([[1, 2]])
    expected = model(ids, past_key_values=cache.clone()).logits
    for mask in (
        torch.ones(1, 9),
        torch.cat((torch.zeros(1, 3), torch.ones(1, 9)), 1),
        torch.ones(1, 1),
        torch.ones(1, 1, 2, 12),
    ):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(model(ids, attention_mask=torch.ones(1, 12), past_key_values=cache).logits, expected)


def test_rows_that_do_not_match_the_cache_are_refused(model):
    with pytest.raises(ValueError, match="rows"):
        model(torch.ones(2, 3, dtype=torch.int64), past_key_values=read(model))


@pytest.mark.parametrize("exit_layer", [0, -1, 3])
def test_an_early_exit_before_or_behind_the_layers_is_refused(model, exit_layer):
    with pytest.raises(ValueError, match="assistant_early_exit"):
        model.generate(torch.tensor([[1, 2, 3]]), assistant_early_exit=exit_layer, max_new_tokens=2)
    assert model.config.num_hidden_layers == 2


def test_an_interrupted_draft_leaves_all_layers():
    model = tiny_model(tiny_config())

    def interrupt(*_):
        if model.config.num_hidden_layers == 1:
            raise KeyboardInterrupt

    model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(token_ids(12), assistant_early_exit=1, max_new_tokens=4)
    assert model.config.num_hidden_layers == 2


def test_neither_ids_nor_embeddings_or_both_is_refused(model):
    ids = torch.tensor([[1, 2, 3]])
    for given in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        for part in (model.model, model):
            with pytest.raises(ValueError, match="exactly one"):
                part(**given)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"labels": torch.ones(1, 3, dtype=torch.int64)}, "labels"),
        ({"labels": torch.ones(4, dtype=torch.int64)}, "labels"),
        ({"labels": torch.ones(1, 4, dtype=torch.int64), "logits_to_keep": 2}, r"\[1, 2\]"),
        ({"logits_to_keep": -1}, "logits_to_keep"),
        ({"logits_to_keep": 1, "read_block_length": -5}, "read_block_length"),
        ({"logits_to_keep": torch.tensor([1, 9])}, "logits_to_keep"),
        ({"logits_to_keep": torch.tensor([[4]])}, "logits_to_keep"),
        ({"logits_to_keep": torch.ones(1, 5, dtype=torch.bool)}, "logits_to_keep"),
        ({"logits_to_keep": torch.ones(2)}, "logits_to_keep"),
    ],
)
@pytest.mark.parametrize("is_embedded", [False, True])
def test_a_call_that_wants_what_there_is_not_is_refused_before_it_reads(model, wanted, named, is_embedded):
    ids, cache = torch.tensor([[1, 2, 3, 4]]), read(model)
    given = {"inputs_embeds": model.get_input_embeddings()(ids)} if is_embedded else {"input_ids": ids}
    with torch.no_grad():
        expected = model(ids, past_key_values=cache.clone()).logits
        with pytest.raises(ValueError, match=named):
            model(**given, past_key_values=cache, **wanted)
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("shape", [(10,), (3, 2, 10), (1, 9), (3, 10), (2, 1)])
@pytest.mark.parametrize("block_length", [None, 4])
def test_positions_of_another_shape_are_refused_before_anything_is_read(model, shape, block_length):
    cache, positions = StateBankCache(config=model.config), torch.ones(shape, dtype=torch.int64)
    with torch.no_grad(), pytest.raises(ValueError, match="position_ids"):
        ids = torch.ones(2, 10, dtype=torch.int64)
        options = {"logits_to_keep": 1, "read_block_length": block_length, "past_key_values": cache}
        model(ids, position_ids=positions, **options)
    assert cache.get_seq_length() == 0


def test_a_negative_number_of_hidden_states_is_refused(model):
    with pytest.raises(ValueError, match="hidden_states_to_keep"):
        model.model(torch.tensor([[1, 2, 3]]), hidden_states_to_keep=-1)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (3,)])
def test_an_input_without_tokens_or_rows_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"at least one row and one token"):
        model(torch.ones(shape, dtype=torch.int64))


def test_continuing_without_a_new_token_is_refused(model):
    ids = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="new token"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_embeddings_continue_a_memory_as_the_full_history_or_are_refused():
    model, ids = tiny_model(tiny_config()), token_ids(40)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 40:]
    for length in (3, 25, 35):
        cache = model(ids[:, :length], use_cache=True).past_key_values
        embedded = model.get_input_embeddings()(ids)
        found = model.generate(
            inputs_embeds=embedded, past_key_values=cache.clone(), max_new_tokens=6, do_sample=False
        )
        assert found[0].tolist() == expected.tolist()
        with pytest.raises(ValueError, match="taken for the full history"):
            model.generate(inputs_embeds=embedded[:, -length:], past_key_values=cache, max_new_tokens=6)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_embeddings_continue_memories_that_stand_at_different_positions(num_beams):
    model, lengths = tiny_model(tiny_config()), (23, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    texts = [token_ids(27, seed=1), token_ids(14, seed=2)]
    expected = [model.generate(text, **options)[0, -6:].tolist() for text in texts]
    with torch.no_grad():
        parts = [model(text[:, :n]).past_key_values for text, n in zip(texts, lengths, strict=True)]
    cache = StateBankCache.stack(parts)
    ids = torch.cat([torch.nn.functional.pad(text, (27 - text.shape[1], 0)) for text in texts])
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=(ids != 0).long(),
        past_key_values=cache,
        **options,
    )
    assert found.tolist() == expected


def test_embeddings_of_a_padded_history_need_no_mask():
    model, ids = tiny_model(tiny_config()), token_ids(30)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 30:]
    padded = torch.nn.functional.pad(ids, (3, 0))
    with torch.no_grad():
        cache = model(padded[:, :20], attention_mask=(padded[:, :20] != 0).long()).past_key_values
    embedded = model.get_input_embeddings()(padded)
    for mask in ({}, {"attention_mask": (padded != 0).long()}):
        memory = cache.clone()
        found = model.generate(
            inputs_embeds=embedded, past_key_values=memory, max_new_tokens=6, do_sample=False, **mask
        )
        assert found[0].tolist() == expected.tolist() and memory.rows[0].seen == 35


def test_a_long_input_is_read_in_blocks_with_the_same_result(model):
    ids = torch.randint(0, 50, (2, 90), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask)
        for block_length in (7, 31, 89):
            blocks = model(ids, attention_mask=mask, logits_to_keep=3, read_block_length=block_length)
            torch.testing.assert_close(blocks.logits, whole.logits[:, -3:], atol=1e-4, rtol=1e-4)
            assert (
                blocks.past_key_values.memory_report()[0]["used"] == whole.past_key_values.memory_report()[0]["used"]
            )


def test_positions_of_the_whole_history_start_nothing_anew_in_any_block():
    model, ids = tiny_model(tiny_config()), token_ids(90)
    caches = [StateBankCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, options in zip(caches, ({}, {"logits_to_keep": 1, "read_block_length": 11}), strict=True):
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:], past_key_values=cache, position_ids=torch.arange(90)[None], **options)
    assert_same_bank(*caches)


def test_a_mask_of_the_whole_history_says_that_equal_ids_are_new(model):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 8]])
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **settings)[:, 7:]
    cache = StateBankCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    found = model.generate(ids[:, 3:], attention_mask=torch.ones(1, 7).long(), past_key_values=cache, **settings)
    assert torch.equal(found[:, 4:], expected) and cache.get_seq_length() == 10


@pytest.mark.parametrize("last_layer", ["state_bank_attention", "sink_window_attention"])
@pytest.mark.parametrize("num_kept", [0, 1, 5])
def test_hidden_states_that_are_not_kept_leave_the_memory_as_it_is(last_layer, num_kept):
    model = small_model(layer_types=["state_bank_attention", last_layer]).double()
    ids = torch.randint(0, 50, (2, 90), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 70:] = 0
    with torch.no_grad():
        whole, part = (model.model(ids, attention_mask=mask, hidden_states_to_keep=kept) for kept in (None, num_kept))
        expected = whole.last_hidden_state[:, 90 - num_kept :]
        torch.testing.assert_close(part.last_hidden_state, expected, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(part.past_key_values.states, whole.past_key_values.states, strict=True):
            assert mine.rows == theirs.rows
            torch.testing.assert_close(mine.cleared().tensors(), theirs.cleared().tensors(), rtol=1e-9, atol=1e-9)


def test_heads_for_classification_ignore_padding():
    for head in (BwrDncForSequenceClassification, BwrDncForTokenClassification):
        config = small_model(pad_token_id=0).config
        config.num_labels = 3
        torch.manual_seed(0)
        classifier = head(config).eval()
        ids = torch.randint(1, 50, (1, 30))
        padded = torch.cat((ids, torch.zeros(1, 9, dtype=torch.int64)), dim=1)
        with torch.no_grad():
            alone = classifier(ids).logits
            batched = classifier(padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(batched if batched.dim() == 2 else batched[:, :30], alone, atol=1e-5, rtol=1e-5)


def test_attention_maps_are_distributions_over_what_is_seen(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.randint(0, 50, (1, 50)), output_attentions=True).attentions
    for weights in maps:
        assert weights.shape[:3] == (1, 2, 50)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 50), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "given", ["new tokens", "padded new tokens", "full history", "embeddings", "padded embeddings"]
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_shows_its_attention_whatever_it_continues(model, given, num_beams):
    ids = torch.randint(1, 50, (2, 60), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    cache = StateBankCache(config=model.config)
    if "padded" in given:
        mask[0, 50:53] = 0
    if "embeddings" not in given:
        model(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
    start = 50 if "new" in given else 0
    given = (
        {"inputs_embeds": model.get_input_embeddings()(ids)}
        if "embeddings" in given
        else {"input_ids": ids[:, start:]}
    )
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "return_dict_in_generate": True}

    def generate(**more):
        inputs = {**given, "attention_mask": mask[:, start:], "past_key_values": cache.clone()}
        return model.generate(**inputs, **options, **more)

    shown = generate(output_attentions=True)
    assert torch.equal(shown.sequences, generate().sequences)
    for weights in sum(shown.attentions[1:], ()):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=1e-5)


def test_half_precision_reads_and_decodes_over_a_full_bank():
    for dtype in (torch.bfloat16, torch.float16):
        half = small_model().to(dtype)
        with torch.no_grad():
            outputs = half(torch.randint(0, 50, (2, 40)), use_cache=True)
            outputs = half(torch.randint(0, 50, (2, 1)), past_key_values=outputs.past_key_values)
        assert outputs.logits.dtype == dtype and outputs.logits.isfinite().all()
        entries = outputs.past_key_values.layers[0].state.entries
        assert entries.salience.dtype == entries.usage.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_linear_maps_that_torch_has_quantised_keep_a_memory_in_the_precision_of_their_inputs(model):
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with torch.no_grad():
        outputs = quantized(torch.randint(0, 50, (2, 40)), use_cache=True)
        outputs = quantized(torch.randint(0, 50, (2, 1)), past_key_values=outputs.past_key_values)
    assert outputs.logits.isfinite().all()
    assert outputs.past_key_values.layers[0].keys.dtype == torch.float32


def test_queries_that_see_no_compressed_slots_are_finite_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        # Such a query masks with -10,000, times 8 in heads of this width: beyond float16.
        half = small_model(hidden_size=128, segment_length=16, use_hard_routing=True).to(dtype)
        half.model.layers[0].self_attn.memory.routing.weight.data.normal_(0, 3)
        with torch.no_grad():
            assert half(torch.randint(0, 50, (1, 120))).logits.isfinite().all()


def test_casts_leave_the_angles_of_rope_as_exact_as_they_were():
    model = small_model()
    exact = model.model.rotary_emb.inv_freq.clone()
    for cast in (model.half(), model.bfloat16(), model.to(torch.float64), model.float()):
        assert torch.equal(cast.model.rotary_emb.inv_freq.float(), exact)
    assert model.to("meta").model.rotary_emb.inv_freq.is_meta


def test_autocast_keeps_salience_and_retention_in_float32():
    model = small_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randint(0, 50, (1, 40)), labels=torch.randint(0, 50, (1, 40))).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rows_at_different_positions_are_decoded_under_autocast_with_normed_queries():
    model = tiny_model(tiny_config(use_qk_norm=True)).float()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.generate(token_ids(9).repeat(2, 1), attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert output.shape == (2, 29)


@pytest.mark.parametrize("settings", [{}, {"use_qk_norm": True}, {"use_qk_norm": True, "short_conv_kernel": 3}])
def test_a_memory_read_under_autocast_comes_back_bit_for_bit(settings, tmp_path):
    model, ids = tiny_model(tiny_config(**settings)).float(), token_ids(50)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(ids[:, :41]).past_key_values
        for state in cache.states:
            assert state.rotated.dtype == state.keys.dtype == torch.bfloat16
        cache.save_pretrained(tmp_path)
        loaded = StateBankCache.from_pretrained(tmp_path, config=model.config)
        assert torch.equal(*(model(ids[:, 41:], past_key_values=one).logits for one in (loaded, cache)))
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(ids).past_key_values
    assert {state.keys.dtype for state in trained.states} == {torch.bfloat16}


def test_a_state_of_another_precision_is_refused_and_nothing_is_lost(model):
    ids = torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache = model(ids, use_cache=True).past_key_values
            expected = model(ids, past_key_values=cache.clone()).logits
        with pytest.raises(ValueError, match="bfloat16, but the model computes in torch.float32"):
            model(ids, past_key_values=cache)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_a_saved_folder_carries_flat_files_that_import_only_what_everyone_has():
    files = [SURFACE, *map(Path, get_relative_import_files(SURFACE))]
    assert {file.parent for file in files} == {SURFACE.parent}
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | sys.stdlib_module_names
    for file in files:
        assert {name.split(".")[0] for name in get_imports(file)} <= allowed, file.name


def test_a_saved_folder_loads_elsewhere_without_the_package(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    program = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
# Loading the bare model makes it known to the library, which nothing else may need.
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel):
    assert auto.from_pretrained("model", trust_remote_code=True)(expected["ids"])[0].isfinite().all()
assert "modeling_bwr_dnc" not in sys.modules
model.save_pretrained("again")
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    # Without the checkout on the path; the package may be installed, but is not imported.
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    saved = {file.name for file in (tmp_path / "again").iterdir()}
    assert {file.name for file in SURFACE.parent.glob("*.py")} & saved >= {
        SURFACE.name,
        "state_bank.py",
        "memory_ops.py",
    }
    loaded = BwrDncForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, torch.load(tmp_path / "expected.pt")["logits"])


def test_checkpointing_that_would_write_the_memory_twice_is_refused(model):
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_an_mlp_computes_again_is_what_it_computed(model, dropout):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).train()
    mlp = adapted.get_decoder().layers[0].mlp
    inputs = torch.randn(1, 9, model.config.hidden_size, dtype=model.dtype)

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), [p for p in mlp.parameters() if p.requires_grad])

    torch.manual_seed(1)
    again = gradients(mlp(inputs))
    torch.manual_seed(1)
    kept = gradients(mlp._gated(mlp.gate_proj(inputs), mlp.up_proj(inputs)))
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_an_mlp_gives_the_same_in_parts(model, monkeypatch, is_checkpointed):
    mlp = model.double().model.layers[0].mlp
    inputs = torch.randn(2, 9, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    found = []
    for largest in (1 << 24, 2 * 4 * 8 * model.config.intermediate_size):
        monkeypatch.setattr("modeling_bwr_dnc.modeling_bwr_dnc.LARGEST_REUSED", largest)
        assert len(mlp._parts(inputs)) == (1 if largest == 1 << 24 else 3)
        output = mlp(inputs, is_checkpointed)
        found.append([output, *torch.autograd.grad(output.square().sum(), [inputs, *mlp.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_lora_needs_no_target_names_and_leaves_the_memory_alone(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    assert not any(".memory." in name for name, parameter in adapted.named_parameters() if "lora" in name)
    ids = torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        logits = adapted(ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_learned_prompts_generate_in_padded_batches_what_each_row_gets_alone(kind):
    peft = pytest.importorskip("peft")
    model = tiny_model(tiny_config(pad_token_id=0), seed=1)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    ids = torch.cat((token_ids(30, 1), token_ids(30, 2)))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    # One row finishes long before the other.
    free = adapted.generate(input_ids=ids, attention_mask=mask, **settings).sequences[:, 30:].tolist()
    end = next(token for token in free[0] if token not in free[1])
    settings["eos_token_id"] = end
    batched = adapted.generate(input_ids=ids, attention_mask=mask, **settings)
    uncached = adapted.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(batched.sequences, uncached.sequences)
    for row, start in enumerate((7, 0)):
        given = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        for inputs in (given, {name: value[:, start:] for name, value in given.items()}):
            alone = adapted.generate(**inputs, **settings)
            new = alone.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            assert batched.sequences[row, 30 : 30 + len(new)].tolist() == new
        assert_same_bank(batched.past_key_values, alone.past_key_values, first_row=row)


def test_a_memory_behind_a_learned_prompt_goes_on_by_one_token_or_says_how():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    adapted = peft.get_peft_model(tiny_model(tiny_config()), config).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    ids = token_ids(30)
    expected = adapted.generate(input_ids=ids, **settings)
    cache = adapted.generate(input_ids=ids[:, :20], **settings | {"max_new_tokens": 1}).past_key_values
    # PEFT itself leaves out all new tokens but the last.
    with pytest.raises(ValueError, match="past_key_values=cache"):
        adapted.generate(input_ids=ids[:, 20:], past_key_values=cache, **settings)
    with torch.no_grad():
        adapted.get_base_model()(ids[:, 20:-1], past_key_values=cache)
    rest = adapted.generate(input_ids=ids[:, -1:], past_key_values=cache, **settings)
    assert rest.sequences[0, 1:].tolist() == expected.sequences[0, 30:].tolist()


def test_copies_of_the_code_in_one_process_read_each_others_memories(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    models = [model]
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        copied = get_class_from_dynamic_module("modeling_bwr_dnc.BwrDncForCausalLM", str(tmp_path / name))
        models.append(copied.from_pretrained(tmp_path / name).eval())
    assert len({type(one).__module__ for one in models}) > 1
    ids, more = torch.randint(0, 50, (1, 40)), torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        expected = model(torch.cat((ids, more), dim=1)).logits[:, -9:]
        for first in models:
            for second in models:
                cache = first(ids, past_key_values=DynamicCache(config=second.config)).past_key_values
                torch.testing.assert_close(second(more, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", [0, 4000, 131_000])
def test_angles_are_those_of_llama(start):
    # More exact ones would be further from what converted weights have learned with.
    model = small_model().float()
    llama = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=model.config.head_dim, rope_parameters=model.config.rope_parameters)
    )
    hidden_states = torch.zeros(1, 1, 1)
    cos, sin = model.model.rotary_emb.table(hidden_states).range(start, start + 50)
    theirs = llama(hidden_states, torch.arange(start, start + 50)[None])
    half = model.config.head_dim // 2
    assert torch.equal(cos, theirs[0][0]) and torch.equal(sin[:, half:], theirs[1][0, :, half:])
    assert torch.equal(sin[:, :half], -sin[:, half:])


@pytest.mark.parametrize("with_gradient", [False, True])
def test_layers_may_be_spread_over_devices(with_gradient):
    """As `device_map="auto"` does with two GPUs; here the second device holds shapes only, and refuses what lies on the first."""
    model = tiny_model(tiny_config(num_hidden_layers=3, layer_types=["state_bank_attention"] * 3))
    devices = ["cpu", "meta", "meta"]
    for layer, device in zip(model.model.layers, devices, strict=True):
        hook = AlignDevicesHook(execution_device=device, skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(layer.to(device), hook)
    for module in (model.model.norm, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
        module.weight = torch.nn.Parameter(torch.empty(module.weight.shape, device="meta"))
    length = overflowing_length(model.config)
    ids = token_ids(2 * length).view(2, length)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with torch.set_grad_enabled(with_gradient):
        for mask in (None, padded):
            output = model(ids, attention_mask=mask, use_cache=True)
            cache = model(ids[:, :1], past_key_values=output.past_key_values).past_key_values
            assert output.logits.device.type == "meta" and output.logits.shape[:2] == ids.shape
            assert [state.keys.device.type for state in cache.states] == devices
            assert [state.history.device.type for state in cache.states] == devices
    assert output.logits.requires_grad == with_gradient
