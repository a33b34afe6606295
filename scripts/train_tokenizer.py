"""Train a byte-level BPE tokenizer on files and folders, or compare a trained one with another on other text.

Text files are read as UTF-8, .gz ones are unpacked, of HTML only the text counts, and what is no text is left out. Nothing
is ever out of vocabulary: unknown words become smaller pieces, in the end single bytes, and decoding gives back the input.

Examples:
  python -m scripts.train_tokenizer --input books/ docs/@8 code/@20 --output my-tokenizer
  python -m scripts.train_tokenizer --compare novel.txt code.py --tokenizer my-tokenizer --reference HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import gzip
import random
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_bwr_dnc.loading import read_tokenizer
from modeling_bwr_dnc.staging import complete_folder
from scripts.command_line import check_output, run

DEFAULT_TOKENIZER = "tokenization/bwr-dnc-bpe-50k"

# Ids 0, 1, 2 and 3. BwrDncConfig expects the end of a document at 0.
END_OF_TEXT, MESSAGE_START, MESSAGE_END, PADDING = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)

# ChatML. `generation` marks what the assistant wrote, for training on these tokens alone.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Merges stay within these pieces: a contraction, a word with the space before it, one digit, punctuation, white space.
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
LONGEST_TOKEN = 24
BLOCK = 16_384
SHORTEST_UNIQUE_LINE = 24
HTML_SUFFIXES = {".html", ".htm", ".xhtml", ".page"}


class HtmlText(HTMLParser):
    """The text of a page: one line per paragraph, `pre` as it stands, scripts and navigation left out."""

    HIDDEN = {"script", "style", "nav", "head"}
    INLINE = set("a abbr app b cite cmd code em file gui i input key link span strong tt var".split())

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.open_hidden = self.open_pre = 0

    def handle_starttag(self, tag, attrs):
        # The end of a head may be left out.
        self.open_hidden = 0 if tag == "body" else self.open_hidden + (tag in self.HIDDEN)
        self.open_pre += tag == "pre"
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        if tag not in self.INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.open_hidden = max(0, self.open_hidden - (tag in self.HIDDEN))
        self.open_pre = max(0, self.open_pre - (tag == "pre"))
        self.handle_startendtag(tag, ())

    def handle_data(self, data):
        if not self.open_hidden:
            self.parts.append(data if self.open_pre else re.sub(r"\s+", " ", data))

    @classmethod
    def of(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        parser.close()
        return re.sub(r" *\n(?: *\n)+ *", "\n\n", "".join(parser.parts)).strip()


def read_text(path: Path) -> str:
    """The text of a file; empty for what is no text."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data, path = gzip.decompress(data), path.with_suffix("")
        except (OSError, EOFError, zlib.error):
            return ""
    if b"\0" in data:
        return ""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return HtmlText.of(text) if path.suffix.lower() in HTML_SUFFIXES else text


def list_files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a text file or a folder")
    return (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    )


def split_input(argument: str) -> tuple[Path, float]:
    """`PATH` or `PATH@MEGABYTES` as a path and a number of bytes."""
    path, mark, megabytes = argument.rpartition("@")
    if not mark:
        return Path(argument), float("inf")
    try:
        limit = float(megabytes) * 1e6
    except ValueError:
        return Path(argument), float("inf")
    if not limit > 0:
        raise ValueError(f"{argument} asks for {megabytes} megabytes of {path}, but must ask for more than 0")
    return Path(path), limit


def read_inputs(inputs: list[str]) -> Iterator[str]:
    """Blocks of text of every input, in a fixed random order within it, up to its size.

    A long line that was read before (licences, page headers) is left out: it would become tokens of its own.
    """
    seen: set[int] = set()
    for argument in inputs:
        path, limit = split_input(argument)
        texts = (read_text(file) for file in tqdm(list_files(path), desc=str(path), unit="file"))
        blocks = [block for text in texts for block in split_blocks(text, seen)]
        random.Random(0).shuffle(blocks)
        taken = 0
        for block in blocks:
            if taken >= limit:
                break
            taken += len(block.encode())
            yield block
        tqdm.write(f"{path}: {taken / 1e6:.1f} MB")


