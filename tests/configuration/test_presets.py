"""Every preset loads, says only what the configuration knows, and has the size it promises."""

import dataclasses
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc.presets import list_presets, preset_path, tokenizer_path
from modeling_bwr_dnc.training.recipe import read_recipe
from modeling_bwr_dnc.training.run import new_model, training_arguments

ROOT = Path(__file__).parents[2]
TARGETS = {
    "bwr-dnc-32m": 32_000_000,
    "bwr-dnc-60m": 59_167_232,
    "bwr-dnc-120m": 120_000_000,
    "bwr-dnc-200m": 200_000_000,
    "bwr-dnc-500m": 590_275_585,
    "bwr-dnc-1b": 1_190_000_000,
}
SLOTS = {"bwr-dnc-tiny": [32, 16, 8], "bwr-dnc-500m": [4096, 2048, 1024], "bwr-dnc-1b": [2048, 1024, 512]}


def unknown_keys(preset: dict) -> set[str]:
    fields = {field.name for field in dataclasses.fields(BwrDncConfig)}
    return set(preset) - fields - {"model_type"}


def read_preset(name: str) -> dict:
    return json.loads((preset_path(name) / "config.json").read_text())


def count_parameters(name: str) -> tuple[int, int]:
    """All parameters of a preset, and those of its memory, counted without allocating any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(preset_path(name)))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if ".memory." in name)


def test_all_presets_are_listed():
    assert list_presets() == sorted([*TARGETS, "bwr-dnc-tiny"])


@pytest.mark.parametrize("name", list_presets())
def test_preset_loads_with_its_promises(name):
    config = AutoConfig.from_pretrained(preset_path(name))
    assert isinstance(config, BwrDncConfig)
    assert config.vocab_size == 50_000 and config.tie_word_embeddings
    assert config.num_sink_tokens == 4 and config.max_position_embeddings == 8192
    assert config.memory_slots == SLOTS.get(name, [512, 256, 128])
    assert config.segment_length == (16 if name == "bwr-dnc-tiny" else 256)
    assert config.hidden_dropout == (0.1 if name == "bwr-dnc-500m" else 0.0)
    if name != "bwr-dnc-tiny":
        assert config.head_dim == 64
    banks = [index for index, kind in enumerate(config.layer_types) if kind == "state_bank_attention"]
    assert banks == list(range(2, config.num_hidden_layers, 3))


@pytest.mark.parametrize("name", list_presets())
def test_loaded_values_are_those_written(name):
    config = AutoConfig.from_pretrained(preset_path(name))
    for key, value in read_preset(name).items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", list_presets())
def test_preset_has_no_unknown_key(name):
    assert unknown_keys(read_preset(name)) == set()


def test_misspelt_key_is_noticed():
    assert unknown_keys(read_preset("bwr-dnc-60m") | {"memory_slot": [1, 1, 1]}) == {"memory_slot"}


@pytest.mark.parametrize("name", TARGETS)
def test_parameter_count_is_within_one_percent(name):
    total, _ = count_parameters(name)
    assert total == pytest.approx(TARGETS[name], rel=0.01)


@pytest.mark.parametrize("name", list_presets())
def test_memory_parameters_are_few(name):
    total, memory = count_parameters(name)
    assert 0 < memory < 0.002 * total


def test_special_token_ids_are_those_of_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path())
    for name in list_presets():
        config = AutoConfig.from_pretrained(preset_path(name))
        assert config.vocab_size == len(tokenizer)
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id


def test_tiny_preset_generates():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(preset_path("bwr-dnc-tiny"))).eval()
    tokens = torch.arange(10, 110)[None]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=-1).shape == (1, 103)


@pytest.mark.parametrize("name", list_presets())
def test_preset_has_a_training_recipe_that_overflows_its_memory(name, tmp_path):
    path = preset_path(name) / "training.yaml"
    recipe = read_recipe(path, [f"training.output_dir={tmp_path}", "training.use_cpu=true"])
    assert recipe.model == name and recipe.method == "full"
    arguments = training_arguments(recipe)
    assert arguments.memory_learning_rate > arguments.learning_rate and arguments.max_steps > 0
    with torch.device("meta"):
        config = new_model(recipe, AutoTokenizer.from_pretrained(tokenizer_path())).config
    raw, twofold, fourfold = config.memory_slots
    assert recipe.data.sequence_length > raw + 2 * twofold + 4 * fourfold + 2 * config.segment_length
    with pytest.raises(ValueError, match="did you mean 'warmup_steps'"):
        read_recipe(path, ["training.warmup_step=3"])


@pytest.mark.parametrize("name", ["bwr-dnc-7b", "", "../modeling_bwr_dnc"])
def test_unknown_preset_lists_the_known(name):
    with pytest.raises(ValueError, match="bwr-dnc-60m"):
        preset_path(name)


@pytest.mark.slow
def test_presets_and_tokenizer_are_in_the_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT], check=True)
    (wheel,) = (tmp_path / "dist").glob("bwr_dnc-*.whl")
    # The libraries come from this environment, through a path file; the package itself only from the wheel.
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    libraries = Path(torch.__file__).parents[1]
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    check = """
import sys
import modeling_bwr_dnc
from modeling_bwr_dnc.presets import list_presets, preset_path, tokenizer_path
from transformers import AutoConfig, AutoTokenizer
assert sys.prefix in modeling_bwr_dnc.__file__, modeling_bwr_dnc.__file__
assert all(sys.prefix in str(preset_path(name)) for name in list_presets())
counts = [AutoConfig.from_pretrained(preset_path(name)).num_hidden_layers for name in list_presets()]
print(len(counts), len(AutoTokenizer.from_pretrained(tokenizer_path())))
"""
    found = subprocess.run([python, "-c", check], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.split() == ["7", "50000"]
