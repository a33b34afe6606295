"""Publishing a model folder: check that it loads for strangers, and stage exactly the files that belong on the Hub."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from yaml import YAMLError

from modeling_bwr_dnc.staging import complete_folder

# What a tokenizer is saved as.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Where a tokenizer keeps chat templates that have names.
CHAT_TEMPLATES = "additional_chat_templates"
# What `save_pretrained` calls the weights, whole or in parts. A memory is a safetensors file, too, and holds what was read.
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Everything else in the folder (states, optimizers, notes, secrets) stays at home.
PUBLISHED = (
    "README.md",
    "LICENSE*",
    "config.json",
    "generation_config.json",
    "conversion.json",
    *WEIGHT_FILES,
    *TOKENIZER_FILES,
    "*.py",
    "*.png",
)


def check_model_folder(folder: str | Path) -> None:
    """Make sure that a stranger could load this folder with `trust_remote_code=True`.

    Raises:
        ValueError: if the folder, its weights, a code file that it refers to, or the card's metadata is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder (it holds no config.json)")
    for name in _weight_files(folder):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name}, a part of its weights; restore it from a copy")
        try:
            # Its header says how long the file is; nothing else is read.
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the weights in {path} are damaged ({error}); restore them from a copy") from error
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict) or not config.get("auto_map"):
        raise ValueError(f"{folder}/config.json names no code files (auto_map); save the model with save_pretrained")
    # The one of a tokenizer is a pair, slow and fast.
    references = [r for value in config["auto_map"].values() for r in (value if isinstance(value, list) else [value])]
    for reference in filter(None, references):
        module = folder / f"{reference.rpartition('--')[2].partition('.')[0]}.py"
        if not module.is_file():
            raise ValueError(f"{folder} lacks {module.name}, which its config.json refers to")
        try:
            get_relative_import_files(module)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} lacks {Path(error.filename).name}, which {module.name} imports") from error
    _check_card(folder / "README.md")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); restore it from a copy") from error


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that a model's weights are in, there or not."""
    whole, _, index = WEIGHT_FILES
    if (folder / whole).is_file():
        return [whole]
    if not (folder / index).is_file():
        raise ValueError(f"{folder} holds no weights ({whole}, or {index} and its parts)")
    parts = _read_json(folder / index)
    if not isinstance(parts, dict) or not parts.get("weight_map"):
        raise ValueError(f"{folder / index} names no parts of the weights (weight_map); restore it from a copy")
    return sorted(set(parts["weight_map"].values()))


def _check_card(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no model card (README.md); model_cards/TEMPLATE.md is one to fill in")
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data.to_dict()
    except (ValueError, YAMLError) as error:
        raise ValueError(f"the metadata of {path} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("library_name", "pipeline_tag"):
        if key not in data:
            raise ValueError(f"the metadata of {path} lacks {key!r}")


def stage_model_folder(folder: str | Path, staging: str | Path) -> list[Path]:
    """Check `folder` and copy the files to publish into the new folder `staging`; returns them, sorted by name.

    Raises:
        ValueError: as `check_model_folder` does, or if `staging` exists and is not empty.
    """
    folder, staging = Path(folder), Path(staging)
    check_model_folder(folder)
    if staging.exists() and any(staging.iterdir()):
        raise ValueError(f"{staging} is not empty; choose another folder")
    with complete_folder(staging.absolute(), staging=f"{staging.name}.partial") as partial:
        for path in sorted(folder.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PUBLISHED):
                shutil.copyfile(path, partial / path.name)
            elif path.is_dir() and path.name == CHAT_TEMPLATES:
                shutil.copytree(path, partial / path.name)
    return sorted(staging.iterdir())


def upload_model_folder(staging: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a staged folder to the Hub, where it becomes `repo_id`; returns its address."""
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message="Upload BWR-DNC model")
    return str(address)
