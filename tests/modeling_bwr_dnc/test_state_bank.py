"""Files of a state: what comes back is what was saved, and what cannot be trusted is refused with nothing lost."""

import copy
import gc
import json
import pickle
import tempfile

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig, LlamaConfig, Qwen3Config

from modeling_bwr_dnc import BwrDncConfig, BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.layer_state import RowState, extend_history, shorten_history
from modeling_bwr_dnc.state_bank import STATE_FILE, _digest_of, fingerprint_weights


def small_model(seed: int = 0, **settings) -> BwrDncForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    bank = {"segment_length": 4, "memory_slots": [6, 4, 2], "num_sink_tokens": 2, "initializer_range": 0.3}
    return BwrDncForCausalLM(BwrDncConfig(**sizes | heads | bank | settings)).eval()


def read(model: BwrDncForCausalLM, length: int = 60, seed: int = 1) -> StateBankCache:
    ids = torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    cache = read(model)
    cache.save_pretrained(tmp_path / "state")
    return model, cache, tmp_path / "state"


def test_a_saved_state_comes_back_whole(saved):
    model, cache, folder = saved
    loaded = StateBankCache.from_pretrained(folder, config=model.config)
    assert loaded.memory_report() == cache.memory_report()
    assert loaded.tokens() == cache.tokens()
    assert loaded.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "swapped"])
def test_damaged_tensors_are_refused(saved, damage):
    _, _, folder = saved
    (tensors,) = folder.glob("*.safetensors")
    blob = bytearray(tensors.read_bytes())
    if damage == "truncated":
        tensors.write_bytes(blob[: len(blob) // 2])
    elif damage == "flipped":
        blob[-5] ^= 1
        tensors.write_bytes(blob)
    elif damage == "missing":
        tensors.unlink()
    else:
        other = small_model(seed=5)
        read(other).save_pretrained(folder.parent / "other")
        (foreign,) = (folder.parent / "other").glob("*.safetensors")
        tensors.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match="sha256|damaged|incomplete"):
        StateBankCache.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\x80\x00", b'{"format": "bwr_dnc_state_bank", "version": 1}']
)
def test_a_damaged_or_foreign_description_is_refused(saved, content):
    _, _, folder = saved
    (folder / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="JSON|does not describe|damaged|altered"):
        StateBankCache.from_pretrained(folder)


def test_a_flipped_digit_of_the_description_is_noticed(saved):
    _, _, folder = saved
    text = (folder / STATE_FILE).read_text()
    assert '"seen": 60' in text
    (folder / STATE_FILE).write_text(text.replace('"seen": 60', '"seen": 61', 1))
    with pytest.raises(ValueError, match="altered"):
        StateBankCache.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{"settings": []}, {"rows": []}, {"tensors": None}, {"weights_fingerprint": ...}])
def test_a_description_that_lacks_something_is_refused(saved, changes):
    _, _, folder = saved
    description = json.loads((folder / STATE_FILE).read_text()) | changes
    description = {name: value for name, value in description.items() if value is not ...}
    description["description_sha256"] = _digest_of(description)
    (folder / STATE_FILE).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="damaged or incomplete"):
        StateBankCache.from_pretrained(folder)


def test_padding_in_a_file_of_an_earlier_version_is_understood(saved):
    _, _, folder = saved
    description = json.loads((folder / STATE_FILE).read_text())
    for row in sum(description["rows"], []):
        row.update(columns=64, pads=[59, 60, 62, 63])
    description["description_sha256"] = _digest_of(description)
    (folder / STATE_FILE).write_text(json.dumps(description))
    row = StateBankCache.from_pretrained(folder).rows[0]
    assert [row.unfed(count).seen for count in range(7)] == [60, 60, 60, 59, 59, 59, 58]


def test_a_path_that_does_not_exist_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        StateBankCache.from_pretrained(tmp_path / "nowhere")


