"""What the command lines share: the text to work on, loading a model, and errors as one line with exit code 2."""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from modeling_bwr_dnc import BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.loading import first_line, read_model, read_tokenizer
from modeling_bwr_dnc.texts import check_text, read_text_file


def run(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    """Parse the arguments and run the command; what the user can mend becomes one line on stderr and exit code 2."""
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        command(arguments)
    except ModuleNotFoundError as error:
        parser.exit(2, f"{parser.prog}: error: {error.name} is not installed; pip install {error.name}\n")
    except (ValueError, OSError, SafetensorError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


def quiet_libraries() -> None:
    """Leave the terminal to the command: no progress bars of loaders, no warnings of libraries."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one, else cpu)")


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory-slots", nargs=3, type=int, metavar="N", help="another budget: raw, 2x, 4x")
    parser.add_argument(
        "--slot-shares",
        nargs="+",
        type=float,
        metavar="X",
        help="how many times these slots each layer has (1; the model's, where its slots are left as they are)",
    )


def use_budget(model: BwrDncForCausalLM, arguments: argparse.Namespace) -> None:
    """Give `model` the slots that are asked for. Raises `ValueError` if they do not fit it."""
    if arguments.memory_slots is not None:
        model.config.memory_slots, model.config.slot_shares = arguments.memory_slots, None
    if arguments.slot_shares is not None:
        model.config.slot_shares = arguments.slot_shares
    model.config.validate_architecture()


def check_device(name: str | None) -> torch.device:
    """The device that is asked for; without a name CUDA's, if torch finds one. Raises `ValueError` for one that is not there."""
    try:
        device = torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, which torch cannot use here: {first_line(error)}; use cpu") from error
    if device.type == "meta":
        raise ValueError("--device is 'meta', which holds no values to compute with; use cpu")
    return device


def load_model(name: str, device: str | None = None) -> tuple[BwrDncForCausalLM, PreTrainedTokenizerBase]:
    """A BWR-DNC model and its tokenizer, from a folder or the Hub; see `load_bare_model`."""
    return load_bare_model(name, device), read_tokenizer(name)


def load_bare_model(name: str, device: str | None = None) -> BwrDncForCausalLM:
    """A BWR-DNC model that may have no tokenizer; for `device` see `check_device`."""
    path = Path(name)
    if not path.is_dir() and (path.exists() or path.is_absolute() or name.count("/") != 1):
        raise ValueError(f"no model folder at {name}; convert a model first (python -m scripts.convert --help)")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is no model folder (it holds no config.json)")
    place = check_device(device)
    return read_model(name).to(place).eval()


def check_output(place: str | Path) -> None:
    """Raises `ValueError` if no folder can be written at `place`: said before the work, not after it."""
    place = Path(place).absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file")
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {place} ({error.strerror or error}); choose another folder"
        ) from error


def check_no_results(folder: str | Path) -> None:
    """Raises `ValueError` if an earlier run has left its results in `folder`."""
    if (Path(folder) / "results.json").exists():
        raise ValueError(f"{folder} holds the results of an earlier run; choose another folder, or remove it")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raises `ValueError` if an option, or one of its values, is below the number given for it."""
    for name, bound in least.items():
        value = getattr(arguments, name)
        for each in value if isinstance(value, list) else [value]:
            if not each >= bound:
                raise ValueError(f"--{name.replace('_', '-')} is {each}, but must be at least {bound}")


def key_and_value(item: str) -> tuple[str, object]:
    """KEY=VALUE, with the value read as JSON where it is any. Raises `ValueError` for what has no `=`."""
    key, found, value = item.partition("=")
    if not found:
        raise ValueError(f"a setting is {item!r}, but must be KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def load_state(folder: str, model: BwrDncForCausalLM) -> StateBankCache:
    """A saved StateBank, checked against the model that will read it, and on its device."""
    if not Path(folder).is_dir():
        raise ValueError(f"no state folder at {folder}; scripts.generate --state writes one")
    return StateBankCache.from_pretrained(folder, config=model.config, device=model.device)


def gather_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text to start from: the file, then the prompt; with neither, standard input."""
    parts = [] if prompt_file is None else [read_text_file(prompt_file)]
    if prompt is not None:
        parts.append(check_text(prompt.encode("utf-8", "surrogateescape"), "the prompt"))
    if not parts:
        if sys.stdin.isatty():
            print("Type the text to continue, then end it with Ctrl-D:", file=sys.stderr)
        parts.append(check_text(sys.stdin.buffer.read(), "standard input"))
    return "\n\n".join(parts)
