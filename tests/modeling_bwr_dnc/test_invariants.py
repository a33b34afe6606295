"""
The invariants of the architecture, each a promise to users, on random configurations whose memory really acts.

Float64 throughout: a cut is discrete, so rounding could swap two retentions in float32, but hardly here.
"""

import copy
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_bwr_dnc import BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.configuration_bwr_dnc import RETENTION_SCORES
from tests.modeling_bwr_dnc.builders import (
    SEEDS,
    TOLERANCE,
    VOCABULARY,
    assert_same_bank,
    overflowing_length,
    random_chunks,
    random_model,
    read,
    tiny_config,
    tiny_model,
    token_ids,
)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def ragged_batch(lengths, width, side, seed=0):
    """Rows of the given lengths, padded to `width` left, right, or anywhere: ids, mask, and the rows alone."""
    rows = [token_ids(length, seed + index) for index, length in enumerate(lengths)]
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    for index, row in enumerate(rows):
        count = row.shape[1]
        columns = {
            "left": torch.arange(width - count, width),
            "right": torch.arange(count),
            "anywhere": torch.randperm(width, generator=generator)[:count].sort().values,
        }[side]
        ids[index, columns], mask[index, columns] = row[0], 1
    return ids, mask, rows


def read_padded(model, ids, mask, chunks):
    """
    Like `read`, with the mask of the whole history at every step, as `generate` gives it; with gradients in training.
    """
    cache, logits, start = None, [], 0
    with torch.set_grad_enabled(model.training):
        for length in chunks:
            stop = start + length
            output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            logits.append(output.logits.detach())
            cache, start = output.past_key_values, stop
    return torch.cat(logits, dim=1), cache


# 1. One pass = chunks = token by token


@given(SEEDS)
def test_one_pass_equals_chunks_equals_token_by_token(seed):
    model = random_model(seed)
    config = model.config
    ids = token_ids(overflowing_length(config, rest=1 + seed % config.segment_length), seed)
    logits, cache = read(model, ids)
    for longest in (1, config.segment_length, 4 * config.segment_length):
        chunked_logits, chunked_cache = read(model, ids, random_chunks(ids.shape[1], longest, seed))
        assert_close(chunked_logits, logits)
        assert_same_bank(chunked_cache, cache)
        assert chunked_cache.get_seq_length() == ids.shape[1]


def test_one_pass_equals_chunks_with_long_segments_and_hundreds_of_slots():
    config = tiny_config(segment_length=64, memory_slots=[150, 60, 20], num_hidden_layers=1)
    model, ids = tiny_model(config, seed=5), token_ids(900, seed=5)
    logits, cache = read(model, ids)
    chunked_logits, chunked_cache = read(model, ids, random_chunks(900, 100, seed=5))
    assert_close(chunked_logits, logits)
    assert_same_bank(chunked_cache, cache)


@pytest.mark.parametrize("score", RETENTION_SCORES)
def test_every_retention_score_keeps_the_same_whatever_the_chunks_and_the_padding(score):
    model = tiny_model(tiny_config(retention_score=score), seed=4)
    ids, mask, rows = ragged_batch([90, 41], 92, "left", seed=4)
    logits, cache = read_padded(model, ids, mask, random_chunks(92, 9, seed=4))
    for index, row in enumerate(rows):
        alone_logits, alone_cache = read(model, row)
        assert_close(logits[index : index + 1][:, mask[index].bool()], alone_logits)
        assert_same_bank(cache, alone_cache, first_row=index)


# 2. Padding is invisible


