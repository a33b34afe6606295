"""A conversion leaves a complete folder, or none."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig

from modeling_bwr_dnc.conversion import adapter_budget, convert_checkpoint, load_memory_adapter, save_memory_adapter
from tests.tiny_sources import CONFIGS, SIZES, random_source, save_gguf, save_source

BUDGET = {"segment_length": 8, "num_sink_tokens": 2, "memory_slots": [24, 8, 4]}
LOAD_ELSEWHERE = """
import sys
sys.modules["modeling_bwr_dnc"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert tokenizer("text").input_ids
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(100)[None]).logits, sys.argv[2])
"""


@pytest.fixture
def source(tmp_path):
    return save_source(tmp_path / "source")


def test_folder_holds_model_tokenizer_card_and_record(source, tmp_path):
    result = convert_checkpoint(source, tmp_path / "out", **BUDGET)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "conversion.json",
        "configuration_bwr_dnc.py",
        "modeling_bwr_dnc.py",
        "memory_ops.py",
        "state_bank.py",
    } <= names
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["proof"]["max_difference"] == result.proof.max_difference < 1e-3
    assert record["proof"]["rows"] == ["random tokens", "text"]
    assert record["lossless_length"] == 40 and record["num_memory_parameters"] > 0


def test_saved_model_equals_its_source(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", **BUDGET)
    ids = torch.randint(260, (2, 40))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


def test_chat_model_keeps_template_tokens_and_generation_config(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", **BUDGET)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "How many in 2026?"}]
    assert after.apply_chat_template(turns) == before.apply_chat_template(turns)
    assert (after.eos_token, after.pad_token, after.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_new_tokens == 7 and model.generation_config.eos_token_id == 259


def test_folder_loads_in_another_directory_without_the_package(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", **BUDGET)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [sys.executable, "-I", "-c", LOAD_ELSEWHERE, str(tmp_path / "out"), "logits.pt"],
        check=True,
        cwd=elsewhere,
        env={**os.environ, "HF_MODULES_CACHE": str(elsewhere / "modules")},
    )
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(100)[None]).logits
    torch.testing.assert_close(torch.load(elsewhere / "logits.pt"), expected, atol=1e-4, rtol=0)


def test_gguf_file_becomes_a_folder(tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf", random_source(CONFIGS["llama"]))
    result = convert_checkpoint(path, tmp_path / "out", **BUDGET)
    assert result.dtype == "float32" and result.proof.max_difference < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_weights_are_saved_in_the_type_asked_for(source, tmp_path):
    result = convert_checkpoint(source, tmp_path / "out", **BUDGET, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if ".memory." not in name} == {torch.bfloat16}
    assert result.dtype == "bfloat16" and result.proof.max_difference < 1e-3


def test_memory_adapter_is_in_the_folder(source, tmp_path):
    convert_checkpoint(source, tmp_path / "plain", **BUDGET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    name = "model.layers.1.self_attn.memory.salience.weight"
    torch.nn.init.normal_(model.get_parameter(name))
    save_memory_adapter(model, tmp_path / "adapter.safetensors")
    result = convert_checkpoint(source, tmp_path / "out", **BUDGET, memory_adapter=tmp_path / "adapter.safetensors")
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(adapted.get_parameter(name), model.get_parameter(name))
    assert name in result.memory_adapter and result.proof.max_difference < 1e-3
    assert load_memory_adapter(model, tmp_path / "adapter.safetensors") == result.memory_adapter


def test_slots_are_those_given_or_those_the_adapter_is_meant_for(source, tmp_path):
    convert_checkpoint(source, tmp_path / "plain", **BUDGET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.nn.init.normal_(model.get_parameter("model.layers.1.self_attn.memory.salience.weight"))
    adapter = tmp_path / "adapter.safetensors"
    shares = [0.5, *[1.5] * (model.config.num_hidden_layers - 1)]
    model.config.slot_shares = shares
    save_memory_adapter(model, adapter)
    others = {name: value for name, value in BUDGET.items() if name != "memory_slots"}
    taken = convert_checkpoint(source, tmp_path / "taken", **others, memory_adapter=adapter)
    assert adapter_budget(adapter) == {"memory_slots": BUDGET["memory_slots"], "slot_shares": shares}
    assert (taken.memory_slots, taken.slot_shares) == (BUDGET["memory_slots"], shares)
    assert "times 0.5 to 1.5 by layer" in (tmp_path / "taken" / "README.md").read_text()
    assert taken.proof.length == taken.lossless_length == model.config.lossless_length
    given = convert_checkpoint(source, tmp_path / "given", **others, memory_slots=[9, 0, 0], memory_adapter=adapter)
    assert (given.memory_slots, given.slot_shares) == ([9, 0, 0], None)
    save_file(load_file(adapter), adapter)
    unsaid = convert_checkpoint(source, tmp_path / "unsaid", **others, memory_adapter=adapter)
    assert unsaid.memory_slots[1:] == [0, 0] and adapter_budget(adapter) == {}


def test_model_card_has_valid_metadata_and_the_measured_difference(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n")
    result = convert_checkpoint(source, tmp_path / "out", **BUDGET)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert f"{result.proof.max_difference:.2e}" in card.text and "## Limits" in card.text


def test_given_card_is_used(source, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    convert_checkpoint(source, tmp_path / "out", **BUDGET, card=tmp_path / "card.md")
    assert (tmp_path / "out" / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_existing_output_is_replaced_only_when_asked_and_a_converted_model(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", **BUDGET)
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(source, tmp_path / "out", **BUDGET)
    other = save_source(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(ValueError, match=r"is no converted model \(it holds no conversion.json\)"):
        convert_checkpoint(source, other, **BUDGET, overwrite=True)
    with pytest.raises(ValueError, match="is no converted model"):
        convert_checkpoint(source, other / "config.json", **BUDGET, overwrite=True)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    convert_checkpoint(source, tmp_path / "out", **BUDGET | {"memory_slots": [9, 0, 0]}, overwrite=True)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["memory_slots"] == [9, 0, 0]


@pytest.mark.parametrize("name", ["checkpoint-500/optimizer.pt", "notes.txt", "measure.py", "memory.safetensors"])
def test_what_no_conversion_wrote_is_kept(source, tmp_path, name):
    convert_checkpoint(source, tmp_path / "out", **BUDGET, prove=False)
    precious = tmp_path / "out" / name
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(ValueError, match=f"out holds {name.partition('/')[0]}, but must hold a converted model and"):
        convert_checkpoint(source, tmp_path / "out", **BUDGET, overwrite=True)
    assert precious.read_text() == "mine"


def test_all_that_a_conversion_writes_may_be_replaced(source, tmp_path):
    """Also weights in several files, several chat templates, and modules of another version."""
    convert_checkpoint(source, tmp_path / "out", **BUDGET, prove=False)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "former_module.py"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / "additional_chat_templates").mkdir()
    with (tmp_path / "out" / "modeling_bwr_dnc.py").open("a") as code:
        code.write("\nfrom .former_module import something\n")
    convert_checkpoint(source, tmp_path / "out", **BUDGET, prove=False, overwrite=True)
    assert not (tmp_path / "out" / "former_module.py").exists()


def test_what_is_read_is_never_the_output_or_in_it(source, tmp_path):
    def everything():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    (tmp_path / "link").symlink_to(source)
    inner = save_source(tmp_path / "around" / "inner")
    staged = save_source(tmp_path / "staged.partial" / "staged")
    gguf = save_gguf(tmp_path / "around" / "tiny.gguf", random_source(CONFIGS["llama"]))
    save_file({}, adapter := tmp_path / "around" / "memory.safetensors")
    before = everything()
    for read, output, options in (
        (source, source, {}),
        (source, tmp_path / "link", {}),
        (tmp_path / "link", source, {}),
        (inner, tmp_path / "around", {}),
        (gguf, tmp_path / "around", {}),
        (staged, tmp_path / "staged", {}),
        (source, tmp_path / "around", {"memory_adapter": adapter}),
    ):
        for overwrite in (True, False):
            with pytest.raises(ValueError, match="is read, but writing .* would remove it; choose"):
                convert_checkpoint(read, output, **BUDGET, **options, overwrite=overwrite)
    assert everything() == before
    convert_checkpoint(source, source / "converted", **BUDGET, prove=False)


def test_only_a_proof_says_how_far_a_sliding_window_was_tested(tmp_path):
    source = save_source(tmp_path / "source", MistralConfig(**SIZES, sliding_window=12))
    for prove in (True, False):
        result = convert_checkpoint(source, tmp_path / str(prove), **BUDGET, allow_sliding_window=True, prove=prove)
        assert "beyond that length the two differ" in result.notices[0]
        assert ("(tested up to 12 tokens)" in result.notices[0]) == prove


def test_source_without_tokenizer_is_converted_and_noted(tmp_path):
    random_source(CONFIGS["qwen2"]).save_pretrained(tmp_path / "source")
    result = convert_checkpoint(tmp_path / "source", tmp_path / "out", **BUDGET)
    assert result.proof.rows == ("random tokens",) and "The source has no tokenizer" in result.notices[0]
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_failed_conversion_leaves_nothing(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.unknown.weight"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.unknown\.weight"):
        convert_checkpoint(source, tmp_path / "out", **BUDGET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_head_of_its_own_is_kept_where_the_config_says_that_it_is_tied(tmp_path):
    source = save_source(tmp_path / "source", LlamaConfig(**SIZES, tie_word_embeddings=False))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    expected = AutoModelForCausalLM.from_pretrained(source)
    assert expected.lm_head.weight is not expected.model.embed_tokens.weight
    convert_checkpoint(source, tmp_path / "out", **BUDGET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight) and not model.config.tie_word_embeddings