def split_blocks(text: str, seen: set[int]) -> Iterator[str]:
    """Blocks of `BLOCK` characters or, to the end of a line, more; without long lines whose hash is in `seen`, which grows."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if len(line.strip()) >= SHORTEST_UNIQUE_LINE:
            if hash(line) in seen:
                continue
            seen.add(hash(line))
        lines.append(line)
        size += len(line)
        if size >= BLOCK:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def train_bpe(blocks: Iterator[str], vocab_size: int, show_progress: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` entries, special tokens and the 256 bytes included.

    Raises:
        ValueError: the text has too few different words for so many entries.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab-size is {vocab_size}, but must be at least {smallest}: the bytes and the special tokens"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=show_progress,
    )
    bpe.train_from_iterator(blocks, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gave {bpe.get_vocab_size():,} entries, but {vocab_size:,} were asked for; "
            "add more text, or lower --vocab-size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        extra_special_tokens=[MESSAGE_START, MESSAGE_END],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a .gguf file or the Hub."""
    path = Path(name)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return read_tokenizer(name)


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def compare(texts: list[str], tokenizer_name: str, reference_name: str) -> None:
    """Print bytes per token of two tokenizers on each text, as a Markdown table."""
    tokenizer, reference = load_tokenizer(tokenizer_name), load_tokenizer(reference_name)
    print(
        f"| text | bytes | this ({len(tokenizer):,} entries) | reference ({len(reference):,} entries) | this / reference |"
    )
    print("|---|---:|---:|---:|---:|")
    for argument in texts:
        path, limit = split_input(argument)
        text = "\n".join(filter(None, map(read_text, list_files(path))))
        num_bytes = len(text.encode())
        if limit < num_bytes:
            text = text.encode()[: int(limit)].decode(errors="ignore")
            num_bytes = len(text.encode())
        if not text:
            raise ValueError(f"{path} holds no text to compare on; name a text file or a folder of them")
        ours, theirs = (num_bytes / count_tokens(each, text) for each in (tokenizer, reference))
        print(f"| {path.stem} | {num_bytes:,} | {ours:.3f} | {theirs:.3f} | {ours / theirs:.3f} |")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.train_tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--input",
        nargs="+",
        metavar="PATH[@MB]",
        help="train on these files and folders; docs/@8 takes at most 8 megabytes of docs/",
    )
    task.add_argument(
        "--compare",
        nargs="+",
        metavar="PATH[@MB]",
        help="print bytes per token (more is better) on each of these files or folders",
    )
    parser.add_argument("--output", help="folder to write the trained tokenizer to")
    parser.add_argument(
        "--vocab-size", type=int, default=50_000, help="number of entries, special tokens included (50000)"
    )
    parser.add_argument(
        "--tokenizer", default=DEFAULT_TOKENIZER, help=f"with --compare: the tokenizer to judge ({DEFAULT_TOKENIZER})"
    )
    parser.add_argument(
        "--reference", help="with --compare: the one to compare with, a folder, a .gguf file or a Hub name"
    )
    return parser


def train_tokenizer(arguments: argparse.Namespace) -> None:
    if arguments.compare:
        if arguments.reference is None:
            raise ValueError("--compare needs --reference: a tokenizer folder, a .gguf file or a Hub name")
        compare(arguments.compare, arguments.tokenizer, arguments.reference)
        return
    if arguments.output is None:
        raise ValueError("--input needs --output: the folder to write the trained tokenizer to")
    output = Path(arguments.output).absolute()
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder")
    check_output(output)
    tokenizer = train_bpe(read_inputs(arguments.input), arguments.vocab_size)
    with complete_folder(output, staging=f"{output.name}.partial") as folder:
        tokenizer.save_pretrained(folder)
    print(f"{len(tokenizer):,} entries written to {arguments.output}")


if __name__ == "__main__":
    run(build_parser(), train_tokenizer)
