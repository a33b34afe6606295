"""`scripts.generate` writes what the model writes, keeps its memory over processes, and refuses in one line."""

import io
import shutil
import sys

import pytest
import torch

from modeling_bwr_dnc import BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.conversion import convert_checkpoint
from modeling_bwr_dnc.evaluation.reading import continue_text
from scripts import generate
from tests.tiny_sources import byte_tokenizer


def test_state_resumed_in_a_new_process_equals_going_on_without_stopping(call_process, tiny_model, document, tmp_path):
    common = ["--model", tiny_model, "--state", tmp_path / "state", "--max-new-tokens", 10]
    first = call_process("generate", *common, "--prompt-file", document)
    num_tokens = len(byte_tokenizer()(document.read_text()).input_ids)
    assert first.returncode == 0 and f"a new memory: {num_tokens} tokens read" in first.stderr, first.stderr
    second = call_process("generate", *common, "--prompt", "And then")
    assert second.returncode == 0 and "resumed: 8 tokens read" in second.stderr, second.stderr

    model, tokenizer = BwrDncForCausalLM.from_pretrained(tiny_model).eval(), byte_tokenizer()
    cache = StateBankCache(config=model.config)
    for text, done in ((document.read_text(), first), ("And then", second)):
        ids = tokenizer(text, return_tensors="pt").input_ids
        written = continue_text(model, tokenizer, ids, cache, do_sample=False, max_new_tokens=10)
        assert done.stdout.rstrip("\n") == tokenizer.decode(written[0], skip_special_tokens=True).rstrip("\n")
    loaded = StateBankCache.from_pretrained(tmp_path / "state", config=model.config)
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert loaded.tokens() == cache.tokens()


def test_standard_input_is_a_prompt(call, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"And then")))
    from_input = call(generate, "--model", tiny_model, "--max-new-tokens", 5)
    from_prompt = call(generate, "--model", tiny_model, "--max-new-tokens", 5, "--prompt", "And then")
    assert from_input == from_prompt and from_input[0] == 0


def test_chat_goes_on_over_several_turns(call, tiny_model, tmp_path):
    common = ["--model", tiny_model, "--state", tmp_path / "state", "--max-new-tokens", 5, "--chat"]
    assert call(generate, *common, "--prompt", "Is it?")[0] == 0
    assert call(generate, *common, "--prompt", "Sure?")[0] == 0
    cache = StateBankCache.from_pretrained(tmp_path / "state")
    ids = [token for state in cache.states[:1] for token in state.window_ids[0].tolist()]
    text = byte_tokenizer().decode(ids[: cache.get_seq_length() - cache.rows[0].window_start])
    assert text.endswith("<|im_end|>\n")


def test_a_chat_without_memory_keeps_none(call, tiny_model, document, tmp_path):
    common = ["--model", tiny_model, "--state", tmp_path / "state", "--max-new-tokens", 5, "--chat", "--no-memory"]
    assert call(generate, *common, "--prompt-file", document)[0] == 0
    assert StateBankCache.from_pretrained(tmp_path / "state").tokens() == []
    assert call(generate, *common, "--prompt", "Sure?")[0] == 0


def test_sampling_follows_its_seed(call, tiny_model):
    common = ["--model", tiny_model, "--prompt", "x", "--max-new-tokens", 20, "--temperature", 1.5]
    first, again, other = (call(generate, *common, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_window_alone_forgets_what_the_memory_keeps(call, tiny_model, document):
    common = ["--model", tiny_model, "--prompt-file", document, "--max-new-tokens", 20]
    assert call(generate, *common)[1] != call(generate, *common, "--no-memory")[1]


def test_bad_input_is_refused(assert_refused, tiny_model, tmp_path, monkeypatch):
    for name, content in {"empty.txt": b"", "blank.txt": b" \n", "binary.bin": b"\x00\xff\xfe"}.items():
        (tmp_path / name).write_bytes(content)
    model = ["--model", tiny_model]
    assert_refused("no file at", generate, *model, "--prompt-file", tmp_path / "missing.txt")
    assert_refused("empty.txt is empty", generate, *model, "--prompt-file", tmp_path / "empty.txt")
    assert_refused("blank.txt is empty", generate, *model, "--prompt-file", tmp_path / "blank.txt")
    assert_refused("binary.bin is not UTF-8", generate, *model, "--prompt-file", tmp_path / "binary.bin")
    assert_refused("the prompt is empty", generate, *model, "--prompt", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert_refused("standard input is empty", generate, *model)
    assert_refused("no model folder at", generate, "--model", tmp_path / "nowhere", "--prompt", "x")
    assert_refused("no config.json", generate, "--model", tmp_path, "--prompt", "x")
    for device in ("meta", "gpu", "cpu:x"):
        assert_refused(f"--device is '{device}'", generate, *model, "--prompt", "x", "--device", device)
    assert_refused("at least 1", generate, *model, "--prompt", "x", "--max-new-tokens", 0)
    assert_refused("--temperature is nan", generate, *model, "--prompt", "x", "--temperature", "nan")
    assert_refused("--seed is", generate, *model, "--prompt", "x", "--seed", 2**64)
    assert_refused("nothing can be written", generate, *model, "--prompt", "x", "--state", tmp_path / "empty.txt")


def test_a_memory_that_could_not_be_saved_leaves_the_earlier_one(
    call, assert_refused, tiny_model, tmp_path, full_disk
):
    common = ["--model", tiny_model, "--max-new-tokens", 2, "--prompt", "And then", "--state", tmp_path / "state"]
    with full_disk(5_000):
        assert_refused("too large", generate, *common)
    assert call(generate, *common)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    with full_disk(5_000):
        assert_refused("too large", generate, *common)
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before


@pytest.fixture
def state(call, tiny_model, document, tmp_path):
    folder = tmp_path / "state"
    assert call(generate, "--model", tiny_model, "--prompt-file", document, "--state", folder)[0] == 0
    return folder


def test_state_that_does_not_fit_is_refused_and_kept(assert_refused, state, tiny_model, tiny_source, tmp_path):
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    convert_checkpoint(tiny_source, tmp_path / "wider", segment_length=16, num_sink_tokens=2, memory_slots=[16, 8, 4])
    assert_refused("segment_length", generate, "--model", tmp_path / "wider", "--prompt", "x", "--state", state)

    model = BwrDncForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    shutil.copytree(tiny_model, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    assert_refused("weights", generate, "--model", tmp_path / "other", "--prompt", "x", "--state", state)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before


@pytest.mark.parametrize("way", [[], ["--chat"]])
def test_a_memory_is_not_emptied_by_going_on_without_one(assert_refused, state, tiny_model, way):
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    common = ["--model", tiny_model, "--prompt", "x", "--state", state, *way]
    assert_refused("--no-memory would empty", generate, *common, "--no-memory")
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before


def test_damaged_state_is_refused(assert_refused, state, tiny_model, tmp_path):
    tensors = next(state.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert_refused("sha256", generate, "--model", tiny_model, "--prompt", "x", "--state", state)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    assert_refused(
        "state_bank.json", generate, "--model", tiny_model, "--prompt", "x", "--state", tmp_path / "foreign"
    )
