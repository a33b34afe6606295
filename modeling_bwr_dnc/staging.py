"""Folders and files that appear only when they are complete."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

STAGING = ".incomplete"


@contextmanager
def complete_folder(
    folder: Path, is_writer: bool = True, wait: Callable[[], None] = lambda: None, staging: str = STAGING
) -> Iterator[Path]:
    """
    Gives a folder of the same name to write into, below `staging`, which is cleared first; syncs it and renames it to `folder`
    at the end.

    Whatever happens before the rename, what stood at `folder` stays. Of several processes, the one that `is_writer` renames;
    `wait` is called so that all have written before, and none goes on until it is done.

    Raises:
        OSError: naming `folder`, if it could not be written, such as on a full disk; nothing of it is left.
    """
    staged = folder.parent / staging / folder.name
    if is_writer:
        shutil.rmtree(staged.parent, ignore_errors=True)
        staged.mkdir(parents=True)
    wait()
    try:
        yield staged
    except BaseException as error:
        shutil.rmtree(staged.parent, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)) or _is_short_write(error):
            raise OSError(f"{folder} could not be written ({error}); what was there before is intact.") from error
        raise
    wait()
    if is_writer:
        _sync(staged)
        old = staged.parent / f"{folder.name}.replaced"
        if folder.exists():
            os.rename(folder, old)
        os.rename(staged, folder)
        _sync_one(folder.parent)
        shutil.rmtree(staged.parent, ignore_errors=True)
    wait()


def check_kept(path: Path, folder: Path, staging: str = STAGING) -> None:
    """Raises `ValueError` if `complete_folder(folder, staging=staging)` would remove `path`, which is read."""
    for place in (folder, folder.parent / staging):
        if path.exists() and path.resolve().is_relative_to(place.resolve()):
            raise ValueError(
                f"{path} is read, but writing {folder} would remove it; choose an output that is neither it nor around it"
            )


def write_text(path: Path, text: str) -> None:
    """Either `path` holds the whole text afterwards, or what it held before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _is_short_write(error: BaseException) -> bool:
    """Whether `torch.save` or `tokenizers` could not write; they have no exceptions of their own for it."""
    words = ("iostream error", "PytorchStreamWriter", "unexpected pos", "os error")
    return isinstance(error, Exception) and any(word in str(error) for word in words)


def _sync(folder: Path) -> None:
    """Everything in `folder` is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(parent) / name)
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
