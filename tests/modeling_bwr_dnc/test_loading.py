"""What is wrong with a model folder is a `ValueError` that names it, and never a model with random weights."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.loading import read_model, read_tokenizer
from tests.modeling_bwr_dnc.builders import tiny_config


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    BwrDncForCausalLM(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(name for name in tensors if "up_proj" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "weights of .* could not be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "weights of .* could not be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 5000), "weights of .* could not be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights of .* could not be read"),
        (lambda folder: os.truncate(folder / "config.json", 100), "config of .* could not be read"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "model_type"),
        (lambda folder: (folder / "config.json").write_text("null"), "config of .* could not be read"),
        (lambda folder: change_config(folder, segment_length="many"), "segment_length"),
        (lambda folder: change_config(folder, model_type="llama"), "is a llama model; convert it first"),
        (lambda folder: change_weights(folder, lambda tensors, name: tensors.pop(name)), "lacks the tensor .*up_proj"),
        (
            lambda folder: change_weights(folder, lambda tensors, name: tensors.update({name: torch.ones(3, 3)})),
            "another shape",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, words):
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_model(folder)


def test_more_layers_than_there_are_kinds_of_are_refused(folder):
    with pytest.raises(ValueError, match="layer_types"):
        BwrDncForCausalLM.config_class.from_pretrained(folder, num_hidden_layers=5)


def test_settings_may_add_parts_to_a_saved_model(folder):
    ids = torch.arange(20)[None]
    added = read_model(folder, short_conv_kernel=3).eval()
    with torch.no_grad():
        torch.testing.assert_close(added(ids).logits, read_model(folder).eval()(ids).logits)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="holds no tokenizer"):
        read_tokenizer(folder)
