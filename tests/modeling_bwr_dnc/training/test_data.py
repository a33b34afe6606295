import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from modeling_bwr_dnc.presets import tokenizer_path
from modeling_bwr_dnc.training.data import (
    DataSource,
    RowCollator,
    build_rows,
    join,
    mix,
    pack,
    split_validation,
    tokenize_document,
)
from tests.modeling_bwr_dnc.builders import tiny_config, tiny_model
from tests.tiny_sources import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def documents_of(rows):
    """The documents of packed rows, as lists of token ids."""
    found = []
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            found.append(row["input_ids"][start:stop])
    return found


def test_packing_loses_nothing_and_marks_every_document():
    documents = [list(range(10, 10 + length)) for length in (3, 5, 1, 9, 2)]
    rows = list(pack([(ids, ids) for ids in documents], 8))
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 4]
    assert sum((row["input_ids"] for row in rows), []) == sum(documents, [])
    assert documents_of(rows)[:3] == documents[:3]
    for row in rows:
        for position, token, label in zip(row["position_ids"], row["input_ids"], row["labels"], strict=True):
            assert label == (-100 if position == 0 else token)


def test_a_packed_row_has_the_loss_of_its_documents_apart():
    model = tiny_model(tiny_config())
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in (40, 23, 37)]
    packed = RowCollator()(list(pack([(ids, ids) for ids in documents], 100)))
    alone = RowCollator()([row for ids in documents for row in pack([(ids, ids)], 100)])
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).loss, model(**alone).loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "folder", "pattern"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, text, tokenizer, kind, streaming):
    content = text[:700]
    if kind == "jsonl":
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps({"text": content}) + "\n", encoding="utf-8")
    elif kind == "parquet":
        path = tmp_path / "data.parquet"
        Dataset.from_dict({"text": [content]}).to_parquet(str(path))
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "a.txt").write_text(content, encoding="utf-8")
        path = {"text": folder / "a.txt", "folder": folder, "pattern": folder / "*.txt"}[kind]
    rows = list(build_rows([DataSource(path=str(path))], tokenizer, 128, streaming=streaming))
    ids = sum((row["input_ids"] for row in rows), [])
    assert tokenizer.decode(ids, skip_special_tokens=True) == content
    assert ids[-1] == tokenizer.eos_token_id