@given(SEEDS, st.sampled_from(["left", "right", "anywhere"]), st.booleans())
def test_padded_rows_equal_the_rows_alone(seed, side, in_chunks):
    model = random_model(seed, max_segment=8, max_slots=10)
    config = model.config
    longest = overflowing_length(config, rest=2)
    lengths = [longest, longest // 2, 1, min(longest, 2 * config.segment_length + 1)]
    ids, mask, rows = ragged_batch(lengths, longest + 3, side, seed)
    chunks = random_chunks(longest + 3, 3 * config.segment_length, seed) if in_chunks else [longest + 3]
    logits, cache = read_padded(model, ids, mask, chunks)
    for index, row in enumerate(rows):
        alone_logits, alone_cache = read(model, row)
        assert_close(logits[index : index + 1][:, mask[index].bool()], alone_logits)
        assert_same_bank(cache, alone_cache, first_row=index)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_rows_that_finish_early_keep_the_bank_of_the_row_generated_alone(num_beams):
    model = tiny_model(tiny_config(), seed=1)
    ids, mask, rows = ragged_batch([30, 17, 23], 30, "left", seed=1)
    settings = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    free = model.generate(ids, attention_mask=mask, eos_token_id=None, **settings).sequences[:, 30:]
    # An end that some row meets early and another late or never.
    first_met = {
        token: [(row == token).nonzero()[0].item() if (row == token).any() else 99 for row in free]
        for token in free.unique().tolist()
    }
    end = max(first_met, key=lambda token: max(first_met[token]) - min(first_met[token]))
    assert min(first_met[end]) + 5 < max(first_met[end])
    settings |= {"eos_token_id": end}
    if num_beams > 1:
        # Beams leave the bank of the last beams tried; only the tokens can be compared.
        batched = model.generate(ids, attention_mask=mask, num_beams=num_beams, **settings)
        for index, row in enumerate(rows):
            alone = model.generate(row, num_beams=num_beams, **settings).sequences[0, row.shape[1] :]
            assert batched.sequences[index, 30 : 30 + len(alone)].tolist() == alone.tolist()
        return
    batched = model.generate(ids, attention_mask=mask, **settings)
    for index, row in enumerate(rows):
        alone = model.generate(row, **settings)
        new = alone.sequences[0, row.shape[1] :]
        assert batched.sequences[index, 30 : 30 + len(new)].tolist() == new.tolist()
        assert_same_bank(batched.past_key_values, alone.past_key_values, first_row=index)


# 3. Rows are islands


@given(SEEDS, st.lists(st.integers(1, 70), min_size=2, max_size=4))
def test_banks_at_different_positions_stack_and_split(seed, lengths):
    model = random_model(seed, max_segment=8, max_slots=10)
    config = model.config
    caches = [read(model, token_ids(length, seed + i))[1] for i, length in enumerate(lengths)]
    more = torch.cat([token_ids(2 * config.segment_length + 3, seed + 50 + i) for i in range(len(lengths))])
    chunks = random_chunks(more.shape[1], 3, seed) if seed % 2 else None
    stacked = StateBankCache.stack([cache.clone() for cache in caches])
    assert stacked.get_seq_length() == max(lengths)
    for index, (one, cache) in enumerate(zip(stacked.unstack(), caches, strict=True)):
        assert_same_bank(one, cache)
        assert_same_bank(stacked, cache, first_row=index)
    logits, stacked = read(model, more, chunks, cache=stacked)
    for index, (cache, one) in enumerate(zip(caches, stacked.unstack(), strict=True)):
        alone_logits, alone = read(model, more[index : index + 1], cache=cache)
        assert_close(logits[index : index + 1], alone_logits)
        assert_same_bank(one, alone)


# 4. Causal


@given(SEEDS, st.data())
def test_a_token_changes_no_logit_before_it(seed, data):
    model = random_model(seed, max_slots=10)
    config = model.config
    ids = token_ids(overflowing_length(config), seed)
    changed_at = data.draw(st.integers(0, ids.shape[1] - 1))
    changed = ids.clone()
    changed[0, changed_at] = ids[0, changed_at] % (VOCABULARY - 1) + 1
    for training in (False, True):
        model.train(training)
        before, after = (model(either, use_cache=False).logits.detach() for either in (ids, changed))
        assert_close(after[:, :changed_at], before[:, :changed_at])
        assert not torch.equal(after[:, changed_at], before[:, changed_at])


# 5. Lossless until full


class ExactRotary(torch.nn.Module):
    """Llama's rotary embedding without its rounding to float32."""

    def __init__(self, inv_freq):
        super().__init__()
        self.inv_freq = inv_freq.double()

    def forward(self, hidden_states, position_ids):
        angles = position_ids[..., None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def exact_llama(config) -> LlamaForCausalLM:
    """Llama in float64 throughout: its norms and angles, too, which the library rounds to float32."""
    model = LlamaForCausalLM(config).double().eval()
    model.model.rotary_emb = ExactRotary(model.model.rotary_emb.inv_freq)
    for module in [model.model, *model.model.layers]:
        for name, child in list(module.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(config.hidden_size, eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, exact)
    return model


@given(SEEDS)
def test_equals_llama_up_to_the_lossless_length_and_not_beyond(seed):
    model = random_model(
        seed,
        memory_position="rank",
        layer_types=None,
        short_conv_kernel=0,
        use_qk_norm=False,
        attention_output_bias=False,
        attention_bias=False,
    )
    config = model.config
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"]
    source = exact_llama(LlamaConfig(**{name: getattr(config, name) for name in names}))
    source.load_state_dict({name: value for name, value in model.state_dict().items() if ".memory." not in name})

    raw = min(config.layer_slots(index)[0] for index in range(config.num_hidden_layers))
    sinks, segment = config.num_sink_tokens, config.segment_length
    assert config.lossless_length == (raw + sinks) // segment * segment + 2 * segment
    ids = token_ids(config.lossless_length + 1, seed)
    with torch.no_grad():
        expected = source(ids).logits
    for logits in (read(model, ids)[0], read(model, ids, random_chunks(ids.shape[1], 7, seed))[0]):
        assert_close(logits[:, :-1], expected[:, :-1])
        assert (logits[:, -1] - expected[:, -1]).abs().max() > 1e-3


# 6. Bounded


@given(SEEDS)
def test_nbytes_is_the_same_past_the_fill_point(seed):
    model = random_model(seed, max_segment=8, max_slots=8)
    config = model.config
    assume(config.memory_slots[1] or not config.memory_slots[2])  # level 2 is fed by level 1 only
    cache = read(model, token_ids(2 * overflowing_length(config), seed))[1]
    assert all(line["used"] == line["capacity"] for line in cache.memory_report())
    full = cache.nbytes
    for step in range(3 * config.segment_length):
        cache = read(model, token_ids(1, step), cache=cache)[1]
        assert cache.nbytes == full
    assert read(model, token_ids(5 * config.segment_length, seed), cache=cache)[1].nbytes == full


# 7. Round trip

CONTINUE_IN_ANOTHER_PROCESS = """
import sys, torch
from modeling_bwr_dnc import BwrDncForCausalLM, StateBankCache
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = BwrDncForCausalLM.from_pretrained(folder + "/model", dtype=torch.float64)
    cache = StateBankCache.from_pretrained(folder + "/state", config=model.config)
    given = torch.load(folder + "/given.pt")
    logits = []
    with torch.no_grad():
        for chunk in given.split(7, dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
            cache = output.past_key_values
    cache.save_pretrained(folder + "/state_after")
    torch.save(torch.cat(logits, dim=1), folder + "/logits.pt")
"""


def test_saving_and_continuing_in_another_process_equals_not_stopping_bit_for_bit(tmp_path):
    cases = [
        tiny_config(),
        tiny_config(memory_slots=[6, 0, 0], segment_length=5, short_conv_kernel=3, memory_position="constant"),
        tiny_config(
            layer_types=["sink_window_attention", "state_bank_attention"], num_sink_tokens=0, use_qk_norm=True
        ),
        tiny_config(memory_slots=[0, 0, 0]),
    ]
    expected = {}
    for index, config in enumerate(cases):
        folder = tmp_path / str(index)
        folder.mkdir()
        tiny_model(config, seed=index).save_pretrained(folder / "model")
        # Loaded here as there: some libraries' products differ in the last bit with where in memory a matrix begins.
        model = BwrDncForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        caches = [read(model, token_ids(length, seed=index))[1] for length in (61, 22)]
        cache = StateBankCache.stack(caches)  # two rows at different positions
        cache.save_pretrained(folder / "state")
        more = torch.cat([token_ids(20, seed=90), token_ids(20, seed=91)])
        torch.save(more, folder / "given.pt")
        expected[folder] = read(model, more, [7, 7, 6], cache=cache)
    command = [sys.executable, "-c", CONTINUE_IN_ANOTHER_PROCESS, *map(str, expected)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=240)
    for folder, (logits, cache) in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits)
        continued = StateBankCache.from_pretrained(folder / "state_after")
        for mine, theirs in zip(continued.layers, cache.layers, strict=True):
            assert mine.state.rows == theirs.state.rows
            saved = mine.state.cleared().tensors()
            for name, tensor in theirs.state.cleared().tensors().items():
                if name in saved:  # working copies are rebuilt, not saved
                    assert torch.equal(saved[name], tensor), name


# 8. Reproducible


@given(SEEDS)
def test_evaluation_is_deterministic_and_no_module_remembers_a_batch(seed):
    model = random_model(seed, max_slots=10)
    config = model.config
    ids = token_ids(overflowing_length(config), seed)

    def attributes():
        return {
            f"{module_name}.{name}": value
            for module_name, module in model.named_modules()
            for name, value in vars(module).items()
            if not isinstance(value, dict)
        }

    before = attributes()
    first, first_cache = read(model, ids)
    read(model, token_ids(33, seed + 1).repeat(3, 1))
    second, second_cache = read(model, ids)
    assert torch.equal(first, second)
    assert first_cache.tokens() == second_cache.tokens()
    after = attributes()
    assert before.keys() == after.keys()
    assert all(after[name] is value or after[name] == value for name, value in before.items())


# 9. Forgetting is real


def overwrite_what_nothing_occupies(cache, seed):
    """Put noise behind the length of every row, and into every forgotten entry; rotated copies are rebuilt from it."""
    generator = torch.Generator().manual_seed(seed)

    def spoil(tensor, where):
        noise = 100 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor[where] = noise.to(tensor.dtype)[where]

    for layer in cache.layers:
        state = layer.state
        for row, counters in enumerate(state.rows):
            in_window = counters.seen - counters.window_start
            before_window = torch.arange(len(state.entries)) < state.num_prefix(row)
            empty = (state.entries.mass[row] == 0) | ~before_window
            unused = (torch.arange(state.keys.shape[2]) >= state.length(row)).expand(state.keys.shape[1:3]).clone()
            unused[:, : len(state.entries)] |= empty & before_window
            if state.holes is not None:
                unused |= state.holes[row] < 0
            for tensor in (state.keys, state.values):
                spoil(tensor[row], unused)
            for tensor in (state.entries.salience, state.entries.salience_bias, state.entries.usage):
                spoil(tensor[row], empty)
            after_window = torch.arange(state.window_ids.shape[1]) >= in_window
            spoil(state.window_salience[row], after_window.expand_as(state.window_salience[row]))
            spoil(state.window_ids[row], after_window)
        state.rotated = state.key_bias = None


@given(SEEDS, st.lists(st.integers(1, 60), min_size=1, max_size=3), st.booleans())
def test_overwriting_empty_or_freed_room_changes_nothing(seed, lengths, forgets):
    model = random_model(seed, max_segment=8, max_slots=10)
    config = model.config
    cache = StateBankCache.stack([read(model, token_ids(length, seed + i))[1] for i, length in enumerate(lengths)])
    if forgets:
        cache.forget(config.num_sink_tokens + 1, config.num_sink_tokens + 1 + config.segment_length)
    spoiled = cache.clone()
    overwrite_what_nothing_occupies(spoiled, seed)
    more = torch.cat([token_ids(2 * config.segment_length + 2, seed + 9 + i) for i in range(len(lengths))])
    logits, _ = read(model, more, cache=cache.clone())
    spoiled_logits, _ = read(model, more, cache=spoiled.clone())
    assert_close(spoiled_logits, logits)
    one_by_one, _ = read(model, more, [1] * more.shape[1], cache=spoiled)
    assert_close(one_by_one, logits)


@pytest.mark.parametrize("retention_score", RETENTION_SCORES)
def test_what_was_forgotten_has_no_part_in_what_stays(retention_score):
    model, ids = tiny_model(tiny_config(retention_score=retention_score)), token_ids(60)
    _, cache = read(model, ids[:, :41])
    cache.forget(10, 36)
    spoiled = cache.clone()
    overwrite_what_nothing_occupies(spoiled, seed=1)
    assert_close(*(read(model, ids[:, 41:], cache=one)[0] for one in (spoiled, cache)))
    assert spoiled.tokens() == cache.tokens()


@given(SEEDS, st.data())
def test_forgotten_tokens_are_gone(seed, data):
    model = random_model(seed, max_slots=12, max_segment=8)
    config = model.config
    length = overflowing_length(config, rest=3)
    cache = read(model, token_ids(length, seed))[1]
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    kept = [slot for slot in cache.tokens() if not any(start <= position < end for position in slot["positions"])]
    cache.forget(start, end)
    assert cache.tokens() == kept
    logits, cache = read(model, token_ids(4 * config.segment_length, seed + 1), cache=cache)
    assert logits.isfinite().all()
    assert not any(start <= position < end for slot in cache.tokens() for position in slot["positions"])


@given(SEEDS)
def test_nothing_depends_on_which_token_was_forgotten(seed):
    model = random_model(seed, max_slots=12, max_segment=16)
    before = token_ids(overflowing_length(model.config, rest=0), seed)
    length, later = before.shape[1], token_ids(5 * model.config.segment_length, seed + 1)
    caches = []
    for last in (5, 41):
        # Nothing has been read since, so that it lives on in no other token.
        cache = read(model, torch.cat((before, torch.tensor([[last]])), dim=1))[1]
        cache.forget(length, length + 1)
        caches.append(cache)
    logits = [read(model, later, cache=cache)[0] for cache in caches]
    assert_close(*logits)
    assert_same_bank(*caches, but="history")


def test_a_row_forgets_alone():
    model, more = tiny_model(tiny_config()), token_ids(9, seed=7)
    caches = [read(model, token_ids(40, seed))[1] for seed in range(2)]
    stacked = StateBankCache.stack(caches)
    stacked.forget(10, 38, row=1)
    caches[1].forget(10, 38)
    logits = read(model, more.repeat(2, 1), cache=stacked)[0]
    assert_close(logits, torch.cat([read(model, more, cache=cache)[0] for cache in caches]))


# 10. Packed = apart


@given(SEEDS, st.lists(st.integers(1, 60), min_size=2, max_size=4), st.booleans())
def test_packed_documents_equal_the_documents_alone(seed, lengths, padded):
    model = random_model(seed, max_segment=8, max_slots=10)
    documents = [token_ids(length, seed + i) for i, length in enumerate(lengths)]
    ids = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    pads = 3 if padded else 0
    mask = torch.cat([torch.zeros(1, pads), torch.ones_like(ids)], dim=1).long()
    ids, positions = (torch.nn.functional.pad(tensor, (pads, 0)) for tensor in (ids, positions))
    inputs = {"position_ids": positions} | ({"attention_mask": mask} if padded else {})
    apart = [read(model, document) for document in documents]
    expected = torch.cat([logits for logits, _ in apart], dim=1)

    logits, cache = read(model, ids, **inputs)
    assert_close(logits[:, pads:], expected)
    assert_same_bank(cache, apart[-1][1])
    model.train()
    assert_close(model(ids, use_cache=False, **inputs).logits[:, pads:].detach(), expected)


# Training


@given(SEEDS)
def test_training_mode_gives_the_logits_of_evaluation(seed):
    model = random_model(seed, max_slots=8, max_segment=8)
    config = model.config
    ids, mask, _ = ragged_batch([overflowing_length(config), 2 * config.segment_length + 1], 120, "right", seed)
    expected = read(model, ids, attention_mask=mask)[0]
    actual = model.train()(ids, attention_mask=mask, use_cache=False).logits.detach()
    assert_close(actual[mask.bool()], expected[mask.bool()])


@given(SEEDS, st.sampled_from(["left", "right", "anywhere"]))
def test_rows_trained_in_chunks_equal_the_rows_alone(seed, side):
    model = random_model(seed, max_segment=8, max_slots=8).train()
    longest = 4 * model.config.segment_length + 1
    ids, mask, rows = ragged_batch([longest, longest // 2, 1], longest, side, seed)
    logits, cache = read_padded(model, ids, mask, random_chunks(longest, 3, seed))
    for index, row in enumerate(rows):
        alone_logits, alone_cache = read(model, row)
        assert_close(logits[index : index + 1][:, mask[index].bool()], alone_logits)
        assert_same_bank(cache.detach(), alone_cache, first_row=index)


@pytest.mark.parametrize("noise", [None, 17], ids=["exact", "noise"])
@pytest.mark.parametrize(
    "layer_types", [None, ["sink_window_attention", "state_bank_attention"]], ids=["banks", "mixed"]
)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(layer_types, noise):
    config = tiny_config(layer_types=layer_types)
    model = tiny_model(config, seed=2).train()
    ids, mask, _ = ragged_batch([90, 41], 90, "left", seed=2)
    labels = ids.masked_fill(mask == 0, -100)

    def loss_and_gradients():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels, retention_noise_seed=noise).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    loss, gradients = loss_and_gradients()
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed = loss_and_gradients()
    assert_close(checkpointed_loss, loss)
    for name, gradient in gradients.items():
        assert_close(checkpointed[name], gradient)
    assert any(gradients[name].abs().max() > 1e-6 for name in gradients if ".memory.compressor." in name)


@pytest.mark.parametrize("length", [5, 90])
def test_every_parameter_gets_a_gradient_whether_the_bank_acts_or_not(length):
    """Distributed training waits for the gradient of every parameter."""
    model = tiny_model(tiny_config(short_conv_kernel=3)).train()
    ids = token_ids(length)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_every_parameter_gets_a_gradient_of_0_from_nothing_but_padding():
    """As the last spans of a process are, whose rows are short."""
    model = tiny_model(tiny_config(short_conv_kernel=3, use_qk_norm=True)).train()
    ids = token_ids(5)
    model(ids, attention_mask=torch.zeros_like(ids)).logits.mul(0.0).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not any(parameter.grad.any() for parameter in model.parameters())


# Taking back, and moving rows


@given(SEEDS, st.data())
def test_crop_takes_back_any_of_the_last_segment(seed, data):
    model = random_model(seed, max_segment=8, max_slots=10)
    config = model.config
    segment = config.segment_length
    length = data.draw(st.integers(1, overflowing_length(config)))
    extra = data.draw(st.integers(1, segment))
    ids, more = token_ids(length + extra, seed), token_ids(segment + 2, seed + 1)
    cache = read(model, ids[:, :length])[1]
    cache.activate_past_recording()
    chunks = random_chunks(extra, data.draw(st.integers(1, segment)), seed)
    cache = read(model, ids[:, length:], chunks, cache=cache)[1]
    cache.crop(-extra)
    assert cache.get_seq_length() == length
    fresh = read(model, ids[:, :length])[1]
    # Older inputs of the convolution than the next token needs may be gone.
    assert_same_bank(cache, fresh, but="conv_inputs")
    logits, cache = read(model, more, cache=cache)
    expected, fresh = read(model, more, cache=fresh)
    assert_close(logits, expected)
    assert_same_bank(cache, fresh, but="conv_inputs")


@given(SEEDS, st.data())
def test_crops_in_a_row_are_exact_or_refused(seed, data):
    model = random_model(seed, max_segment=8, max_slots=10)
    segment = model.config.segment_length
    ids = token_ids(data.draw(st.integers(2, 5 * segment)), seed)
    recorded = min(2 * segment, ids.shape[1] - 1)
    cache = read(model, ids[:, :-recorded])[1]
    cache.activate_past_recording()
    cache = read(model, ids[:, -recorded:], [1] * recorded, cache=cache)[1]
    for count in data.draw(st.lists(st.integers(1, segment), min_size=2, max_size=4)):
        length = cache.get_seq_length()
        if count >= length:
            break
        try:
            cache.crop(-count)
        except ValueError:
            assert cache.get_seq_length() == length
            break
        again = read(model, ids[:, length - count : length], cache=cache.clone())[0]
        assert_close(again, read(model, ids[:, :length])[0][:, length - count :])


@pytest.mark.parametrize(("width", "pads", "count"), [(30, [2, 3], 28), (80, range(50, 70), 25), (40, range(30), 25)])
def test_crop_goes_back_over_padding(width, pads, count):
    model = tiny_model(tiny_config(segment_length=16))
    ids, mask, kept = token_ids(width), torch.ones(1, width, dtype=torch.int64), width - count
    mask[:, pads] = 0
    cache = read(model, ids, attention_mask=mask)[1]
    cache.crop(-count)
    fresh = read(model, ids[:, :kept], attention_mask=mask[:, :kept])[1]
    assert [asdict(row) for row in cache.rows] == [asdict(row) for row in fresh.rows]
    assert_same_bank(cache, fresh)


def test_crop_stays_within_a_packed_document():
    model = tiny_model(tiny_config())
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]])
    cache = read(model, token_ids(8), position_ids=positions)[1]
    with pytest.raises(ValueError, match="remove 3"):
        cache.crop(-3)


