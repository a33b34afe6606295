"""Training compressors lowers the loss of the text it is given, and nothing else of the model changes."""

import pytest
import torch

from modeling_bwr_dnc.evaluation.measuring import token_losses
from modeling_bwr_dnc.memory_parameters import memory_in_float32
from modeling_bwr_dnc.retrofit import fit_compressor
from modeling_bwr_dnc.retrofit.compressor import _add_gradients
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


def test_a_share_of_the_way_is_gone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_compressor(model, [periodic(0)], num_steps=3, **SMALL)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(before)
    fit_compressor(model, [periodic(0)], num_steps=3, share=0.25, **SMALL)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.25 * (whole[name] - before[name]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_slots": (64, 0, 0)}, "without a compressed level"),
        ({"memory_slots": (4, 8, -4)}, "memory_slots"),
        ({"segment_length": 0}, "segment_length"),
        ({"length": 40}, "must be longer"),
        ({"length": 5000}, "no longer than the texts"),
    ],
)
def test_what_cannot_be_trained_is_refused(model, changes, words):
    with pytest.raises(ValueError, match=words):
        fit_compressor(model, [periodic(0)], **SMALL | changes)


def test_compressors_in_half_precision_are_refused_until_they_are_wider(model):
    model.half()
    with pytest.raises(ValueError, match="compressors are in torch.float16"):
        fit_compressor(model, [periodic(0)], num_steps=2, **SMALL)
    memory_in_float32(model)
    fit_compressor(model, [periodic(0)], num_steps=2, **SMALL)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_compressors_that_diverge_are_left_as_they_were_last(model):
    with pytest.raises(ValueError, match="lower the learning rate, now 1e\\+200"):
        fit_compressor(model, [periodic(0)], num_steps=40, learning_rate=1e200, **SMALL)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_model_without_banks_has_no_compressor():
    model = tiny_model(tiny_config(layer_types=["sink_window_attention"] * 2))
    with pytest.raises(ValueError, match="no compressor"):
        fit_compressor(model, [periodic(0)], **SMALL)


def test_the_gradients_are_those_of_weighted_prose_and_answers(model):
    text, answers = periodic(1)[:100], [([5, 6, 7], [8, 9]), ([10, 11], [12])]
    weights = [0.0] * 60 + [1.0] * 30 + [4.0] * 10
    said = _add_gradients(model, text, weights, answers, 0.25)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ids = torch.tensor([text + [5, 6, 7, 8, 9, 10, 11, 12]])
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    prose = (losses[:99] * torch.tensor(weights[1:])).sum() / sum(weights)
    (prose + 0.25 * losses[[102, 103, 106]].mean()).backward()
    assert said == pytest.approx(prose.item(), rel=1e-5)
    wanted = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_facts_are_hidden_and_asked_for(tokenizer, manual, monkeypatch):
    config = tiny_config(vocab_size=50_000, segment_length=16, memory_slots=[8, 16, 16])
    model, seen = tiny_model(config), []

    def spy(model, text, weights, answers, answer_weight):
        seen.append((text, weights, answers))
        return _add_gradients(model, text, weights, answers, answer_weight)

    monkeypatch.setattr("modeling_bwr_dnc.retrofit.compressor._add_gradients", spy)
    options = SMALL | {"fact_share": 0.5, "gap": (20, 60), "tokenizer": tokenizer}
    fit_compressor(model, [manual[:5000]], seed=1, num_steps=8, **options)
    assert {bool(answers) for _, _, answers in seen} == {True, False}
    for text, weights, answers in seen:
        assert len(text) == len(weights) and not any(weights[: 2 + 26 + 32])
        assert (len(text) > LENGTH) == bool(answers) and weights.count(1.0) <= LENGTH
        for _, answer in answers:
            words = tokenizer.decode(answer)
            assert words in tokenizer.decode([t for t, weight in zip(text, weights, strict=True) if not weight])
