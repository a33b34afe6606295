"""`scripts.train_task` trains all kinds alike, measures them, and leaves models that `scripts.evaluate` knows how to ask."""

import json

import torch

from modeling_bwr_dnc import BwrDncForCausalLM
from scripts import evaluate, train_task

QUICK = "--steps 2 --tokens-per-batch 128 --rows 1 --option num_pairs=4 num_queries=2 --length 64".split()


def test_trains_measures_and_leaves_models(call, tmp_path):
    output = tmp_path / "runs"
    arguments = ["--output", output, *QUICK, "--lengths", 64, 128, "--pairs", 8, "--seeds", 0, 1]
    arguments += ["--models", "memory", "full", "--setting", "hidden_size=16", "intermediate_size=16"]
    code, printed, errors = call(train_task, *arguments)
    assert code == 0, errors
    assert "memory, seed 0" in printed
    results = json.loads((output / "results.json").read_text())
    points = results["measurements"]["accuracy_by_length"]
    assert [(point["policy"], point["length"]) for point in points] == [
        (kind, length) for kind in ("memory", "full") for length in (64, 128)
    ]
    assert len(results["by_seed"]) == 12 and len(results["trainings"]) == 4
    model = BwrDncForCausalLM.from_pretrained(output / "full-1")
    assert model.config.use_cache
    assert model.config.hidden_size == 16 and model.config.memory_slots[0] > 100_000
    arguments = ["--model", output / "memory-0", "--output", tmp_path / "e", "--measures", "accuracy"]
    code, _, errors = call(evaluate, *arguments, "--lengths", 64, "--rows", 1)
    assert code == 0, errors
    assert "lookup_by_length" in json.loads((tmp_path / "e" / "results.json").read_text())["measurements"]


def test_a_run_goes_on_from_an_earlier_one(call, assert_refused, tmp_path):
    sizes = ["--models", "memory", "--lengths", 64, "--setting", "hidden_size=16", "intermediate_size=16"]
    code, _, errors = call(train_task, "--output", tmp_path / "first", *QUICK, *sizes)
    assert code == 0, errors
    onward = [*QUICK, *sizes, "num_hidden_layers=3", "--start-from", tmp_path / "first"]
    code, _, errors = call(train_task, "--output", tmp_path / "second", *onward, "--learning-rate", 1e-9)
    assert code == 0, errors
    first, second = (BwrDncForCausalLM.from_pretrained(tmp_path / run / "memory-0") for run in ("first", "second"))
    # At this rate nothing that was there has moved, and the third layer has begun at nothing.
    assert torch.allclose(first.lm_head.weight, second.lm_head.weight, atol=1e-6)
    assert second.model.layers[2].mlp.down_proj.weight.abs().max() < 1e-6
    assert_refused("no model folder at", train_task, "--output", tmp_path / "third", *onward, "--seeds", 1)
    wide = ["num_hidden_layers=3" if item == "hidden_size=16" else item for item in onward]
    assert_refused("cannot go on", train_task, "--output", tmp_path / "third", *wide)
    assert not (tmp_path / "third").exists()


def test_nothing_measured_is_said(call, tmp_path):
    arguments = ["--output", tmp_path / "run", *QUICK, "--models", "full", "--lengths", 64, "--full-limit", 32]
    code, _, errors = call(train_task, *arguments, "--setting", "hidden_size=16", "intermediate_size=16")
    assert code == 0, errors
    assert "Nothing was measured" in (tmp_path / "run" / "results.md").read_text()


def test_bad_input_is_refused(assert_refused, tmp_path):
    assert_refused("`num_pairs` is 500", train_task, "--output", tmp_path, "--option", "num_pairs=500")
    assert_refused("has no setting 'pairs'", train_task, "--output", tmp_path, "--option", "pairs=5")
    assert_refused("--steps is 0", train_task, "--output", tmp_path, "--steps", 0)
    assert_refused("nothing can be written", train_task, "--output", __file__)
    assert_refused("--setting has nonsense", train_task, "--output", tmp_path, "--setting", "nonsense=1")
    assert_refused("'many'", train_task, "--output", tmp_path, "--setting", "segment_length=many")
    assert_refused("be at least 200, the ids", train_task, "--output", tmp_path, "--setting", "vocab_size=10")
    assert_refused("say --memory-slots", train_task, "--output", tmp_path, "--setting", "memory_slots=[16,0,0]")
    recall = ["--output", tmp_path / "new", "--task", "recall", "--models", "window", "--pairs", 4]
    assert_refused("has no pairs", train_task, *recall)
    passkey = ["--output", tmp_path / "new", "--task", "passkey", "--models", "window", "--length", 512]
    assert_refused("must be at least", train_task, *passkey, "--lengths", 64)
    assert_refused("`length` is 3", train_task, *recall[:-2], "--lengths", 3)
    assert not (tmp_path / "new").exists()
    assert_refused("must be KEY=VALUE", train_task, "--output", tmp_path, *QUICK, "--setting", "hidden_size")
