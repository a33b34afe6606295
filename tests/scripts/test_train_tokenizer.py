"""Training and comparing tokenizers: exactly the size asked for, text and nothing but text read, clear errors."""

import gzip
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling_bwr_dnc.presets import tokenizer_path
from scripts import train_tokenizer
from scripts.train_tokenizer import SPECIAL_TOKENS, HtmlText, read_inputs, read_text, train_bpe

LICENSE = Path(__file__).parents[2] / "LICENSE"


def test_training_gives_exactly_the_size_asked_for(tmp_path):
    blocks = read_inputs([str(LICENSE)])
    trained = train_bpe(blocks, 400, show_progress=False)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 400
    assert loaded.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3]
    assert loaded.decode(loaded("Lizenz, licence, ライセンス").input_ids) == "Lizenz, licence, ライセンス"
    assert len(loaded(" the").input_ids) == 1


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="add more text"):
        train_bpe(iter(["so few words, so few words"]), 50_000, show_progress=False)


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="at least 260"):
        train_bpe(iter(["text"]), 200)


def test_html_is_read_as_its_text():
    page = "<head><title>T</title></head><p>One <b>bold</b>\n word.</p><script>x()</script><pre>a\n  b</pre>"
    assert HtmlText.of(page) == "One bold word.\n\na\n  b"
    assert HtmlText.of("<html><head><title>T</title><body><p>All of the text</p>") == "All of the text"


def test_files_without_text_are_left_out(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\1")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "plain.txt").write_text("Grüße", encoding="utf-8")
    (tmp_path / "whole.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "wound.gz").write_bytes(gzip.compress(b"text")[:-9])
    (tmp_path / "wrong.gz").write_bytes(b"\x1f\x8bno gzip at all")
    assert [read_text(path) for path in sorted(tmp_path.iterdir())] == ["", "", "Grüße", "text", "", ""]


def test_input_is_taken_up_to_its_size_and_long_lines_once(tmp_path):
    lines = [f"line number {number} of a text that is long enough\n" for number in range(3000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt").write_text("".join(lines))
    assert sorted("".join(read_inputs([str(tmp_path)])).splitlines(keepends=True)) == sorted(lines)
    assert 50_000 <= sum(map(len, read_inputs([f"{tmp_path}@0.05"]))) < 50_000 + 20_000


def test_command_line_trains_and_compares(call, document, tmp_path):
    code, output, _ = call(
        train_tokenizer, "--input", LICENSE, "--output", tmp_path / "tokenizer", "--vocab-size", 300
    )
    assert code == 0 and "300 entries" in output
    small, large = tmp_path / "tokenizer", tokenizer_path()
    code, output, _ = call(train_tokenizer, "--compare", document, "--tokenizer", large, "--reference", small)
    assert code == 0
    name, size, ours, theirs, ratio = output.splitlines()[-1].strip("| ").split(" | ")
    assert (name, int(size)) == (document.stem, document.stat().st_size)
    assert float(ours) > float(theirs) >= 1
    assert float(ratio) == pytest.approx(float(ours) / float(theirs), abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "no-such-folder", "--output", "out"], "no-such-folder does not exist"),
        (["--input", LICENSE], "needs --output"),
        (["--compare", LICENSE], "needs --reference"),
        (["--compare", LICENSE, "--reference", LICENSE], "holds no tokenizer"),
        (["--input", f"{LICENSE}@nan", "--output", "out", "--vocab-size", 300], "more than 0"),
        (["--input", LICENSE, "--output", LICENSE], "nothing can be written"),
        (["--input", LICENSE, "--output", LICENSE.parent], "is not empty"),
    ],
)
def test_what_the_user_can_mend_is_one_line(assert_refused, arguments, words):
    assert_refused(words, train_tokenizer, *arguments)


def test_a_full_disk_leaves_nothing(call, tmp_path, full_disk):
    with full_disk(5_000):
        code, _, errors = call(
            train_tokenizer, "--input", LICENSE, "--output", tmp_path / "tokenizer", "--vocab-size", 300
        )
    assert code == 2 and "could not be written" in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