def test_a_pattern_looks_into_folders_in_the_order_of_names(tmp_path, tokenizer):
    for name in ("b/deep/x.txt", "a/x.txt", "a/y.md", "x.txt"):
        path = tmp_path / "sub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}", encoding="utf-8")

    def names(pattern):
        rows = build_rows([DataSource(path=str(tmp_path / pattern))], tokenizer, 64, packing=False)
        return [tokenizer.decode(row["input_ids"], skip_special_tokens=True).split()[-1] for row in rows]

    assert names("sub/*/x.txt") == ["a/x.txt"]
    assert names("sub/**/*.txt") == ["a/x.txt", "b/deep/x.txt", "x.txt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, streaming):
    (tmp_path / "a.txt").write_text("Hello there", encoding="utf-8-sig")
    (row,) = build_rows([DataSource(path=str(tmp_path / "a.txt"))], tokenizer, 64, streaming=streaming)
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == "Hello there"


CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def test_a_chat_ends_with_the_end_of_text_token(tokenizer):
    source = DataSource(path="x")
    # Where the turn ends with it, there is no other.
    ids, labels = tokenize_document({"messages": CHAT}, source, tokenizer)
    assert tokenizer.decode(ids).endswith("Four.<|im_end|>") and ids == labels
    package = AutoTokenizer.from_pretrained(tokenizer_path())
    ids, labels = tokenize_document({"messages": CHAT}, source, package)
    assert package.decode(ids).endswith("Four.<|im_end|><|endoftext|>")
    assert package.decode([label for label in labels if label != -100]) == "Four.<|im_end|><|endoftext|>"
    # Nobody learns to end what a user has said.
    ids, labels = tokenize_document({"messages": CHAT[:1]}, source, package)
    assert ids[-1] == package.eos_token_id and set(labels) == {-100}


def test_only_completions_have_labels(tokenizer):
    row = {"prompt": "Two and two is ", "completion": "four"}
    ids, labels = tokenize_document(row, DataSource(path="x"), tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Two and two is four"
    assert tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=True) == "four"


def test_sources_are_mixed_by_weight():
    parts = [Dataset.from_dict({"source": [name] * 300}) for name in "ab"]
    found = [row["source"] for row in mix(parts, [3, 1], seed=0)][:400]
    assert 0.68 < found.count("a") / 400 < 0.82


def test_joined_rows_are_read_once():
    parts = [Dataset.from_dict({"number": list(numbers)}) for numbers in (range(2), range(2, 30))]
    for second in (parts[1], parts[1].to_iterable_dataset()):
        assert [row["number"] for row in join([parts[0], second])] == list(range(30))


def test_tasks_are_sources(tokenizer):
    def make(source):
        assert source.options == {"start": 5}
        return ({"input_ids": [i, i + 1], "labels": [-100, i + 1]} for i in range(5, 8))

    source = DataSource(task="counting", options={"start": 5})
    rows = list(build_rows([source], tokenizer, 8, make_task=make))
    assert [row["labels"] for row in rows] == [[-100, 6], [-100, 7], [-100, 8]]


def test_validation_rows_are_held_out():
    parts = [Dataset.from_dict({"number": list(numbers)}) for numbers in (range(20), range(20, 50), range(50, 51))]
    train, held_out = split_validation(parts[:1], [1.0], 0.2)
    assert len(held_out) == 4 and sorted([*train["number"], *held_out["number"]]) == list(range(20))
    # Rows of the smaller ones are repeated in training, and none of them is held out.
    train, held_out = split_validation(parts, [1.0, 1.0, 1.0], 0.2)
    assert len(train) > 41 and len(held_out) == len(set(held_out["number"])) == 10
    assert set(train["number"]) | set(held_out["number"]) == set(range(51))
    assert not set(train["number"]) & set(held_out["number"])
    with pytest.raises(ValueError, match="at least two rows"):
        split_validation(parts[2:], [1.0], 0.2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing.txt", "no file or folder"),
        (lambda folder: folder, "holds no file"),
        (lambda folder: (folder / "empty.txt", (folder / "empty.txt").write_text(""))[0], "is empty"),
        (
            lambda folder: (folder / "latin.txt", (folder / "latin.txt").write_bytes(b"caf\xe9 cr\xe8me"))[0],
            "latin.txt' cannot be read",
        ),
        (lambda folder: (folder / "bad.jsonl", (folder / "bad.jsonl").write_text("{no json"))[0], "cannot be read"),
        (
            lambda folder: (folder / "a.jsonl", (folder / "a.jsonl").write_text('{"title": "x"}\n'))[0],
            "name its text column",
        ),
        (
            lambda folder: (folder / "blank.jsonl", (folder / "blank.jsonl").write_text('{"text": ""}\n'))[0],
            "at least two",
        ),
        (
            lambda folder: (folder / "n.jsonl", (folder / "n.jsonl").write_text('{"text": 5}\n'))[0],
            "where text should be",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_sources_are_named(tmp_path, tokenizer, make, words, streaming):
    with pytest.raises(ValueError, match=words):
        build_rows([DataSource(path=str(make(tmp_path)))], tokenizer, 16, streaming=streaming)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hello",
        [],
        ["hello"],
        [{"from": "user", "value": "hi"}],
        [CHAT[0], {"role": "assistant", "content": None}],
    ],
)
def test_a_row_that_holds_no_chat_is_refused(tmp_path, tokenizer, messages):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match="chats.jsonl' has the `messages` .* must be .*; mend the row"):
        build_rows([DataSource(path=str(path))], tokenizer, 16)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(None, "template"), ("{{ raise_exception('no user') }}", "no user"), ("{{ messages + 1 }}", "can only")],
)
def test_a_chat_that_does_not_fit_its_template_is_refused(template, reason):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"'chats' does not fit .*{reason}.*; mend the row"):
        tokenize_document({"messages": CHAT}, DataSource(path="chats"), tokenizer)
