"""Measurements in blocks are those of one pass, and the controls are what their names say."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from modeling_bwr_dnc import BwrDncConfig, BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.evaluation.measuring import (
    measure_depths,
    measure_lengths,
    measure_loss,
    measure_pairs_and_slots,
    predicted_answers,
    task_accuracy,
    token_losses,
)
from modeling_bwr_dnc.evaluation.policies import CONTROLS, PINNED, POLICIES, policy_settings
from modeling_bwr_dnc.evaluation.recall import shared_out
from modeling_bwr_dnc.settings import settings_changed
from modeling_bwr_dnc.tasks import IGNORED, Copy, Lookup, Needle


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BwrDncConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        segment_length=4,
        num_sink_tokens=2,
        memory_slots=[8, 4, 2],
        initializer_range=0.3,
    )
    model = BwrDncForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(0, 60, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block_length", [1, 7, 64, 1000])
def test_losses_in_blocks_are_those_of_one_pass(model, input_ids, block_length):
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(model, input_ids, block_length), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block_length", [5, 1000])
def test_answers_are_greedy(model, block_length):
    """The most likely token, after the true ones, at the labelled places and nowhere else."""
    input_ids, labels = map(
        torch.from_numpy, Lookup(length=70, vocab_size=60, num_pairs=6, num_queries=3).batch([0, 1])
    )
    with torch.no_grad():
        best = model(input_ids, use_cache=False).logits.argmax(-1)
    answers = predicted_answers(model, input_ids, labels, block_length)
    for row in range(2):
        places = [place for place in range(70) if labels[row, place] != IGNORED]
        assert answers[row] == [best[row, place - 1].item() for place in places] and len(places) == 3


def test_accuracy_counts_answers(model, monkeypatch):
    """Three answers of one token in a lookup, one of many in a copy; a wrong token spoils its answer only."""

    def almost_right(model, input_ids, labels):
        answers = [row[row != IGNORED].tolist() for row in labels]
        answers[0][0] += 1
        return answers

    monkeypatch.setattr("modeling_bwr_dnc.evaluation.measuring.predicted_answers", almost_right)
    lookup = task_accuracy(model, Lookup(length=70, num_pairs=6, num_queries=3), num_rows=2)
    assert lookup == {"exact": pytest.approx(5 / 6), "token": pytest.approx(5 / 6), "answers": 6}
    copy = task_accuracy(model, Copy(length=22), num_rows=2)
    assert copy == {"exact": 0.5, "token": pytest.approx(19 / 20), "answers": 2}


def held_positions(model, input_ids, policy):
    """Source positions of the slots of layer 0, head 0 after reading."""
    with settings_changed(model, **policy_settings(model, policy, input_ids.shape[1])), torch.no_grad():
        cache = StateBankCache(config=model.config)
        model(input_ids, past_key_values=cache)
        slots = [slot for slot in cache.tokens() if slot["layer"] == 0 and slot["head"] == 0]
        return [position for slot in slots for position in slot["positions"]], len(slots)


def test_controls_hold_what_they_say(model, input_ids):
    row = input_ids[:1, :64]
    # 64 tokens read: the window is the last two segments of 4, the sinks the first two tokens.
    everything = list(range(2, 56))
    assert held_positions(model, row, "full") == (everything, len(everything))
    assert held_positions(model, row, "window") == ([], 0)
    assert held_positions(model, row, "equal_slot_window") == (list(range(42, 56)), 14)
    kept, count = held_positions(model, row, "random")
    assert count == 14 and set(kept) < set(everything) and kept != held_positions(model, row, "memory")[0]
    assert held_positions(model, row, "memory")[1] == 14
    assert held_positions(model, row, "raw")[1] == 14
    assert policy_settings(model, "raw", 64) == {"memory_slots": [14, 0, 0]}


def test_slots_are_shared_out_in_the_proportions_of_others():
    assert shared_out(192, [512, 160, 96]) == [128, 40, 24]
    assert shared_out(14, [16, 8, 4]) == [8, 4, 2]
    assert shared_out(13, [16, 8, 4]) == [9, 3, 1]
    assert shared_out(192, [768, 0, 0]) == shared_out(192, [0, 0, 0]) == [192, 0, 0]


@pytest.mark.parametrize("shares", [None, [0.5, 1.5]])
def test_full_attention_is_a_model_whose_slots_never_overflow(model, input_ids, shares):
    model.config.slot_shares = shares
    with settings_changed(model, **policy_settings(model, "full", 70)):
        losses = token_losses(model, input_ids)
    with settings_changed(model, segment_length=128, slot_shares=None):
        expected = token_losses(model, input_ids)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


def test_controls_pay_no_more_attention_to_what_is_salient(model):
    for policy in set(POLICIES) - {PINNED}:
        boosted = policy_settings(model, policy, 70).get("attention_boost", "as it is")
        by_salience = policy in ("memory", "full", "window", "raw", "score:salience")
        assert boosted == ("as it is" if by_salience else 0.0), policy


def test_settings_come_back_after_an_error(model):
    before = model.config.to_dict()
    with pytest.raises(RuntimeError), settings_changed(model, memory_slots=[1, 0, 0], use_memory=False):
        assert model.config.memory_slots == [1, 0, 0]
        raise RuntimeError
    assert model.config.to_dict() == before


def test_slots_shared_out_are_equalled_on_average(model, input_ids):
    with settings_changed(model, slot_shares=[3.0, 1.0]):
        settings = policy_settings(model, "equal_slot_window", 70)
    assert settings["memory_slots"] == [28, 0, 0] and settings["slot_shares"] is None


def test_full_attention_without_a_length_to_run_at_is_left_out(model, input_ids):
    records = list(measure_loss(model, input_ids, ["full", "window"], [0, 32], full_limit=0))
    assert {record["policy"] for record in records} == {"window"}


@pytest.mark.parametrize("policy", ["equal_slot_window", "random", "score:attention"])
def test_salience_has_no_say_in_what_does_not_keep_by_it(model, input_ids, policy):
    losses = []
    for weight in (0.0, 1.0):
        changed = copy.deepcopy(model)
        for layer in changed.model.layers:
            torch.nn.init.constant_(layer.self_attn.memory.salience.weight, weight)
        with settings_changed(changed, **policy_settings(changed, policy, 70)):
            losses.append(token_losses(changed, input_ids))
    assert torch.equal(*losses)


def test_every_policy_runs_and_an_unknown_one_is_refused(model, input_ids):
    policies = [policy for policy in POLICIES if policy != PINNED]
    losses = {policy: next(measure_loss(model, input_ids, [policy], [0]))["loss"] for policy in policies}
    assert len({round(loss, 6) for name, loss in losses.items() if name in CONTROLS}) == len(CONTROLS)
    with pytest.raises(ValueError, match="the policy is 'best'"):
        policy_settings(model, "best", 10)
    with pytest.raises(ValueError, match="where answers stand"):
        next(measure_loss(model, input_ids, [PINNED], [0]))


def test_measurements_have_a_record_per_point(model, input_ids):
    loss = measure_loss(model, input_ids, ["memory", "full"], [0, 16, 32], full_limit=20)
    assert [(r["policy"], r["start"], r["stop"], r["tokens"]) for r in loss] == [
        ("memory", 0, 16, 30),
        ("memory", 16, 32, 32),
        ("memory", 32, 70, 76),
        ("full", 0, 16, 30),
        ("full", 16, 20, 8),
    ]
    lookup = Lookup(length=40, vocab_size=60, num_pairs=4, num_queries=2)
    lengths = measure_lengths(model, lookup, ["memory", "full"], [40, 60], num_rows=2, full_limit=40)
    assert [(r["policy"], r["length"]) for r in lengths] == [("memory", 40), ("memory", 60), ("full", 40)]
    depths = measure_depths(model, Needle(vocab_size=60), ["window"], [30], [0.0, 1.0], num_rows=2)
    assert [(r["length"], r["depth"]) for r in depths] == [(30, 0.0), (30, 1.0)]
    grid = measure_pairs_and_slots(model, lookup, ["memory"], [2, 4], [4, 8], num_rows=1)
    assert [(r["slots"], r["pairs"]) for r in grid] == [(4, 2), (4, 4), (8, 2), (8, 4)]


def test_slots_of_the_grid_are_those_measured(model, monkeypatch):
    seen = []

    def note(model, task, num_rows, **options):
        seen.append((list(model.config.memory_slots), task.num_pairs))
        return {"exact": 0.0, "token": 0.0, "answers": 1}

    monkeypatch.setattr("modeling_bwr_dnc.evaluation.measuring.task_accuracy", note)
    task = dataclasses.replace(Lookup(length=60, vocab_size=60), num_pairs=8)
    list(measure_pairs_and_slots(model, task, ["memory", "equal_slot_window"], [8], [4, 16], num_rows=1))
    assert seen == [([4, 0, 0], 8), ([4, 0, 0], 8), ([16, 0, 0], 8), ([16, 0, 0], 8)]


@pytest.mark.parametrize("changes", [{"depths": [0.5, 1.5]}, {"lengths": [30, 4]}, {"policies": ["window", "best"]}])
def test_a_point_that_cannot_be_is_refused_before_any_is_measured(model, monkeypatch, changes):
    monkeypatch.setattr("modeling_bwr_dnc.evaluation.measuring.task_accuracy", lambda *_: pytest.fail("measured"))
    asked = {"policies": ["window"], "lengths": [30], "depths": [0.5]} | changes
    with pytest.raises(ValueError, match="1.5|at least|best"):
        next(measure_depths(model, Needle(vocab_size=60), **asked, num_rows=1))
