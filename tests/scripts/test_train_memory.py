"""`scripts.train_memory` writes an adapter that `scripts.convert` puts in, and refuses in one line."""

import torch
from safetensors.torch import load_file

from modeling_bwr_dnc import BwrDncForCausalLM
from scripts import convert, train_memory


def test_an_adapter_goes_into_a_conversion(call, tiny_source, tiny_model, tmp_path):
    adapter = tmp_path / "memory.safetensors"
    options = ("--tokens", 3000, "--pooling", 5, "--boost-steps", 2, "--compressor-steps", 2)
    code, output, errors = call(train_memory, "--model", tiny_model, "--output", adapter, *options)
    assert code == 0 and "attention that salient slots gain, in logits, by layer" in output, errors
    code, output, errors = call(
        convert, "--source", tiny_source, "--output", tmp_path / "model", "--memory-adapter", adapter
    )
    assert code == 0 and "tensors from the memory adapter; slots 16/8/4" in output, errors
    model = BwrDncForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.salience_pooling == 5 and model.config.memory_slots == [16, 8, 4]
    assert len(model.config.attention_boost) == model.config.num_hidden_layers and all(model.config.attention_boost)
    assert model.config.salience_scale == 0.0006
    for name, tensor in load_file(adapter).items():
        assert tensor.any() and tensor.equal(model.state_dict()[name])


def test_the_memory_of_a_model_in_half_precision_is_taught(call, tiny_source, tmp_path):
    folder, adapter = tmp_path / "half", tmp_path / "memory.safetensors"
    code, _, errors = call(
        convert, "--source", tiny_source, "--output", folder, "--dtype", "float16",
        "--segment-length", 8, "--num-sink-tokens", 2, "--memory-slots", 16, 8, 4,
    )  # fmt: skip
    assert code == 0, errors
    options = ("--tokens", 3000, "--pooling", 5, "--boost-steps", 2, "--compressor-steps", 2)
    code, _, errors = call(train_memory, "--model", folder, "--output", adapter, *options)
    assert code == 0, errors
    taught = load_file(adapter)
    assert {tensor.dtype for tensor in taught.values()} == {torch.float32}
    assert any(".compressor." in name for name in taught)


def test_what_was_taught_outlives_an_interruption(call, tiny_source, tiny_model, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_memory, "fit_compressor", interrupted)
    adapter, options = tmp_path / "memory.safetensors", ("--tokens", 3000, "--boost-steps", 2, "--compressor-steps", 2)
    code, _, _ = call(train_memory, "--model", tiny_model, "--output", adapter, *options)
    assert code == 130 and all(".salience." in name for name in load_file(adapter))
    code, _, errors = call(
        convert, "--source", tiny_source, "--output", tmp_path / "model", "--memory-adapter", adapter
    )
    assert code == 0, errors
    assert all(BwrDncForCausalLM.from_pretrained(tmp_path / "model").config.attention_boost)


def test_compressors_go_on_alone(call, tiny_source, tiny_model, tmp_path):
    first, more = tmp_path / "first.safetensors", tmp_path / "more.safetensors"
    options = ("--tokens", 3000, "--repeats", 0.5, "--repeats-layers", 1, 1, "--boost-steps", 0)
    options += ("--compressor-steps", 1)
    code, _, errors = call(train_memory, "--model", tiny_model, "--output", first, *options)
    assert code == 0, errors
    folder = tmp_path / "taught"
    code, _, errors = call(convert, "--source", tiny_source, "--output", folder, "--memory-adapter", first)
    assert code == 0, errors
    options = ("--compressors-only", "--compressor-steps", 2, "--stretch", 300, "--stretch-memory", 8, 8, 8, 8)
    code, output, errors = call(train_memory, "--model", folder, "--output", more, *options, "--share", 0.5)
    assert code == 0 and "stand out" not in output, errors
    old, new = load_file(first), load_file(more)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.equal(new[name]) != (".compressor." in name), name