@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("training", [False, True])
def test_crop_takes_back_what_each_row_has_read_however_far_others_went(kernel, training):
    model = tiny_model(tiny_config(short_conv_kernel=kernel)).train(training)
    before = token_ids(14)
    cache = read(model, before.repeat(2, 1))[1]
    cache.activate_past_recording()
    ids, mask, rows = ragged_batch([15, 8], 15, "left")
    cache = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).past_key_values.detach()
    cache.crop(-3)
    for index, row in enumerate(rows):
        alone = read(model, torch.cat([before, row[:, :-3]], dim=1))[1]
        assert_same_bank(cache, alone, first_row=index, but="conv_inputs")


def test_crop_goes_back_over_the_last_of_packed_documents():
    model = tiny_model(tiny_config(short_conv_kernel=3))
    cache, documents = StateBankCache(config=model.config), [token_ids(length, seed=length) for length in (11, 17, 18)]
    cache.activate_past_recording()
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    cache = read(model, torch.cat(documents, dim=1), cache=cache, position_ids=positions)[1]
    cache.crop(-3)
    assert_same_bank(cache, read(model, documents[-1][:, :-3])[1], but="conv_inputs")


def test_reading_without_keeping_leaves_no_trace_in_what_is_recorded():
    model = tiny_model(tiny_config())
    cache = read(model, token_ids(14))[1]
    cache.activate_past_recording()
    cache = read(model, token_ids(3, seed=1), cache=cache)[1]
    with torch.no_grad():
        model(token_ids(9, seed=2), past_key_values=cache, use_cache=False)
    cache.crop(-3)
    assert_same_bank(cache, read(model, token_ids(14))[1])


