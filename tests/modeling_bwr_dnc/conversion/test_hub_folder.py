"""What is published is complete, and nothing else leaves the machine."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.conversion import convert_checkpoint
from modeling_bwr_dnc.conversion.hub_folder import check_model_folder, stage_model_folder
from tests.tiny_sources import save_source


@pytest.fixture
def folder(tmp_path):
    source = save_source(tmp_path / "source")
    convert_checkpoint(
        source, tmp_path / "out", segment_length=8, num_sink_tokens=2, memory_slots=[24, 8, 4], prove=False
    )
    return tmp_path / "out"


def test_staged_folder_holds_every_file_byte_for_byte(folder, tmp_path):
    staged = stage_model_folder(folder, tmp_path / "staged")
    assert {path.name for path in staged} == {path.name for path in folder.iterdir()}
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in staged)


def test_chat_templates_with_names_are_published(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    stage_model_folder(folder, tmp_path / "staged")
    assert AutoTokenizer.from_pretrained(tmp_path / "staged").chat_template == tokenizer.chat_template


def test_private_files_stay_at_home(folder, tmp_path):
    for name in (".env", "optimizer.pt", "notes.txt", "training_args.bin"):
        (folder / name).write_text("secret")
    (folder / "state").mkdir()
    names = {path.name for path in stage_model_folder(folder, tmp_path / "staged")}
    assert not names & {".env", "optimizer.pt", "notes.txt", "training_args.bin", "state"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("modeling_bwr_dnc.py", "lacks modeling_bwr_dnc.py"),
        ("memory_ops.py", "lacks memory_ops.py"),
        ("README.md", "no model card"),
    ],
)
def test_missing_file_is_named(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=message):
        check_model_folder(folder)


def test_damaged_file_is_named(folder):
    config, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_bytes(config[:-30])
    with pytest.raises(ValueError, match="config.json is no JSON"):
        check_model_folder(folder)
    (folder / "config.json").write_bytes(config)
    for damaged in (weights[:-1], weights[:4]):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors are damaged"):
            check_model_folder(folder)


def test_config_without_code_files_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="auto_map"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("# No metadata\n", "lacks 'library_name'"),
        ("---\nlibrary_name: transformers\n---\n", "lacks 'pipeline_tag'"),
        ("---\nlibrary_name: [unclosed\n---\n", "cannot be read"),
    ],
)
def test_card_without_valid_metadata_is_refused(folder, card, message):
    (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        check_model_folder(folder)


def test_staging_never_mixes_with_other_files(folder, tmp_path):
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "other").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        stage_model_folder(folder, tmp_path / "staged")


def test_a_memory_saved_beside_the_model_stays_at_home(folder, tmp_path):
    model = BwrDncForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values.save_pretrained(folder)
    names = {path.name for path in folder.glob("*.safetensors")}
    staged = {path.name for path in stage_model_folder(folder, tmp_path / "staged")}
    assert len(names) == 2 and staged & names == {"model.safetensors"}


def test_every_part_of_the_weights_must_be_there(folder, tmp_path):
    card = (folder / "README.md").read_bytes()
    BwrDncForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    (tmp_path / "parts" / "README.md").write_bytes(card)
    check_model_folder(tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 2
    parts[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {parts[1].name}"):
        check_model_folder(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        check_model_folder(tmp_path / "parts")


def test_code_of_a_slow_and_a_fast_tokenizer_is_looked_for(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoTokenizer"] = ["tokenization_own.Own", None]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks tokenization_own.py"):
        check_model_folder(folder)