def test_tables_of_contents_are_added_to_what_was_taught(call, tiny_source, tiny_model, tmp_path):
    first, more, text = tmp_path / "first.safetensors", tmp_path / "more.safetensors", tmp_path / "manual.txt"
    options = ("--tokens", 3000, "--repeats", 0.5, "--boost-steps", 0)
    code, _, errors = call(train_memory, "--model", tiny_model, "--output", first, *options)
    assert code == 0, errors
    code, _, errors = call(
        convert, "--source", tiny_source, "--output", tmp_path / "taught", "--memory-adapter", first
    )
    assert code == 0, errors
    chapters = [f"{number}. Chapter about {number} things\n\n" + "It is long. " * 120 for number in range(40)]
    text.write_text("\n\n".join(chapters))
    options = ("--compressors-only", "--contents", 0.5, "--repeats-layers", 1, 1, "--text", text)
    code, output, errors = call(train_memory, "--model", tmp_path / "taught", "--output", more, *options)
    assert code == 0 and "how far tables of contents stand out" in output, errors
    old, new = load_file(first), load_file(more)
    for name, tensor in old.items():
        assert tensor.equal(new[name]) != ("layers.1." in name and ".secondary_salience." in name), name


def test_bad_input_is_refused(assert_refused, tiny_model, document, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path / "memory.safetensors"]
    assert_refused("--prose-weight is nan", train_memory, *arguments, "--prose-weight", "nan")
    small = ["--compressor-steps", 1, "--stretch-memory", 0, 16, 8, 4]
    assert_refused("segment_length", train_memory, *arguments, *small)
    assert_refused("an odd number", train_memory, *arguments, "--pooling", 4)
    assert_refused("--tokens is 0", train_memory, *arguments, "--tokens", 0)
    for option in (("--scale", "nan"), ("--scale", "inf"), ("--learning-rate", 0), ("--copy-weight", "nan")):
        assert_refused("must be a number above 0", train_memory, *arguments, *option)
    assert_refused(
        "none of them compressed", train_memory, *arguments, "--compressor-steps", 2, "--memory-slots", 28, 0, 0
    )
    compressing = [*arguments, "--tokens", 3000, "--compressor-steps", 2]
    assert_refused("longer than what the memory has room for", train_memory, *compressing, "--stretch", 300)
    assert_refused("without a compressed level", train_memory, *compressing, "--stretch-memory", 8, 8, 0, 0)
    assert_refused("give longer texts", train_memory, *arguments, "--text", document)
    assert not (tmp_path / "memory.safetensors").exists()
    assert_refused("nothing to keep", train_memory, *arguments, "--memory-slots", 0, 0, 0)
    assert_refused("leaves nothing to teach", train_memory, *arguments, "--compressors-only")
    assert_refused("the layers are 0 to", train_memory, *arguments, "--repeats-layers", 1, 99)
    for option in (("--share", 2), ("--fact-share", -1)):
        assert_refused("at most 1", train_memory, *arguments, *option)
    assert_refused("nothing can be written", train_memory, *arguments[:2], "--output", document / "memory.safetensors")
    assert_refused("no file at", train_memory, *arguments, "--text", tmp_path / "nowhere.txt")
    assert_refused("both are needed", train_memory, *arguments, "--text", document, "--tokens", 30, "--boost-steps", 0)
    (tmp_path / "memory.safetensors").write_bytes(b"precious")
    assert_refused("exists already", train_memory, *arguments)


def test_a_full_disk_leaves_nothing(call, tiny_model, tmp_path, full_disk):
    output = tmp_path / "out" / "memory.safetensors"
    with full_disk(100):
        code, _, errors = call(train_memory, "--model", tiny_model, "--output", output, "--tokens", 3000)
    assert code == 2 and "could not be written" in errors.splitlines()[-1]
    assert list(output.parent.iterdir()) == []