def test_crop_of_more_than_a_segment_says_so():
    model = tiny_model(tiny_config())
    cache = read(model, token_ids(40))[1]
    with pytest.raises(ValueError, match="segment_length = 4"):
        cache.crop(-5)


def test_crop_over_forgotten_tokens_is_refused_and_behind_them_exact():
    model = tiny_model(tiny_config(segment_length=16))
    cache, fresh = (read(model, token_ids(40)[:, :length])[1] for length in (40, 37))
    cache.forget(34, 37)
    with pytest.raises(ValueError, match="forget"):
        cache.crop(-6)
    cache.crop(-3)
    assert torch.equal(cache.history, fresh.history)


@given(SEEDS)
def test_rows_are_reordered_selected_and_repeated_whole(seed):
    model = random_model(seed, max_segment=8, max_slots=10)
    config = model.config
    lengths = [overflowing_length(config), 2 * config.segment_length + 2, 3]
    caches = [read(model, token_ids(length, seed + i))[1] for i, length in enumerate(lengths)]
    stacked = StateBankCache.stack(caches)
    moves = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_select_indices": (torch.tensor([1, 2]), [1, 2]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    for operation, (argument, order) in moves.items():
        moved = stacked.clone()
        getattr(moved, operation)(argument)
        more = torch.cat([token_ids(config.segment_length + 1, seed + 20 + i) for i in range(len(order))])
        logits, moved = read(model, more, cache=moved)
        for index, original in enumerate(order):
            alone = caches[original].clone()
            expected, alone = read(model, more[index : index + 1], cache=alone)
            assert_close(logits[index : index + 1], expected)
            assert_same_bank(moved, alone, first_row=index)


