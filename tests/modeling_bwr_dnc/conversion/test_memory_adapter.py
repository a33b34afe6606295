"""A memory adapter carries the memory parameters and nothing else, and fits or is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_bwr_dnc.conversion import (
    adapter_budget,
    converted_config,
    load_memory_adapter,
    prove_equality,
    save_memory_adapter,
    transfer_weights,
)
from tests.tiny_sources import CONFIGS, random_source


def converted():
    source = random_source(CONFIGS["llama"])
    config = converted_config(source.config, segment_length=8, num_sink_tokens=2, memory_slots=[24, 8, 4])
    return source, transfer_weights(source, config)


def train_memory(model):
    """Give every memory parameter other values, as training would."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.fixture
def adapter(tmp_path):
    _, model = converted()
    train_memory(model)
    path = tmp_path / "adapters" / "memory.safetensors"
    save_memory_adapter(model, path)
    return path, model


def test_adapter_brings_the_trained_memory_into_another_model(adapter):
    path, trained = adapter
    _, model = converted()
    ids = torch.randint(259, (1, 120))
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, trained(ids).logits, atol=1e-3)
        names = load_memory_adapter(model, path)
        torch.testing.assert_close(model(ids).logits, trained(ids).logits)
    assert names == sorted(name for name in model.state_dict() if ".memory." in name)


def test_adapter_brings_its_second_salience_head_along(tmp_path):
    _, trained = converted()
    trained.add_secondary_salience()
    train_memory(trained)
    names = save_memory_adapter(trained, tmp_path / "adapter.safetensors")
    _, model = converted()
    assert load_memory_adapter(model, tmp_path / "adapter.safetensors") == names
    assert any("secondary_salience" in name for name in names)
    ids = torch.randint(259, (1, 120))
    model.save_pretrained(tmp_path / "model")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)


def test_adapter_holds_memory_parameters_only(adapter):
    assert all(".memory." in name for name in load_file(adapter[0]))


def test_model_with_an_adapter_still_equals_its_source_until_full(adapter):
    source, model = converted()
    load_memory_adapter(model, adapter[0])
    assert prove_equality(source, model).max_difference < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}), "no memory parameter"),
        (
            lambda tensors: tensors.update({"model.layers.9.self_attn.memory.salience.weight": torch.ones(2, 32)}),
            "layers.9",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.memory.salience.weight": torch.ones(3, 32)}),
            r"\(3, 32\)",
        ),
        (lambda tensors: tensors["model.layers.0.self_attn.memory.salience.weight"].fill_(torch.nan), "not finite"),
        (lambda tensors: tensors.clear(), "empty"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(adapter, change, message):
    path, _ = adapter
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    _, model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_memory_adapter(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unreadable_adapter_is_refused(tmp_path):
    _, model = converted()
    with pytest.raises(ValueError, match="could not be read"):
        load_memory_adapter(model, tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="could not be read"):
        load_memory_adapter(model, tmp_path / "broken.safetensors")


@pytest.mark.parametrize("slots", ["[24, 8", "[24, 8]", "24", '[24, "8", 4]', "[24, true, 4]"])
def test_slots_that_are_none_are_refused(adapter, slots):
    path, _ = adapter
    save_file(load_file(path), path, metadata={"memory_slots": slots})
    with pytest.raises(ValueError, match="three counts|is no JSON"):
        adapter_budget(path)


@pytest.mark.parametrize("shares", ["[1, ", "0.5", '[1, "2"]', "[true, 1]"])
def test_shares_that_are_none_are_refused(adapter, shares):
    path, _ = adapter
    save_file(load_file(path), path, metadata={"slot_shares": shares})
    with pytest.raises(ValueError, match="list of numbers|is no JSON"):
        adapter_budget(path)


def test_model_without_banks_has_no_adapter(tmp_path):
    source = random_source(CONFIGS["llama"])
    model = transfer_weights(source, converted_config(source.config, 8, 2, [24, 8, 4], layer_types="window"))
    with pytest.raises(ValueError, match="no memory parameters"):
        save_memory_adapter(model, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("settings", ["[]", '{"usage_weight": NaN}', '{"usage'])
def test_settings_that_are_none_are_refused_and_change_nothing(adapter, settings):
    path, model = adapter
    save_file(load_file(path), path, metadata={"settings": settings})
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="memory.safetensors has (the )?settings"):
        load_memory_adapter(model, path)
    assert model.config.to_dict() == before


def test_numbers_that_are_not_finite_do_not_replace_an_adapter(adapter):
    path, model = adapter
    before = path.read_bytes()
    model.model.layers[0].self_attn.memory.routing.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="routing.weight' .* not finite"):
        save_memory_adapter(model, path)
    assert path.read_bytes() == before
