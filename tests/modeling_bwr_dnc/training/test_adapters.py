from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.memory_parameters import is_memory_parameter
from modeling_bwr_dnc.peft_defaults import IA3_TARGETS, LORA_TARGETS
from modeling_bwr_dnc.training.run import add_adapter, load_base
from tests.modeling_bwr_dnc.builders import tiny_config
from tests.modeling_bwr_dnc.training.conftest import losses

CONFIG = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BwrDncForCausalLM(tiny_config(**CONFIG))


def memory_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if is_memory_parameter(name)}


@pytest.mark.parametrize(("config", "targets"), [(LoraConfig, LORA_TARGETS), (IA3Config, IA3_TARGETS)])
def test_adapters_know_their_targets_and_spare_the_memory(model, config, targets):
    adapted = get_peft_model(model, config(task_type="CAUSAL_LM"))
    assert adapted.peft_config["default"].target_modules == set(targets)
    assert not any("lora" in name or "ia3" in name for name in memory_of(adapted))


def test_an_adapter_trains_the_memory_too_and_round_trips(model, train, tmp_path, rows):
    adapted = add_adapter(model, {"r": 4})
    trainer = train(model=adapted, max_steps=2)
    found = losses(trainer)
    assert len(found) == 2 and trainer.optimizer.param_groups[-1]["lr"] == 1e-2
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or is_memory_parameter(name) for name in trainable)
    moved = [p for name, p in memory_of(adapted).items() if "modules_to_save" in name and "salience" in name]
    assert moved and all(parameter.abs().sum() > 0 for parameter in moved)

    adapted.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(BwrDncForCausalLM(tiny_config(**CONFIG)), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp4"))])
def test_a_quantised_base_keeps_the_memory_whole_and_learns(model, train, tmp_path, kind):
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", torch.float32, kind)
    # Nor does it hold the file any longer, in which the weights lie unquantised.
    assert str(tmp_path / "base") not in Path("/proc/self/maps").read_text()
    for name, parameter in base.named_parameters():
        if "_proj" in name:
            assert parameter.dtype in (torch.int8, torch.uint8), name
        else:
            assert parameter.dtype == torch.float32, name
    trainer = train(model=add_adapter(base, {"r": 4}), max_steps=4, learning_rate=1e-2, gradient_checkpointing=True)
    found = losses(trainer)
    assert found[-1] < found[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_leaves_the_gradients_through_a_quantised_base_as_they_are(model, tmp_path, kind):
    model.save_pretrained(tmp_path / "base")
    adapted, ids = add_adapter(load_base(tmp_path / "base", torch.float32, kind), {"r": 4}), torch.arange(64)[None]
    first = next(
        parameter for name, parameter in adapted.named_parameters() if "layers.0" in name and "lora_B" in name
    )

    def gradient():
        adapted.train().zero_grad()
        adapted(ids, labels=ids).loss.backward()
        return first.grad.clone()

    before = gradient()
    with torch.no_grad():
        adapted.eval()(ids)
    assert before.abs().max() > 0
    torch.testing.assert_close(gradient(), before)


def test_prefix_tuning_says_why_it_cannot_work(model):
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="StateBankCache"):
        adapted(torch.zeros((1, 8), dtype=torch.int64))