def test_a_state_of_another_format_version_is_refused(saved):
    _, _, folder = saved
    description = json.loads((folder / STATE_FILE).read_text())
    (folder / STATE_FILE).write_text(json.dumps(description | {"version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        StateBankCache.from_pretrained(folder)


def test_a_folder_without_a_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match=STATE_FILE):
        StateBankCache.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"segment_length": 8, "memory_slots": [6, 4, 2]}, "segment_length"),
        ({"num_sink_tokens": 1}, "num_sink_tokens"),
        ({"num_hidden_layers": 1}, "layers"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ],
)
def test_a_state_of_another_shape_is_refused_by_name(saved, settings, named):
    _, _, folder = saved
    with pytest.raises(ValueError, match=named):
        StateBankCache.from_pretrained(folder, config=small_model(**settings).config)


def test_a_state_made_by_other_weights_is_refused_at_first_use_and_stays_usable(saved):
    model, cache, folder = saved
    loaded = StateBankCache.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        with pytest.raises(ValueError, match="fingerprint"):
            small_model(seed=7)(ids, past_key_values=loaded)
        assert torch.equal(model(ids, past_key_values=loaded).logits, model(ids, past_key_values=cache).logits)


def test_a_state_that_a_model_has_read_is_refused_by_other_weights_and_continued_by_a_copy_of_the_same(saved):
    model, cache, _ = saved
    ids, copied = torch.tensor([[3, 4, 5]]), copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache.clone()).logits
        with pytest.raises(ValueError, match="fingerprint"):
            small_model(seed=7)(ids, past_key_values=cache)
        assert torch.equal(copied(ids, past_key_values=cache).logits, expected)
        # Nothing is left of what it had read.
        cache.reset()
        small_model(seed=7)(ids, past_key_values=cache)


@pytest.mark.parametrize("place", ["disk", "memory", "behind other hooks"])
def test_weights_have_one_fingerprint_offloaded_or_not(place, tmp_path):
    def offloaded(model: BwrDncForCausalLM) -> BwrDncForCausalLM:
        if place == "disk":
            folder = tempfile.mkdtemp(dir=tmp_path)
            model.save_pretrained(folder)
            return BwrDncForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder + "/rest")
        model = accelerate.cpu_offload(copy.deepcopy(model), "cpu")
        for module in model.modules() if place == "behind other hooks" else ():
            add_hook_to_module(module, ModelHook(), append=True)
        return model

    models = [small_model(), small_model(seed=7)]
    plain, away = ([fingerprint_weights(model.model) for model in kind] for kind in (models, map(offloaded, models)))
    assert plain == away and plain[0] != plain[1]


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_weights_in_4_bits_have_one_fingerprint_before_and_after_they_are_used(use_double_quant, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=use_double_quant
    )
    found = []
    for seed in (0, 0, 7):
        model, other = (small_model(one, hidden_size=64, intermediate_size=128) for one in (7, seed))
        # Only what is quantised differs.
        model.model.layers.load_state_dict(other.model.layers.state_dict())
        model.save_pretrained(tmp_path)
        model = BwrDncForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
        found.append(fingerprint_weights(model.model))
        read(model)
        found.append(fingerprint_weights(model.model))
    assert found[0] == found[1] == found[2] == found[3] != found[4] == found[5]


def test_weights_have_another_fingerprint_under_every_adapter_and_under_none(saved):
    peft = pytest.importorskip("peft")
    model, cache, _ = saved
    config = peft.LoraConfig(r=2, init_lora_weights=False, modules_to_save=["norm"])
    adapted = peft.get_peft_model(model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    found = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        found[name] = cache.weights_fingerprint
    with adapted.disable_adapter():
        found["none"] = cache.weights_fingerprint
    assert cache.weights_fingerprint == found["second"]
    adapted.merge_adapter()
    found["merged"] = cache.weights_fingerprint
    assert len(set(found.values())) == 4


def test_saving_warns_when_the_model_that_wrote_is_gone(tmp_path):
    cache = read(small_model())
    gc.collect()
    with pytest.warns(UserWarning, match="without the fingerprint"):
        cache.save_pretrained(tmp_path)


def test_a_failed_save_leaves_the_last_state(saved, monkeypatch):
    model, cache, folder = saved
    later = cache.clone()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=later)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        later.save_pretrained(folder)
    monkeypatch.undo()
    assert StateBankCache.from_pretrained(folder).get_seq_length() == cache.get_seq_length()
    assert not list(folder.glob(".*"))


