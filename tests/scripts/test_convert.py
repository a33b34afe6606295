"""`scripts.convert` converts, prints its proof, and refuses in one line."""

from safetensors.torch import load_file

from scripts import convert


def test_converts_and_prints_the_proof(call_process, tiny_source, tmp_path):
    budget = ["--segment-length", 8, "--num-sink-tokens", 2, "--memory-slots", 16, 8, 4]
    done = call_process("convert", "--source", tiny_source, "--output", tmp_path / "out", *budget)
    assert done.returncode == 0, done.stderr
    assert "largest logit difference to the source's full attention" in done.stdout
    assert "32 tokens each, float32" in done.stdout
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_help_shows_examples(call):
    code, text, _ = call(convert, "--help")
    assert code == 0 and "Examples:" in text and "--memory-slots RAW TWO FOUR" in text


def test_bad_input_is_refused(assert_refused, tiny_source, tmp_path):
    budget = ["--segment-length", 8, "--memory-slots", 16, 8, 4]
    output = ["--output", tmp_path / "out"]
    source = ["--source", tiny_source]
    assert_refused("no source at", convert, "--source", tmp_path / "nowhere", *output)
    assert_refused("config.json", convert, "--source", tmp_path, *output)
    assert_refused("exists already", convert, *source, "--output", tmp_path)
    assert_refused("max_position_embeddings", convert, *source, *output, "--memory-slots", 512, 0, 0)
    assert_refused("use the words bank, window", convert, *source, *output, *budget, "--layer-types", "full")
    assert_refused("nothing can be written", convert, *source, "--output", tiny_source / "config.json" / "out")
    assert_refused("no file at", convert, *source, *output, *budget, "--card", "missing.md")
    assert_refused("could not be read", convert, *source, *output, *budget, "--memory-adapter", "missing.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_only_a_converted_model_is_overwritten(assert_refused, call, tiny_source, tmp_path):
    (tmp_path / "novel.txt").write_text("precious")
    source = ["--source", tiny_source, "--segment-length", 8, "--memory-slots", 16, 8, 4]
    source += ["--skip-proof", "--overwrite"]
    assert_refused("is no converted model", convert, *source, "--output", tmp_path)
    assert_refused("choose an output", convert, *source, "--output", tiny_source)
    assert_refused("nothing can be written", convert, *source, "--output", tmp_path / "novel.txt")
    assert (tmp_path / "novel.txt").read_text() == "precious"
    for _ in range(2):
        assert call(convert, *source, "--output", tmp_path / "out")[0] == 0


def test_a_full_disk_leaves_the_earlier_model(assert_refused, call, tiny_source, tmp_path, full_disk):
    source = ["--source", tiny_source, "--output", tmp_path / "out", "--segment-length", 8, "--skip-proof"]
    assert call(convert, *source, "--memory-slots", 16, 8, 4)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for size in (30_000, 5_000):
        with full_disk(size):
            assert_refused("could not be written", convert, *source, "--memory-slots", 24, 8, 4, "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
