"""
Text for training: from files, folders, the Hub or generated tasks, mixed by weight, packed into long rows.

A row holds several documents; `position_ids` return to 0 where each starts, which is all the model needs to keep them apart
(its memory starts anew there), and no token is asked to predict the first token of another document. A document longer than a
row goes on in the next row as a document of its own.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from transformers import PreTrainedTokenizerBase

from ..loading import first_line
from ..token_loss import IGNORED

# File name endings that `datasets` reads, and the name of its reader.
READERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PACKED_COLUMNS = ("input_ids", "labels", "position_ids")
# Said for every source: only what is of one type can be mixed.
ROW_FEATURES = Features({name: List(Value("int64")) for name in PACKED_COLUMNS})


@dataclass
class DataSource:
    """
    Where documents come from; exactly one of `path` and `task`.

    Attributes:
        path: a text, JSON lines or Parquet file, a folder of such files (one kind), a pattern with `*` (`**`: any
            folders), or a Hub name.
        task: name of a generated task, an iterable of `input_ids` and `labels`.
        weight: share of the rows of the mixture, relative to the other sources.
        column: column of the text. Rows with `prompt` and `completion`, or with `messages`, are recognised without it.
        split, configuration, revision: of a data set on the Hub.
        options: keyword arguments of the task.
    """

    path: str | None = None
    task: str | None = None
    weight: float = 1.0
    column: str = "text"
    split: str = "train"
    configuration: str | None = None
    revision: str | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if (self.path is None) == (self.task is None):
            raise ValueError(
                f"a data source names either a `path` or a `task`, but this one has path {self.path!r} and task {self.task!r}"
            )
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"`weight` of the source {self.name!r} is {self.weight}, but must be above 0 and finite")

    @property
    def name(self) -> str:
        return str(self.task or self.path)


def load_documents(source: DataSource, streaming: bool = False) -> Dataset | IterableDataset:
    """
    The documents of a source, one per row (a text file is one document).

    Raises:
        ValueError: for a missing, empty or unreadable source, naming it and what would do.
    """
    kind, options = _reader(source)
    try:
        documents = load_dataset(kind, streaming=streaming, **options)
        # What is streamed is read from here on.
        columns = documents.column_names or list(next(iter(documents.take(1)), {}))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the data source {source.name!r} cannot be read: {first_line(error)}") from error
    except Exception as error:
        # `datasets` wraps what its readers raise into an exception of its own.
        if not type(error).__module__.startswith("datasets"):
            raise
        reason = error.__cause__ or error
        raise ValueError(f"the data source {source.name!r} cannot be read: {first_line(reason)}") from error
    _text_kind(columns, source)
    return documents


def _reader(source: DataSource) -> tuple[str, dict]:
    """Reader of `datasets`, and its arguments."""
    path = Path(source.path).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
        if not files:
            raise ValueError(f"the folder {source.path} holds no file ending in {', '.join(READERS)}")
    elif "*" in source.path:
        files = sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise ValueError(f"no file matches {source.path}")
    elif path.suffix in READERS or path.is_absolute() or source.path.startswith("."):
        raise ValueError(f"there is no file or folder {source.path}")
    else:
        return source.path, {"split": source.split, "name": source.configuration, "revision": source.revision}
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(
            f"{source.path} mixes kinds of files, or has an unknown one; give each kind ({', '.join(READERS)}) a source"
        )
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise ValueError(f"{source.path} is empty; name a file with text in it")
    options = {"data_files": [str(file) for file in files], "split": "train"}
    kind = kinds.pop()
    # Without the mark that some editors begin a file with, which would be the first token.
    return kind, options | ({"sample_by": "document", "encoding": "utf-8-sig"} if kind == "text" else {})


def _text_kind(columns: list[str], source: DataSource) -> str:
    """How rows with these columns become a document."""
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "completion"
    if source.column in columns:
        return "text"
    raise ValueError(
        f"the data source {source.name!r} has the columns {', '.join(columns)}, but neither {source.column!r} nor `messages` nor "
        "`prompt` and `completion`; name its text column with `column`"
    )


def tokenize_document(
    row: dict, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """
    Token ids and labels of one document, closed by the end-of-text token if the tokenizer has one.

    Of `prompt` and `completion` only the completion has labels; of `messages` the assistant's turns, where the chat template
    marks them, otherwise all. Whitespace that the template puts after the last turn is left out; the end-of-text token
    follows unless the turn ends with it, and is a label after the assistant's.

    Raises:
        ValueError: for a row that holds something else than text, or messages that do not fit the chat template.
    """
    kind = _text_kind(list(row), source)
    if kind == "messages":
        return _tokenize_chat(row["messages"], source, tokenizer)
    if kind == "text":
        prompt, text = "", row[source.column]
    else:
        prompt, text = row["prompt"], row["completion"]
    if not isinstance(text, str) or not isinstance(prompt, str):
        raise ValueError(
            f"a row of the data source {source.name!r} holds {type(text).__name__} where text should be; mend "
            "the row or leave it out"
        )
    before = tokenizer(prompt, verbose=False).input_ids if prompt else []
    ids = tokenizer(text, add_special_tokens=not prompt, verbose=False).input_ids
    end = [] if tokenizer.eos_token_id is None or not ids else [tokenizer.eos_token_id]
    return before + ids + end, [IGNORED] * len(before) + ids + end


def _tokenize_chat(messages, source: DataSource, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if not isinstance(messages, list) or not messages or not all(map(_is_turn, messages)):
        raise ValueError(
            f"a row of the data source {source.name!r} has the `messages` {messages!r:.200}, but they must be a list "
            "of one or more mappings with texts as `role` and `content`; mend the row or leave it out"
        )
    marks = "{% generation" in (tokenizer.chat_template or "") or "{%- generation" in (tokenizer.chat_template or "")
    try:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=marks)
    except Exception as error:
        # A template may raise anything.
        raise ValueError(
            f"a row of the data source {source.name!r} does not fit the tokenizer's chat template ({first_line(error)})"
            "; mend the row or leave it out, or use another tokenizer"
        ) from error
    ids = list(encoded["input_ids"])
    mine = encoded["assistant_masks"] if marks else [1] * len(ids)
    labels = [token if is_mine else IGNORED for token, is_mine in zip(ids, mine, strict=True)]
    while ids and not tokenizer.decode(ids[-1]).strip():
        del ids[-1], labels[-1]
    end = tokenizer.eos_token_id
    if ids and end not in (None, ids[-1]):
        ids.append(end)
        labels.append(end if messages[-1]["role"] == "assistant" else IGNORED)
    return ids, labels


def _is_turn(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def pack(documents: Iterable[tuple[list[int], list[int]]], sequence_length: int) -> Iterator[dict[str, list[int]]]:
    """
    Documents (token ids, labels) one after the other in rows of `sequence_length` tokens; only the last row may be shorter.

    Yields `input_ids`, `labels` and `position_ids`, which count from 0 in every document. The first label of a document is
    ignored.
    """
    row: dict[str, list[int]] = {name: [] for name in PACKED_COLUMNS}
    for ids, labels in documents:
        start = 0
        while start < len(ids):
            count = min(sequence_length - len(row["input_ids"]), len(ids) - start)
            row["input_ids"] += ids[start : start + count]
            row["labels"] += [IGNORED, *labels[start + 1 : start + count]]
            row["position_ids"] += range(count)
            start += count
            if len(row["input_ids"]) == sequence_length:
                yield row
                row = {name: [] for name in PACKED_COLUMNS}
    if len(row["input_ids"]) > 1:
        yield row


def build_rows(
    sources: list[DataSource],
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    *,
    packing: bool = True,
    streaming: bool = False,
    seed: int = 0,
    make_task: Callable[[DataSource], Iterable[dict]] | None = None,
) -> Dataset | IterableDataset:
    """
    Rows to train on, of all `sources` in proportion to their weights.

    Args:
        packing: several documents to a row; False cuts a document longer than a row, and joins none.
        streaming: read while training, in the order of the files (buffered shuffling), instead of preparing all rows first.
        make_task: gives the examples of a `task` source.

    Raises:
        ValueError: for a source that cannot be read or holds no text.
    """
    if sequence_length < 2:
        raise ValueError(f"`sequence_length` is {sequence_length}, but must be at least 2")
    if not sources:
        raise ValueError("`data.sources` is empty; name at least one file, folder, Hub data set or task")
    parts = []
    for source in sources:
        if source.task is not None:
            if make_task is None:
                raise ValueError(f"the task {source.task!r} cannot be generated here; name files as sources")
            # Whatever is wrong with it is said here, and not from inside a data loader.
            make_task(source)
            options = {"make": make_task, "source": source}
            parts.append(IterableDataset.from_generator(_examples, features=ROW_FEATURES, gen_kwargs=options))
            continue
        documents = load_documents(source, streaming)
        if streaming:
            documents = documents.shuffle(seed=seed, buffer_size=1000)
        rows = documents.map(
            _to_rows,
            batched=True,
            batch_size=1000,
            remove_columns=documents.column_names or list(next(iter(documents.take(1)))),
            features=ROW_FEATURES,
            fn_kwargs={"source": source, "tokenizer": tokenizer, "length": sequence_length, "packing": packing},
        )
        if not streaming and len(rows) == 0 or streaming and next(iter(rows.take(1)), None) is None:
            raise ValueError(f"the data source {source.name!r} holds no text of at least two tokens")
        parts.append(rows)
    return mix(parts, [source.weight for source in sources], seed)


def _examples(make: Callable, source: DataSource) -> Iterator[dict]:
    for example in make(source):
        yield {name: list(example[name]) for name in ("input_ids", "labels")} | {
            "position_ids": list(range(len(example["input_ids"])))
        }


def _to_rows(batch: dict[str, list], source: DataSource, tokenizer, length: int, packing: bool) -> dict[str, list]:
    """A batch of documents as a batch of rows."""
    columns = list(batch)
    documents = (
        tokenize_document(dict(zip(columns, values, strict=True)), source, tokenizer)
        for values in zip(*batch.values(), strict=True)
    )
    if packing:
        rows = list(pack(documents, length))
    else:
        rows = [row for document in documents for row in pack([document], length)]
    return {name: [row[name] for row in rows] for name in PACKED_COLUMNS}


def mix(parts: list[Dataset | IterableDataset], weights: list[float], seed: int = 0) -> Dataset | IterableDataset:
    """Rows of several data sets in proportion to `weights`; the smaller ones are repeated until each was read once."""
    if len(parts) == 1:
        return parts[0]
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        _of_one_kind(parts), probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted"
    )


def join(parts: list[Dataset | IterableDataset]) -> Dataset | IterableDataset:
    """Rows of several data sets, each once."""
    return concatenate_datasets(_of_one_kind(parts))


def _of_one_kind(parts: list[Dataset | IterableDataset]) -> list[Dataset] | list[IterableDataset]:
    if any(isinstance(part, IterableDataset) for part in parts):
        return [part.to_iterable_dataset() if isinstance(part, Dataset) else part for part in parts]
    return parts


def split_validation(
    parts: list[Dataset], weights: list[float], fraction: float, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """
    Training rows, mixed as `mix` does, and validation rows, each once, of which none is a training row: this share of every data set
    that has two rows at least.

    Raises:
        ValueError: if none has, for streamed rows, or a fraction that is not inside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`validation_fraction` is {fraction}, but must be above 0 and below 1")
    if any(isinstance(rows, IterableDataset) for rows in parts) or all(len(rows) < 2 for rows in parts):
        raise ValueError(
            "`validation_fraction` needs at least two rows of a source, and none that are streamed or generated; name `validation` "
            "sources instead, or shorten `sequence_length`"
        )
    training, validation = [], []
    for rows in parts:
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        training.append(rows.select(sorted(order[count:])))
        validation.append(rows.select(sorted(order[:count])))
    return mix(training, weights, seed), join(validation)


@dataclass
class RowCollator:
    """
    Rows as one batch: padded at the end, without labels and without attention there. Rows may have `label_weights`.

    Attributes:
        pad_token_id: what stands in the padding; never read.
        length: pad to this many tokens; None: to the longest row.
    """

    pad_token_id: int = 0
    length: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = max(longest, self.length or 0)
        fillers: dict[str, float] = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        if "label_weights" in rows[0]:
            fillers["label_weights"] = 0.0
        batch = {
            name: torch.tensor([list(row[name]) + [filler] * (length - len(row[name])) for row in rows])
            for name, filler in fillers.items()
        }
        real = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        return batch | {"attention_mask": torch.tensor(real)}