def test_a_clone_and_a_deep_copy_are_independent():
    model = tiny_model(tiny_config())
    cache = read(model, token_ids(50))[1]
    kept = read(model, token_ids(50))[1]
    for forked in (cache.clone(), copy.deepcopy(cache)):
        read(model, token_ids(20, seed=1), cache=forked)
        assert_same_bank(cache, kept)


# Editing


def test_pinned_tokens_stay_raw_in_every_head_however_much_is_read():
    model = tiny_model(tiny_config(memory_slots=[8, 4, 2]))
    cache = read(model, token_ids(10))[1]
    cache.pin(3, 9)
    cache = read(model, token_ids(300, seed=1), cache=cache)[1]
    raw = {(slot["layer"], slot["head"], slot["positions"][0]) for slot in cache.tokens() if slot["level"] == 0}
    assert raw >= {(layer, head, position) for layer in range(2) for head in range(2) for position in range(3, 9)}
    ids = token_ids(10)[0].tolist()
    assert all(slot["token_ids"] == [ids[slot["positions"][0]]] for slot in cache.tokens() if slot["positions"][0] < 9)


def test_a_pin_that_cannot_be_kept_is_refused():
    model = tiny_model(tiny_config())
    cache = read(model, token_ids(60))[1]
    with pytest.raises(ValueError, match="raw slots"):
        cache.pin(60, 66)
    with pytest.raises(ValueError, match="compressed or forgotten"):
        cache.pin(2, 7)
    with pytest.raises(ValueError, match=f"hold {10**18 - 2} tokens"):
        cache.pin(0, 10**18)


