"""The attention that salient slots gain is fitted by its true gradient, and nothing else of the model changes."""

import pytest
import torch

from modeling_bwr_dnc.blocks import read_blocks
from modeling_bwr_dnc.retrofit import fit_attention_boost
from modeling_bwr_dnc.retrofit.boost import _loss, _set_boosts, stretch_lengths
from tests.modeling_bwr_dnc.builders import tiny_config, tiny_model


@pytest.fixture
def model():
    """With random salience, of which about half is above 0."""
    config = tiny_config(
        vocab_size=50_000, segment_length=16, memory_slots=[24, 12, 6], salience_scale=0.5, attention_boost=[0.5, 1.5]
    )
    return tiny_model(config, seed=3)


def test_the_gradient_is_that_of_the_loss_as_it_is_read(model):
    model.double()
    ids = torch.randint(1, 50_000, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        *_, (_, _, memory) = read_blocks(model, torch.tensor([ids[:200]]))

    def loss_read(boosts: list[float]) -> float:
        """As decoding computes it."""
        model.config.attention_boost = boosts
        with torch.no_grad():
            logits = model(torch.tensor([ids[200:-1]]), past_key_values=memory.clone()).logits[0, -20:]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-20:])).item()

    boosts = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    _set_boosts(model, boosts)
    loss = _loss(model, memory, ids[200:], 20)
    (gradient,) = torch.autograd.grad(loss, boosts)
    assert loss.item() == pytest.approx(loss_read([0.5, 1.5]), abs=1e-5)
    step = 1e-3
    numeric = [
        (loss_read([0.5 + up, 1.5 + other]) - loss_read([0.5 - up, 1.5 - other])) / (2 * step)
        for up, other in ((step, 0.0), (0.0, step))
    ]
    assert gradient.abs().min() > 1e-4
    torch.testing.assert_close(gradient, torch.tensor(numeric, dtype=torch.float64), rtol=1e-3, atol=1e-6)


def test_only_the_boosts_change(model, tokenizer, manual):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    reads = []
    options = {"num_steps": 3, "num_stretches": 4, "num_prose": 40, "start": 1.0, "learning_rate": 0.3}
    boosts = fit_attention_boost(
        model,
        tokenizer,
        [manual[:3000], manual[3000:6000]],
        on_read=reads.append,
        on_step=lambda *s: losses.append(s),
        **options,
    )
    # Four stretches, of 1.5 to 16 times the keys that a query sees, and the facts hidden in them.
    assert sum(reads) > (1.5 + 16) * model.config.max_keys
    assert model.config.attention_boost == boosts and len(boosts) == 2
    assert all(isinstance(boost, float) and boost >= 0 and boost != 1.0 for boost in boosts)
    assert [step for step, _, _ in losses] == [0, 1, 2]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_lengths_of_stretches_are_spread_evenly_by_their_logarithms():
    assert stretch_lengths(4, [100, 2700]) == [100, 900, 300, 2700]
    assert stretch_lengths(3, [100, 900]) == [100, 900, 300]
    assert stretch_lengths(1, [100, 900]) == [100]


def test_texts_that_are_not_so_long_are_read_as_far_as_they_reach(model, tokenizer, manual):
    reads = []
    texts = [manual[:400], manual[400:900]]
    fit_attention_boost(model, tokenizer, texts, num_steps=1, num_stretches=3, num_prose=40, on_read=reads.append)
    shortest = round(1.5 * model.config.max_keys)
    # Facts come on top.
    assert shortest + 360 < sum(reads) < 2 * 360 + shortest + 3 * 12 * 40


def _interrupt(num_tokens):
    raise KeyboardInterrupt


def test_short_texts_are_refused(model, tokenizer, manual):
    with pytest.raises(ValueError, match="give longer texts"):
        fit_attention_boost(model, tokenizer, [manual[:100]])
    with pytest.raises(ValueError, match="must be above 0"):
        fit_attention_boost(model, tokenizer, [manual], start=0.0)
    with pytest.raises(KeyboardInterrupt):
        fit_attention_boost(model, tokenizer, [manual], on_read=_interrupt)
    assert model.config.attention_boost == [0.5, 1.5]


def test_a_model_that_reads_no_slots_is_refused(model, tokenizer, manual):
    model.config.use_memory = False
    with pytest.raises(ValueError, match="reads no slots"):
        fit_attention_boost(model, tokenizer, [manual])
