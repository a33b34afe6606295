"""Training compressors lowers the loss of the text it is given, and nothing else of the model changes."""

import pytest
import torch

from modeling_bwr_dnc.evaluation.measuring import token_losses
from modeling_bwr_dnc.retrofit import fit_compressor
from tests.modeling_bwr_dnc.builders import tiny_config, tiny_model

# A period longer than the window: what comes next is in the compressed slots, or nowhere.
PERIOD, LENGTH = 48, 200
SMALL = {"length": LENGTH, "segment_length": 16, "memory_slots": (2, 8, 16)}


@pytest.fixture
def model():
    return tiny_model(tiny_config(vocab_size=64, segment_length=16, memory_slots=[2, 8, 16], initializer_range=0.1))


def periodic(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (PERIOD,), generator=generator).tolist() * 10


def test_only_the_compressors_change_and_the_loss_falls(model):
    texts, losses = [periodic(0)], []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([texts[0][7 : 7 + LENGTH]])
    start = token_losses(model.eval(), ids)[:, 100:].mean()
    fit_compressor(model, texts, num_steps=60, learning_rate=1e-2, on_step=lambda *s: losses.append(s), **SMALL)
    assert [step for step, _ in losses] == list(range(60))
    assert token_losses(model, ids)[:, 100:].mean() < start - 0.05
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]) != (".compressor." in name), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.config.segment_length == 16 and model.config.memory_slots == [2, 8, 16] and not model.training


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_slots": (64, 0, 0)}, "without a compressed level"),
        ({"length": 40}, "must be longer"),
        ({"length": 5000}, "no longer than the texts"),
    ],
)
def test_what_cannot_be_trained_is_refused(model, changes, words):
    with pytest.raises(ValueError, match=words):
        fit_compressor(model, [periodic(0)], **SMALL | changes)


def test_a_model_without_banks_has_no_compressor():
    model = tiny_model(tiny_config(layer_types=["sink_window_attention"] * 2))
    with pytest.raises(ValueError, match="no compressor"):
        fit_compressor(model, [periodic(0)], **SMALL)