def test_a_row_is_counted_from_either_end_and_must_exist():
    cache = read(tiny_model(tiny_config()), token_ids(60).repeat(2, 1))[1]
    forward, backward = cache.clone(), cache.clone()
    for edited, row in ((forward, 1), (backward, -1)):
        edited.forget(50, 52, row)
        edited.pin(57, 58, row)
    assert_same_bank(backward, forward, 1, 1)
    assert backward.tokens(-1) == forward.tokens(1)
    for row in (2, -3):
        for ask in (cache.tokens, partial(cache.forget, 50, 52), partial(cache.pin, 57, 58)):
            with pytest.raises(ValueError, match=f"`row` is {row}, but must be one of the 2 rows"):
                ask(row)


def test_pinned_spans_may_overlap_each_other_and_the_sinks():
    cache = read(tiny_model(tiny_config()), token_ids(6))[1]
    for span in ((4, 6), (0, 3), (1, 5), (5, 7)):
        cache.pin(*span)
    with pytest.raises(ValueError, match="hold 6 tokens"):
        cache.pin(7, 8)


def test_what_is_pinned_stays_pinned_when_tokens_are_taken_back_over_a_consolidation():
    model = tiny_model(tiny_config())
    cache = read(model, token_ids(16))[1]
    cache.activate_past_recording()
    cache = read(model, token_ids(2, seed=1), cache=cache)[1]
    cache.pin(12, 15)
    cache.crop(-3)
    assert all(row.pinned == ((12, 15),) for state in cache.states for row in state.rows)


@pytest.mark.parametrize("change", [{"memory_slots": [4, 2, 1]}, {"use_memory": False}])
def test_fewer_slots_than_are_pinned_are_refused_and_nothing_is_lost(change):
    model = tiny_model(tiny_config(memory_slots=[8, 4, 2]))
    cache = read(model, token_ids(10))[1]
    cache.pin(3, 9)
    before = cache.clone()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match="6 tokens of the state are pinned"):
        read(model, token_ids(30, seed=1), cache=cache)
    assert_same_bank(cache, before)


@pytest.mark.parametrize("score", ["salience", "key_norm", "key_difference", "expected_attention"])
def test_entries_of_the_same_token_tie_however_the_text_is_cut(score):
    """Keys and salience of equal tokens differ in their last bits only, by the shapes that they were computed in."""
    for seed in range(8):
        config = tiny_config(memory_slots=[6, 3, 2], segment_length=4, usage_weight=0.0, retention_score=score)
        model, ids = tiny_model(config, seed=seed), token_ids(90, seed=seed) % 5
        assert_close(read(model, ids, random_chunks(90, 7, seed))[0], read(model, ids)[0])


# Generation over the same memory


@given(SEEDS)
def test_continuing_with_new_tokens_or_with_the_full_history_equals_not_stopping(seed):
    model = random_model(seed, max_segment=8, max_slots=8)
    config = model.config
    settings = {"do_sample": False, "return_dict_in_generate": True}
    prompt = token_ids(3 * config.segment_length + 1, seed)
    whole = model.generate(prompt, max_new_tokens=12, **settings)
    first = model.generate(prompt, max_new_tokens=5, **settings)
    for given_ids in (first.sequences, first.sequences[:, -1:]):
        cache = first.past_key_values.clone()
        rest = model.generate(given_ids, past_key_values=cache, max_new_tokens=7, **settings)
        assert rest.sequences[0, given_ids.shape[1] :].tolist() == whole.sequences[0, prompt.shape[1] + 5 :].tolist()
        assert_same_bank(rest.past_key_values, whole.past_key_values)


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generating_without_a_cache_over_a_memory_gives_the_same_and_leaves_it(start, num_beams):
    model, ids = tiny_model(tiny_config()), token_ids(45)
    cache = read(model, ids[:, :40])[1]
    before = cache.clone()
    settings = {"do_sample": False, "max_new_tokens": 12, "num_beams": num_beams}
    expected = model.generate(ids, **settings)[:, 45:]
    found = model.generate(ids[:, start:], past_key_values=cache, use_cache=False, **settings)
    assert torch.equal(found[:, 45 - start :], expected)
    assert_same_bank(cache, before)


