"""Texts: what a file holds, and one that every Python carries."""

import pydoc_data.topics
from pathlib import Path


def python_manual() -> str:
    """A real text that every Python carries: the language reference topics of `help()`, in alphabetical order."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text_file(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: if the file is missing, empty or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    return check_text(path.read_bytes(), str(path))


def check_text(content: bytes, name: str) -> str:
    """`content` as text; raises `ValueError` if it is blank or not UTF-8 text."""
    try:
        # Without the mark that some editors begin a file with, which would be the first token.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); give a text file") from error
    if "\0" in text:
        raise ValueError(f"{name} holds NUL bytes, so it is a binary file; give a text file")
    if not text.strip():
        raise ValueError(f"{name} is empty; give it some text")
    return text
