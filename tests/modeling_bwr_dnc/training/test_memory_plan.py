import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.training.memory_plan import (
    PARTS,
    TrainingSetting,
    _loading,
    _simulate,
    highest,
    largest_length,
    measure_memory,
    model_config,
    optimizer_bytes,
    plan_memory,
    ways_to_save,
)
from scripts.plan_memory import parse_size

SMALL = {"vocab_size": 512, "num_hidden_layers": 1, "layer_types": ["state_bank_attention"]}
SETTING = TrainingSetting("bwr-dnc-tiny", SMALL, sequence_length=128)


def test_weights_gradients_and_states_are_counted_exactly():
    plan = plan_memory(SETTING, libraries=7)
    size = sum(parameter.numel() * 4 for parameter in BwrDncForCausalLM(model_config(SETTING)).parameters())
    assert set(plan.parts) == set(PARTS) and plan.parts["libraries"] == 7
    assert size <= plan.parts["weights"] <= size + 1000  # and the frequencies of RoPE
    assert plan.parts["optimizer"] >= 2 * size
    assert plan.parts["activations"] > 0


def test_what_repeats_is_extrapolated():
    kinds = ["sink_window_attention", "state_bank_attention"] * 4
    setting = replace(SETTING, model_settings=SMALL | {"num_hidden_layers": 8, "layer_types": kinds})
    whole = sum(highest(_simulate(setting)).values())
    planned = plan_memory(setting, libraries=0)
    assert planned.total - planned.parts["allocator"] == pytest.approx(whole, rel=0.05)


def test_less_is_less():
    full = plan_memory(SETTING, 0).total
    assert plan_memory(replace(SETTING, sequence_length=256), 0).total > full
    assert plan_memory(replace(SETTING, method="lora"), 0).total < full
    long = replace(SETTING, sequence_length=4096, span_length=64)
    assert plan_memory(long, 0).total == plan_memory(replace(long, sequence_length=65536), 0).total


def test_a_quantised_base_is_small_in_the_step_and_large_while_it_loads():
    wide = replace(SETTING, method="qlora", model_settings=SMALL | {"intermediate_size": 1024})
    nf4, int8 = (highest(_simulate(replace(wide, quantization=kind))) for kind in ("nf4", "int8"))
    assert nf4["weights"] < int8["weights"] < _loading(wide)["weights"]
    # The inputs of its linear maps outlive checkpointing.
    assert int8["activations"] > nf4["activations"]


def test_eight_bit_states_spare_embeddings_and_memory():
    matrix = torch.empty(100, 100, device="meta")
    assert optimizer_bytes("model.layers.0.mlp.up_proj.weight", matrix, "adamw_bnb_8bit").states == 20_313
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.memory.salience.weight"):
        assert optimizer_bytes(name, matrix, "adamw_bnb_8bit").states == 80_000


def test_the_longest_that_fits_fits_and_the_next_does_not():
    size = plan_memory(replace(SETTING, sequence_length=512), 0).total + 1
    length, plan = largest_length(SETTING, size, libraries=0)
    assert length == 512 and plan.total <= size
    assert largest_length(SETTING, 1000, libraries=0) is None


def test_ways_to_save_go_from_the_given_setting_to_smaller_ones():
    long = replace(SETTING, sequence_length=2048, gradient_checkpointing=False)
    ways = ways_to_save(long)
    assert [ways[how] == long for how in ways] == [True] + [False] * 4
    assert [way.optimizer_in_backward for way in ways.values()] == [False, False, False, True, False]
    assert list(ways.values())[-1].span_length == 1024
    assert list(ways_to_save(replace(SETTING, method="lora", span_length=64))) == ["as given"]


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30), ("100", 100)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "settings", [{"method": "prefix"}, {"optimizer": "adam"}, {"model": "nowhere"}, {"sequence_length": 0}]
)
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError):
        plan_memory(replace(SETTING, **settings), 0)


def test_a_folder_is_measured_wherever_it_was_named(tmp_path, monkeypatch):
    def take_steps(command, cwd, **options):
        (described,) = (json.loads(part) for part in command if part.startswith("{"))
        assert Path(cwd, described["model"]) == tmp_path / "model"
        return subprocess.CompletedProcess(command, 0, '{"peak": 1}')

    model_config(SETTING).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", take_steps)
    assert measure_memory(replace(SETTING, model="model")) == {"peak": 1}


@pytest.mark.slow
def test_the_plan_is_within_a_tenth_of_what_real_steps_need():
    shape = {"memory_slots": [128, 64, 32], "segment_length": 128, "num_hidden_layers": 3, "layer_types": None}
    shape["layer_types"] = ["sink_window_attention"] * 2 + ["state_bank_attention"]
    setting = TrainingSetting("bwr-dnc-60m", shape, sequence_length=512)
    for settings in ({}, {"gradient_checkpointing": False}, {"method": "lora"}, {"method": "qlora"}):
        case = replace(setting, **settings)
        assert plan_memory(case).total == pytest.approx(measure_memory(case)["peak"], rel=0.1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length():
    setting = replace(SETTING, sequence_length=4096, span_length=512, gradient_checkpointing=False)
    short, long = (measure_memory(replace(setting, sequence_length=length), 1)["peak"] for length in (4096, 65536))
    assert long < 1.1 * short
