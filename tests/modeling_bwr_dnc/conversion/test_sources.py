"""A source is read completely or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from modeling_bwr_dnc.conversion import load_source
from tests.tiny_sources import CONFIGS, SPECIAL_TOKENS, random_source, save_gguf, save_source


@pytest.fixture
def folder(tmp_path):
    return save_source(tmp_path / "source")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_folder_gives_its_weights_tokenizer_and_generation_config(folder):
    source = load_source(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in source.model.state_dict().items())
    assert source.tokenizer.chat_template is not None
    assert source.model.generation_config.max_new_tokens == 7


def test_metadata_of_the_card_is_kept(folder):
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\nbase_model: someone/something\n---\n# Card\n"
    )
    source = load_source(folder)
    assert (source.license, source.languages, source.base_model) == ("apache-2.0", ("en",), "someone/something")


def test_folder_in_the_cache_of_the_hub_is_its_repository(tmp_path):
    source = load_source(save_source(tmp_path / "models--owner--tiny-model" / "snapshots" / "0123abcd"))
    assert (source.name, source.base_model) == ("owner/tiny-model", "owner/tiny-model")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_folder_without_tokenizer_files_has_no_tokenizer(tmp_path, name):
    random_source(CONFIGS[name]).save_pretrained(tmp_path)
    assert load_source(tmp_path).tokenizer is None


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[]")])
def test_a_tokenizer_that_cannot_be_read_is_an_error_and_not_left_out(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json in .* could not be read"):
        load_source(folder)


def test_unknown_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.gate.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.gate\.weight"):
        load_source(folder)


def test_computed_rotary_frequencies_are_no_unknown_tensor(folder):
    change_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    load_source(folder)


def test_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_source(folder)


def test_tensor_of_another_shape_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_source(folder)


def test_classifier_is_no_language_model(tmp_path):
    LlamaForSequenceClassification(CONFIGS["llama-untied-biased"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight"):
        load_source(tmp_path)


def test_quantised_source_is_refused(tmp_path):
    model = random_source(CONFIGS["llama"])
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised"):
        load_source(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "./nowhere", "missing.gguf"])
def test_missing_source_is_named(name):
    with pytest.raises(ValueError, match=name):
        load_source(name)


def test_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        load_source(path)


def test_weights_that_are_no_safetensors_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="could not be read"):
        load_source(folder)


@pytest.mark.parametrize("name", ["llama", "llama-tied-wide-heads"])
def test_gguf_gives_a_plain_model_that_can_be_saved(tmp_path, name):
    original = random_source(CONFIGS[name])
    source = load_source(save_gguf(tmp_path / "tiny.gguf", original))
    source.model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(50)[None]
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(source.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert again.config.tie_word_embeddings == original.config.tie_word_embeddings
    assert (source.license, source.languages) == ("apache-2.0", ("en",))


def test_gguf_tokenizer_keeps_special_tokens_chat_template_and_single_digits(tmp_path):
    tokenizer = load_source(save_gguf(tmp_path / "tiny.gguf", random_source(CONFIGS["llama"]))).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [257, 258, 259]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert turn == "<|im_start|>user\nhi<|im_end|>\n"
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2026")]
    assert pieces == ["in", "Ġ", "2", "0", "2", "6"]


def test_gguf_tensor_that_the_library_would_skip_is_named(tmp_path):
    model = random_source(CONFIGS["llama"])
    path = save_gguf(tmp_path / "tiny.gguf", model, extra_tensors={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        load_source(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.type": "yarn"},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        {"llama.attention.sliding_window": 16},
    ],
)
def test_gguf_setting_that_the_library_would_skip_is_refused(tmp_path, fields):
    path = save_gguf(tmp_path / "tiny.gguf", random_source(CONFIGS["llama"]), extra_fields=fields)
    with pytest.raises(ValueError, match="convert the original folder"):
        load_source(path)


def test_gguf_of_other_shapes_than_it_says_is_refused(tmp_path):
    path = save_gguf(
        tmp_path / "tiny.gguf", random_source(CONFIGS["llama"]), extra_fields={"llama.rope.dimension_count": 2}
    )
    with pytest.raises(ValueError, match="does not fit"):
        load_source(path)