@pytest.mark.parametrize("seed", range(2))
def test_every_way_of_decoding_gives_the_greedy_tokens_over_a_full_bank(seed):
    model, assistant = tiny_model(tiny_config(), seed), tiny_model(tiny_config(num_hidden_layers=1), seed)
    # Mistakes of the assistant have to be taken back, agreements kept.
    assistant.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    prompt = token_ids(20, seed).repeat(1, 3)
    settings = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}
    expected = model.generate(prompt, **settings)
    ways = {
        "without a cache": {"use_cache": False},
        "dynamic cache": {"cache_implementation": "dynamic"},
        "chunked prefill": {"prefill_chunk_size": 7},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "long prompt lookup": {"prompt_lookup_num_tokens": 9},
        "assistant": {"assistant_model": assistant},
        "early exit": {"assistant_early_exit": 1},
    }
    # The library asks the drafting model, not the call, for how long a draft is; these are longer than a segment.
    for drafting in (model, assistant):
        drafting.generation_config.update(num_assistant_tokens=7, assistant_confidence_threshold=0.0)
    for name, way in ways.items():
        output = model.generate(prompt, **settings, **way)
        assert output.sequences.tolist() == expected.sequences.tolist(), name
        if output.past_key_values is not None:
            assert_same_bank(output.past_key_values, expected.past_key_values, but="conv_inputs")
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 20, "num_return_sequences": 2}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))


def test_drafts_are_no_longer_than_either_memory_can_take_back():
    model, prompt = tiny_model(tiny_config()), token_ids(60)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = exact_llama(LlamaConfig(**shape, vocab_size=model.config.vocab_size, eos_token_id=None))
    settings = {"do_sample": False, "max_new_tokens": 20}
    for main, segment_length in ((model, 2), (llama, 4)):
        assistant = tiny_model(tiny_config(segment_length=segment_length), 1)
        assistant.generation_config.update(num_assistant_tokens=20, assistant_confidence_threshold=0.0)
        found = main.generate(prompt, **settings, assistant_model=assistant)
        assert torch.equal(found, main.generate(prompt, **settings))


@pytest.mark.parametrize("schedule", ["heuristic", "heuristic_transient"])
def test_drafts_that_grow_with_success_stay_within_a_segment(schedule):
    for seed in range(3):
        model, assistant, prompt = *(tiny_model(tiny_config(), seed) for _ in range(2)), token_ids(30, seed)
        # Mostly right, so that drafts grow, and then wrong.
        torch.manual_seed(seed)
        assistant.lm_head.weight.data += 0.3 * torch.randn_like(assistant.lm_head.weight)
        settings = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": schedule}
        assistant.generation_config.update(**settings, assistant_confidence_threshold=0.0)
        settings = {"do_sample": False, "max_new_tokens": 40}
        expected = model.generate(prompt, **settings)
        assert torch.equal(model.generate(prompt, **settings, assistant_model=assistant), expected)


@given(SEEDS)
def test_without_memory_equals_a_model_without_slots(seed):
    model = random_model(seed, max_segment=8, max_slots=8)
    config = model.config
    ids = token_ids(overflowing_length(config), seed)
    without = copy.deepcopy(config)
    without.layer_types = ["sink_window_attention"] * config.num_hidden_layers
    window_only = tiny_model(without, seed)
    weights = {name: value for name, value in model.state_dict().items() if ".memory." not in name}
    window_only.load_state_dict(weights)
    assert_close(read(model, ids, use_memory=False)[0], read(window_only, ids)[0])


@given(SEEDS)
def test_going_on_without_memory_reads_no_slot_of_a_full_bank(seed):
    model = random_model(seed, max_segment=8, max_slots=8)
    lengths = [overflowing_length(model.config), 3 * model.config.segment_length + 1]
    cache = StateBankCache.stack([read(model, token_ids(length, seed + i))[1] for i, length in enumerate(lengths)])
    spoiled = cache.clone()
    for state in spoiled.states:
        for index, row in enumerate(state.rows):
            state.keys[index, :, state.num_prefix(index) - row.num_slots : state.num_prefix(index)] = 9.0
        state.rotated = None
    more = token_ids(3, seed).repeat(2, 1)
    logits, spoiled = read(model, more, cache=spoiled, use_memory=False)
    assert_close(read(model, more, [1, 2], cache=cache, use_memory=False)[0], logits)
    assert spoiled.tokens(row=0) == spoiled.tokens(row=1) == []