def test_saving_again_replaces_the_state_and_leaves_nothing_behind(saved):
    model, cache, folder = saved
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    cache.save_pretrained(folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert StateBankCache.from_pretrained(folder).get_seq_length() == 63


def test_an_empty_cache_cannot_be_saved_and_a_file_is_no_folder(saved, tmp_path):
    model, cache, _ = saved
    with pytest.raises(ValueError, match="empty cache"):
        StateBankCache(config=model.config).save_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        cache.save_pretrained(tmp_path / "file")


def test_copies_and_pickles_continue_alike(saved):
    model, cache, _ = saved
    ids = torch.tensor([[7, 8, 9]])
    copies = [cache.clone(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        for one in copies:
            assert torch.equal(model(ids, past_key_values=one).logits, expected)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_what_was_read_in_inference_mode_goes_on_outside_of_it(is_loaded, tmp_path):
    model = small_model()
    ids = torch.randint(0, 50, (1, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[:, 62:]
        model(ids[:, :61]).past_key_values.save_pretrained(tmp_path)
    # Of a loaded state only the working copies, which are made at its first use, stem from there.
    cache = StateBankCache.from_pretrained(tmp_path) if is_loaded else StateBankCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, cache.get_seq_length() : 62], past_key_values=cache)
    with torch.no_grad():
        found = [model(part, past_key_values=cache).logits for part in ids[:, 62:].split(9, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_what_is_recorded_is_counted_moved_and_detached_with_the_rest():
    model = small_model()
    ids = torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(1))
    cache = StateBankCache(config=model.config)
    model(ids, past_key_values=cache)
    unrecorded = cache.nbytes
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    assert 1.5 * unrecorded < cache.nbytes < 2.5 * unrecorded
    cache.detach().to("meta")
    for layer in cache.layers:
        (recorded,) = {id(state): state for state, _ in layer.journal}.values()
        for tensor in (*layer.state.tensors().values(), *recorded.tensors().values()):
            assert tensor.device.type == "meta" and not tensor.requires_grad


def test_a_history_hash_can_be_extended_in_any_split_and_undone():
    ids = torch.randint(0, 50_000, (2, 40), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, dtype=torch.int64)
    whole = extend_history(nothing, ids)
    assert torch.equal(extend_history(extend_history(nothing, ids[:, :13]), ids[:, 13:]), whole)
    one_by_one = nothing
    for token in ids.split(1, dim=1):
        one_by_one = extend_history(one_by_one, token)
    assert torch.equal(one_by_one, whole)
    padded = torch.cat((torch.full((2, 5), 9), ids), dim=1)
    real = torch.arange(45).expand(2, 45) >= 5
    assert torch.equal(extend_history(nothing, padded, real), whole)
    assert torch.equal(extend_history(nothing, ids.int()), whole)
    assert shorten_history(whole[0], ids[0, 30:]) == extend_history(nothing, ids[:, :30])[0]
    assert extend_history(nothing, ids.flip(1)).ne(whole).all()


@given(st.lists(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=30), max_size=9))
def test_columns_are_taken_back_exactly_over_three_segments_with_any_padding(calls):
    row, mask, segment_length = RowState(), [], 3
    for call in calls:
        row.seen += sum(call)
        row.feed(len(call), tuple(index for index, is_real in enumerate(call) if not is_real), segment_length)
        mask += call
    assert len(row.pads) <= 3 * segment_length + 1
    for count in range(len(mask) + 1):
        seen = sum(mask[: len(mask) - count])
        if row.seen - seen <= 3 * segment_length:
            assert row.unfed(count).seen == seen
        else:
            assert row.unfed(count).seen <= seen


def test_a_refused_generation_leaves_the_memory_as_it_was():
    model, ids = small_model(), torch.arange(2, 22)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    before = cache.clone()
    with pytest.raises(ValueError, match="at least one new token"):
        model.generate(ids.repeat(3, 1), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="as many"):
        model.generate(ids.repeat(3, 1), past_key_values=StateBankCache.stack([cache, cache]), max_new_tokens=2)
    assert len(cache.rows) == 1
    for state, old in zip(cache.states, before.states, strict=True):
        assert all(torch.equal(tensor, old.tensors()[name]) for name, tensor in state.tensors().items())
    more = torch.cat((ids.repeat(3, 1), torch.tensor([[3], [4], [5]])), dim=1)
    assert model.generate(more, past_key_values=cache, max_new_tokens=2).shape == (3, 23) and len(cache.rows) == 3


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen3Config()])
def test_a_cache_for_another_kind_of_model_is_refused(config):
    with pytest.raises(ValueError, match=type(config).__name__):
        StateBankCache(config=config)


@pytest.mark.parametrize("repeats", [0, -1])
def test_rows_cannot_be_repeated_less_than_once(saved, repeats):
    _, cache, _ = saved
    with pytest.raises(ValueError, match="repeats"):
        cache.batch_repeat_interleave(repeats)
    assert len(cache.rows) == 1


def test_caches_on_several_devices_are_not_stacked():
    model = small_model()
    with pytest.raises(ValueError, match="move one with `to`"):
        StateBankCache.stack([read(model), read(model).to("meta")])


def test_a_memory_is_moved_to_devices_only():
    cache = read(small_model())
    before = cache.clone()
    with pytest.raises(ValueError, match="takes a device, but was given torch.float64"):
        cache.to(torch.float64)
    assert all(a.dtype == b.dtype for a, b in zip(_tensors(cache), _tensors(before), strict=True))
    # As torch has it, and as what offloads a model asks.
    assert cache.to(None) is cache
    assert {tensor.device.type for tensor in _tensors(cache.to(torch.device("meta")))} == {"meta"}


def _tensors(cache: StateBankCache) -> list[torch.Tensor]:
    return [tensor for state in cache.states for tensor in state.tensors().values()]


def test_a_memory_may_be_in_a_folder_within_a_folder(saved):
    _, cache, folder = saved
    loaded = StateBankCache.from_pretrained(folder.parent, subfolder=folder.name)
    assert loaded.tokens() == cache.tokens()
    with pytest.raises(ValueError, match="elsewhere' has no state_bank.json"):
        StateBankCache.from_pretrained(folder.parent, subfolder="elsewhere")


def test_caches_stacked_know_the_weights_that_any_of_them_knows(saved):
    model, cache, folder = saved
    unknown, loaded = read(small_model(seed=5)), StateBankCache.from_pretrained(folder)
    gc.collect()
    assert unknown.weights_fingerprint is None
    stacked = StateBankCache.stack([unknown, loaded])
    assert stacked.weights_fingerprint == loaded.weights_fingerprint == cache.weights_fingerprint
    other = small_model(seed=6)
    with pytest.raises(ValueError, match="different weights"):
        StateBankCache.stack([unknown, loaded, read(other)])


def test_a_memory_that_is_reset_is_of_no_weights(saved):
    cache, other = StateBankCache.from_pretrained(saved[2]), small_model(seed=6)
    cache.reset()
    with torch.no_grad():
        other(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert cache.weights_fingerprint == fingerprint_weights(other.model)
    del other
    gc.collect()
    assert cache.weights_fingerprint is None
