"""Small models learn from scratch, reproducibly, from short rows to long ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.blocks import read_blocks
from modeling_bwr_dnc.evaluation.measuring import task_accuracy
from modeling_bwr_dnc.tasks import Copy, Lookup, Story
from modeling_bwr_dnc.tasks.stories import IDS
from modeling_bwr_dnc.token_loss import IGNORED
from modeling_bwr_dnc.training.learning import ABLATIONS, MODEL_KINDS, grown, learn, slow_gates, small_config
from modeling_bwr_dnc.training.stages import Stage, Stages, staged

TASK = Lookup(length=64, vocab_size=44, num_pairs=4, num_queries=2)


def test_kinds_have_the_same_parameters():
    models = [BwrDncForCausalLM(small_config(kind, Lookup())) for kind in MODEL_KINDS[:4]]
    shapes = [{name: parameter.shape for name, parameter in model.named_parameters()} for model in models]
    assert shapes == shapes[:1] * 4 and 1e5 < models[0].num_parameters() < 5e5
    assert models[1].config.lossless_length > 500_000
    assert not models[2].config.use_memory
    assert sum(models[3].config.memory_slots) == sum(models[0].config.memory_slots)
    with pytest.raises(ValueError, match="`kind` is 'infinite'"):
        small_config("infinite", TASK)


def test_an_equal_slot_window_sees_the_most_recent_tokens():
    torch.manual_seed(0)
    model = BwrDncForCausalLM(small_config("equal_slot_window", TASK, num_hidden_layers=1)).eval()
    for memory in (layer.self_attn.memory for layer in model.model.layers):
        torch.nn.init.normal_(memory.salience.weight)
    row = torch.randint(model.config.vocab_size, (1, 192))
    # Before the window of 32 tokens 56 slots; a token is also seen by the two after it, through the convolution.
    first = 192 - 32 - 56
    with torch.no_grad():
        before = model(row).logits[:, -1]
        changed = [
            model(torch.cat((row[:, :i], 1 - row[:, i : i + 1].clamp(max=1), row[:, i + 1 :]), dim=1))
            for i in (first - 3, first)
        ]
    assert torch.equal(changed[0].logits[:, -1], before)
    assert not torch.allclose(changed[1].logits[:, -1], before)


@pytest.mark.parametrize("kind", ["mamba2", "gated_deltanet"])
def test_recurrent_models_learn_like_ours_and_carry_their_state_from_block_to_block(kind):
    config = small_config(kind, TASK, hidden_size=64)
    learned = learn(config, staged(TASK, 32), num_steps=3, tokens_per_batch=128)
    row = torch.tensor([TASK.row(0)["input_ids"]])
    (whole,) = (hidden for _, hidden, _ in read_blocks(learned.model, row))
    blocks = torch.cat([hidden for _, hidden, _ in read_blocks(learned.model, row, block_length=24)], dim=1)
    assert 1e5 < learned.model.num_parameters() < 3e5
    assert torch.allclose(blocks, whole, atol=1e-4)
    alone = torch.cat(
        [hidden for part in row.split(24, 1) for _, hidden, _ in read_blocks(learned.model, part)], dim=1
    )
    assert not torch.allclose(alone, whole, atol=1e-2)


def test_gated_deltanet_starts_without_forgetting_everything_at_once():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("gated_deltanet", TASK))
    layers = [layer.linear_attn for layer in model.model.layers]
    kept = [(-layer.A_log.exp() * F.softplus(layer.dt_bias)).exp() for layer in layers]  # of the state, by a token
    slow_gates(model)
    kept_now = [(-layer.A_log.exp() * F.softplus(layer.dt_bias)).exp() for layer in layers]
    assert torch.cat(kept).median() < 0.01 and torch.cat(kept_now).median() > 0.8
    for layer in layers:
        assert ((F.softplus(layer.dt_bias) > 0.00099) & (F.softplus(layer.dt_bias) < 0.101)).all()


def test_ablations_change_one_thing_each():
    whole = small_config("memory", TASK).to_dict()
    changed = {
        kind: {name for name, value in small_config(kind, TASK).to_dict().items() if value != whole[name]}
        for kind in ABLATIONS
    }
    assert changed == {
        "no_salience": {"use_salience", "usage_weight"},
        "with_usage": {"usage_weight"},
        "no_routing": {"use_routing"},
        "no_compression": {"memory_slots"},
        "mean_compressor": {"use_learned_compressor"},
        "no_noise": set(),
    }
    assert sum(small_config("no_compression", TASK).memory_slots) == sum(whole["memory_slots"])


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_seed_gives_one_model_and_training_moves_the_memory():
    def train(seed):
        config = small_config("memory", TASK, [4, 2, 2], hidden_size=32, intermediate_size=32, segment_length=8)
        return learn(config, staged(TASK, 32), num_steps=6, seed=seed, tokens_per_batch=128)

    first, second, other = train(0), train(0), train(1)
    assert torch.equal(weights(first.model), weights(second.model))
    assert not torch.equal(weights(first.model), weights(other.model))
    salience = [p for name, p in first.model.named_parameters() if ".memory.salience" in name]
    assert all(bool(parameter.any()) for parameter in salience)


def test_a_model_grows_without_changing_what_it_says():
    small = learn(
        small_config("memory", TASK, [4, 2, 2], hidden_size=32, intermediate_size=32, segment_length=8),
        staged(TASK, 32),
        num_steps=4,
        tokens_per_batch=128,
    ).model
    config = small_config(
        "memory", TASK, [8, 0, 0], hidden_size=32, intermediate_size=32, segment_length=8, num_hidden_layers=4
    )
    model, row = grown(config, small).eval(), torch.tensor([TASK.row(0)["input_ids"][:24]])
    with torch.no_grad():
        # All of it is still in the window: the slots, which differ, have no say.
        assert torch.equal(model(row[:, :16]).logits, small(row[:, :16]).logits)
    learned = learn(config, staged(TASK, 32), num_steps=2, tokens_per_batch=128, start=small)
    assert learned.model.model.layers[3].self_attn.o_proj.weight.any()
    with pytest.raises(ValueError, match="cannot go on"):
        grown(small_config("memory", TASK, hidden_size=48, intermediate_size=32), small)
    with pytest.raises(ValueError, match="cannot go on"):
        grown(small_config("mamba2", TASK), small)
    for changed in (
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ):
        with pytest.raises(ValueError, match="cannot go on"):
            grown(small_config("memory", TASK, hidden_size=32, intermediate_size=32, **changed), small)
    with pytest.raises(ValueError, match="layers.1"):
        grown(small_config("memory", TASK, hidden_size=32, intermediate_size=32, num_hidden_layers=1), small)


def test_measuring_on_the_way_and_stopping_early():
    accuracies = iter([0.1, 0.6, 0.9])
    config = small_config("window", TASK, hidden_size=16, intermediate_size=16)
    learned = learn(
        config,
        Stages([Stage(TASK, 1.0)]),
        num_steps=20,
        tokens_per_batch=64,
        measure=lambda model: next(accuracies),
        measure_every=2,
        stop_at=0.5,
    )
    assert [(point["step"], point["accuracy"]) for point in learned.curve] == [(2, 0.1), (4, 0.6)]


def test_a_stage_that_is_learned_makes_way():
    config = small_config("window", TASK, hidden_size=16, intermediate_size=16)
    stages = Stages([Stage(TASK, 0.9, learned_at=0.0), Stage(TASK, 0.95, learned_at=1.1), Stage(TASK, 1.0)])
    learn(config, stages, num_steps=8, tokens_per_batch=64, adapt_every=2)
    assert stages.hardest == 1
    learn(config, stages, num_steps=6, tokens_per_batch=64, adapt_every=None)
    assert stages.hardest == 0


def test_it_learns():
    """Two seconds teach to repeat two of four symbols that only the bank still holds: by chance 0.25 would be right."""
    task = Copy(length=12, vocab_size=12, num_symbols=2)
    config = small_config(
        "memory", task, [8, 0, 0], segment_length=4, num_sink_tokens=0, hidden_size=32, intermediate_size=32
    )
    learned = learn(config, Stages([Stage(task, 1.0)]), num_steps=80, tokens_per_batch=768, learning_rate=1e-2)
    unseen = Copy(length=12, vocab_size=12, num_symbols=2, seed=10_000)
    assert task_accuracy(learned.model, unseen, 64, batch_size=64)["token"] > 0.6


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("memory", {"num_hidden_layers": 1}), ("mamba2", {"num_hidden_layers": 1, "hidden_size": 32, "num_heads": 4})],
)
def test_lessons_are_learned_beside_the_answers(kind, settings):
    """The same rows and answers: only with lessons does a model say, behind a sentence about a thing, what its actor holds."""
    task = Story(hops=2, length=32, num_facts=4, num_arrivals=2, num_takings=2, num_queries=2, num_easier=2)
    config = small_config(kind, task, **settings)
    answers_alone, with_lessons = (
        learn(config, Stages([Stage(task, 1.0, lesson_weight=weight)]), num_steps=50, tokens_per_batch=512)
        for weight in (0.0, 1.0)
    )
    unseen = Stage(replace(task, seed=10_000), 1.0, lesson_weight=1.0).batch(range(64), np.random.default_rng(0))
    ids, labels = torch.tensor(unseen["input_ids"]), torch.tensor(unseen["labels"])
    ends = (labels[:, 8:16] != IGNORED) & (ids[:, 8:16] == IDS["."])  # of the takings
    right = [
        (learned.model(ids).logits[:, 7:15].argmax(-1) == labels[:, 8:16])[ends].float().mean()
        for learned in (answers_alone, with_lessons)
    ]
    assert right[0] < 0.3 and right[1] > 0.8


@pytest.mark.slow
def test_recall_far_beyond_the_training_length():
    """As an early prototype did: trained on at most 256 tokens, with 56 slots, right at 2,048."""
    task = Lookup(length=256)
    learned = learn(small_config("memory", task), staged(task))
    for length in (256, 2048):
        unseen = Lookup(length=length, seed=10_000)
        assert task_accuracy(learned.model, unseen, 16)["exact"] > 0.99