@pytest.mark.parametrize("chunks", [[10], [5, 5], [2, 8]])
@pytest.mark.parametrize("segment_length", [4, 16])
def test_a_frozen_model_passes_gradients_on_to_what_its_memory_was_made_of(segment_length, chunks):
    """As a soft prompt does, that is read once; the same as where the weights have gradients, too."""
    found = []
    for is_frozen in (False, True):
        model = tiny_model(tiny_config(segment_length=segment_length)).requires_grad_(not is_frozen)
        soft = torch.randn(1, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        cache = model(inputs_embeds=soft, use_cache=True).past_key_values
        ids = token_ids(10)
        logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunks, dim=1)]
        torch.nn.functional.cross_entropy(torch.cat(logits, dim=1)[0, :-1], ids[0, 1:]).backward()
        found.append(soft.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", ["mlp", "compressor"])
def test_checkpoints_read_a_memory_again_as_it_was(trained):
    found = []
    for is_checkpointing in (False, True):
        model = tiny_model(tiny_config()).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        if is_checkpointing:
            model.gradient_checkpointing_enable()
        ids = token_ids(40)
        with torch.no_grad():
            cache = model(ids[:, :21], use_cache=True).past_key_values
        embeds = model.get_input_embeddings()(ids[:, 21:]).detach()
        model(inputs_embeds=embeds, past_key_values=cache, labels=ids[:, 21:], use_cache=True).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [{"attention_boost": 3.0}, {"memory_position": "constant"}, {"use_memory": False}])
def test_taking_back_goes_on_under_the_settings_of_now(change):
    """Row by row or as a batch, of which one row had consolidated before the settings changed."""

    def played(as_batch):
        config = tiny_config()
        model, after = tiny_model(config), torch.cat([token_ids(4, 10), token_ids(4, 11)])
        caches = [read(model, token_ids(length, seed))[1] for seed, length in enumerate((50, 47))]
        caches = [StateBankCache.stack(caches)] if as_batch else caches
        rows = [after] if as_batch else list(after.split(1))
        for cache, ids in zip(caches, rows, strict=True):
            cache.activate_past_recording()
            read(model, ids, cache=cache)
        for name, value in change.items():
            setattr(config, name, value)
        for cache, ids in zip(caches, rows, strict=True):
            read(model, ids[:, :1], cache=cache)
            cache.crop(-4)
            # Settings without slots leave none, in what is taken back either.
            held = [row.num_slots > 0 for state in cache.states for row in state.rows]
            assert all(held) if config.use_memory else not any(held)
        return torch.cat([read(model, ids[:, :3], cache=cache)[0] for cache, ids in zip(caches, rows, strict=True)])

    torch.testing.assert_close(played(True), played(False), rtol=1e-9, atol=1e-9)


INTERRUPTED = {
    "before a layer": lambda layers: layers[1],
    "after the last attention": lambda layers: layers[1].mlp,
    "while merging": lambda layers: layers[0].self_attn.memory.compressor,
}


@pytest.mark.parametrize(
    ("place", "with_gradients"), [*((place, False) for place in INTERRUPTED), ("before a layer", True)]
)
def test_a_memory_of_an_interrupted_pass_is_refused(place, with_gradients, tmp_path):
    model, ids = tiny_model(tiny_config()), token_ids(40)
    num_read, count = (20, 5) if "merging" in place else (21, 2)
    _, cache = read(model, ids[:, :num_read])
    copied = cache.clone()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    hook = INTERRUPTED[place](model.model.layers).register_forward_pre_hook(interrupt)
    with torch.set_grad_enabled(with_gradients), pytest.raises(KeyboardInterrupt):
        model(ids[:, num_read : num_read + count], past_key_values=cache)
    hook.remove()
    refused = (
        lambda: read(model, ids[:, num_read:], cache=cache),
        lambda: read(model, ids[:, num_read:], cache=cache.clone()),
        lambda: cache.save_pretrained(tmp_path),
        lambda: cache.crop(-1),
        lambda: StateBankCache.stack([cache, copied]),
    )
    for use in refused:
        with pytest.raises(ValueError, match="interrupted"):
            use()
    assert not list(tmp_path.iterdir())
    expected, _ = read(model, ids)
    cache.reset()
    torch.testing.assert_close(read(model, ids, cache=cache)[0], expected, **TOLERANCE)
    torch.testing.assert_close(read(model, ids[:, num_read:], cache=copied)[0], expected[:, num_read:], **TOLERANCE)


def test_a_memory_into_which_nothing_was_written_goes_on(monkeypatch):
    model, ids = tiny_model(tiny_config()), token_ids(40)
    expected, _ = read(model, ids)
    for start in (0, 20):
        cache = StateBankCache(config=model.config)
        if start:
            read(model, ids[:, :start], cache=cache)
        with pytest.raises(RuntimeError):
            model.model(inputs_embeds=torch.zeros(1, 3, 15, dtype=torch.float64), past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="memory"):
            patched.setattr(model.model.layers[0].self_attn, "_project", _out_of_memory)
            read(model, ids[:, start:], cache=cache)
        torch.testing.assert_close(read(model, ids[:, start:], cache=cache)[0], expected[:, start:], **TOLERANCE)


def _out_of_memory(*arguments):
    raise torch.OutOfMemoryError("out of memory")


def test_layers_that_are_computed_again_leave_a_memory_that_goes_on():
    model, ids = tiny_model(tiny_config()), token_ids(40)
    expected, _ = read(model, ids)
    model.train().gradient_checkpointing_enable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    output = model(ids[:, :22], use_cache=True)
    output.logits.sum().backward()
    found, _ = read(model.eval(), ids[:, 22:], cache=output.past_key_values.detach())
    torch.testing.assert_close(found, expected[:, 22:], **TOLERANCE)


def test_numbers_of_the_host_stay_there_whatever_the_default_device():
    model, ids = tiny_model(tiny_config()), token_ids(40)
    expected, _ = read(model, ids)
    _, cache = read(model, ids[:, :30])
    with torch.device("meta"):
        logits, cache = read(model, ids[:, 30:], cache=cache)
        cache.forget(3, 5)
    torch.testing.assert_close(logits, expected[:, 30:])
