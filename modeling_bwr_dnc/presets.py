"""Where the presets and tokenizers are: beside the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def preset_path(name: str) -> Path:
    """Folder of the preset `name`, to be given to `AutoConfig.from_pretrained`.

    Raises:
        ValueError: if there is no such preset; the message lists those there are.
    """
    return _find("configuration", "preset", name)


def tokenizer_path(name: str = "bwr-dnc-bpe-50k") -> Path:
    """Folder of the tokenizer `name`, to be given to `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: if there is no such tokenizer; the message lists those there are.
    """
    return _find("tokenization", "tokenizer", name)


def list_presets() -> list[str]:
    """Names of all presets."""
    return _names("configuration")


def _names(kind: str) -> list[str]:
    found = ("config.json", "tokenizer.json")
    return sorted(path.name for path in _folder(kind).iterdir() if any((path / name).is_file() for name in found))


def _folder(kind: str) -> Path:
    installed = _PACKAGE / "_data" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def _find(kind: str, noun: str, name: str) -> Path:
    known = _names(kind)
    if name not in known:
        raise ValueError(f"no {noun} is called {name!r}; known are {', '.join(known)}")
    return _folder(kind) / name
