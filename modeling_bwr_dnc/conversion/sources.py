"""Reading a pretrained checkpoint: a local folder, a Hub name or a GGUF file.

Whatever its form, a source becomes a plain Transformers model whose every tensor came from its files. Transformers itself
only warns when a checkpoint holds tensors that the model has no place for, or lacks some that it needs; here both are
errors, because a conversion that silently drops a tensor is no conversion.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, hf_hub_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_bwr_dnc.loading import first_line

# Buffers that old Llama-family files carry and that every model computes by itself; they are not weights.
_COMPUTED_TENSORS = ("rotary_emb.inv_freq",)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass
class Source:
    """A pretrained checkpoint, read.

    Attributes:
        name: the folder's, file's or repository's name, as messages and cards show it.
        model: the plain causal language model, without any quantisation, in evaluation mode.
        tokenizer: its tokenizer, or `None` when the source has none.
        base_model: the Hub repository it comes from, or `None` when that is not known.
        license: its licence as the Hub spells it ("apache-2.0"), or `None` when that is not known.
        languages: its language codes, possibly none.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    base_model: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()


def load_source(source: str | Path, dtype: torch.dtype | None = None) -> Source:
    """Read `source`: a local folder, a `.gguf` file or a Hub repository name.

    Args:
        dtype: floating-point type of the weights; `None` keeps the type the files were saved in (float32 for GGUF).

    Raises:
        ValueError: if the source does not exist, is quantised (GGUF apart), or if its tensors are not exactly those of
            its architecture; the message names the tensor.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    is_local = path.is_dir() and bool(str(source))
    if is_local and not (path / "config.json").is_file():
        raise ValueError(f"{path} is no model folder (it holds no config.json)")
    if not is_local and (
        path.exists() or path.is_absolute() or str(source).count("/") != 1 or str(source)[0] in "./~"
    ):
        raise ValueError(f"no source at {source!s}: give a folder, a .gguf file or a Hub name such as 'owner/model'")

    name = str(path) if is_local else str(source)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, TypeError) as error:
        place = "holds no readable config.json" if is_local else "could not be read from the Hub or its cache"
        raise ValueError(f"{name} {place}: {first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised; convert the unquantised checkpoint, then quantise the result")
    model = _load_exactly(name, config=config, dtype=dtype or "auto")
    base_model, license_name, languages = _read_card(name, is_local)
    repository = _repository_of_snapshot(path) if is_local else name
    return Source(
        name=repository or path.resolve().name,
        model=model,
        tokenizer=_load_tokenizer(name),
        base_model=repository or base_model,
        license=license_name,
        languages=languages,
    )


def _load_exactly(name: str, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, with an error wherever the library would only warn."""
    try:
        # Mismatched shapes are reported below, by name.
        model, report = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of {name} could not be read: {first_line(error)}") from error
    unknown = sorted(key for key in report["unexpected_keys"] if not key.endswith(_COMPUTED_TENSORS))
    if unknown:
        raise ValueError(
            f"{name} holds the tensor {unknown[0]!r} (and {len(unknown) - 1} more), which {type(model).__name__} has no "
            "place for; converting would lose it"
        )
    absent = sorted(report["missing_keys"]) or sorted(key for key, *_ in report["mismatched_keys"])
    if absent:
        raise ValueError(
            f"{name} lacks the tensor {absent[0]!r} (and {len(absent) - 1} more) or has it in another shape; it would "
            "start out random"
        )
    return model.eval()


def _load_tokenizer(name: str, **options) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        # Transformers has no error of its own for a folder without a tokenizer: only its files tell.
        found = [file for file in _VOCABULARY_FILES if "gguf_file" not in options and Path(name, file).is_file()]
        if found:
            raise ValueError(
                f"{found[0]} in {name} could not be read ({first_line(error)}); restore it from a copy, install what reads it, or "
                "remove it to convert without a tokenizer"
            ) from error
        return None
    # Nor for one of a Qwen model: its tokenizer is then one without a vocabulary.
    return tokenizer if tokenizer("Any text, 1 2 3", add_special_tokens=False).input_ids else None


def _repository_of_snapshot(path: Path) -> str | None:
    """`owner/model` if the folder lies in the Hub's cache (models--owner--model/snapshots/COMMIT), else `None`."""
    repository = path.absolute().parent.parent.name
    is_snapshot = path.absolute().parent.name == "snapshots" and repository.startswith("models--")
    return repository.removeprefix("models--").replace("--", "/") if is_snapshot else None


def _read_card(name: str, is_local: bool) -> tuple[str | None, str | None, tuple[str, ...]]:
    """`(base_model, license, languages)` from the source's model card, as far as it says."""
    try:
        path = Path(name, "README.md") if is_local else Path(hf_hub_download(name, "README.md"))
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None, None, ()
    base_model = data.base_model[0] if isinstance(data.base_model, list) else data.base_model
    languages = (data.language,) if isinstance(data.language, str) else tuple(data.language or ())
    return base_model, data.license, languages


def _load_gguf(path: Path, dtype: torch.dtype | None) -> Source:
    """Read a GGUF file, de-quantised, as a plain model that can be saved."""
    if not path.is_file():
        raise ValueError(f"no GGUF file at {path}")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("reading a GGUF file needs the package 'gguf': pip install gguf") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {first_line(error)}") from error

    folder, file_name = str(path.parent), path.name
    _check_gguf_settings(path.name, reader)
    try:
        dequantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file_name, dtype=dtype or torch.float32)
        plain = _without_quantisation(dequantised, path.stem)
    except RuntimeError as error:
        raise ValueError(
            f"{path.name} does not fit its own description ({first_line(error)}), as where only a part of each head is rotated; convert "
            "another model, or the original folder"
        ) from error
    _check_gguf_tensors(path.name, reader, dequantised)
    tokenizer = _load_tokenizer(folder, gguf_file=file_name)
    if tokenizer is not None:
        _restore_digit_splitting(tokenizer, _field(reader, "tokenizer.ggml.pre"))
    return Source(
        name=path.name,
        model=plain,
        tokenizer=tokenizer,
        license=_field(reader, "general.license"),
        languages=tuple(_field(reader, "general.languages") or ()),
    )


def _field(reader, key: str):
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_gguf_settings(name: str, reader) -> None:
    """Refuse what the library reads past without a word: scaled rotary angles and sliding windows."""
    architecture = _field(reader, "general.architecture")
    settings = {
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (0, 1),
        "rope.scale_linear": (0, 1),
        "attention.sliding_window": (0,),
    }
    for suffix, neutral in settings.items():
        value = _field(reader, f"{architecture}.{suffix}")
        if value is not None and value not in neutral:
            raise ValueError(
                f"{name} sets {suffix} = {value!r}, which is lost in reading GGUF files; convert the original folder"
            )


def _check_gguf_tensors(name: str, reader, model: PreTrainedModel) -> None:
    """Every tensor of the file must be one of the model's and the reverse; the library skips unknown names in silence."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = _field(reader, "general.architecture")
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    name_map = get_tensor_name_map(arch, model.config.num_hidden_layers)
    expected = set()
    for key in model.state_dict():
        stem, _, suffix = key.rpartition(".")
        expected.add(f"{name_map.get_name(stem)}.{suffix}")
    if model.config.tie_word_embeddings:
        expected.discard("output.weight")
    present = {tensor.name for tensor in reader.tensors}
    if unknown := sorted(present - expected):
        raise ValueError(
            f"{name} holds the tensor {unknown[0]!r}, which {type(model).__name__} has no place for; converting would lose it"
        )
    if absent := sorted(expected - present):
        raise ValueError(f"{name} lacks the tensor {absent[0]!r}; it would start out random")


def _without_quantisation(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The same weights in a model that has forgotten it was read from GGUF, so that it can be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    config.name_or_path = name
    # GGUF stores this number in float32; 1e-5 comes back as 9.999999747378752e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def _restore_digit_splitting(tokenizer: PreTrainedTokenizerBase, pre_tokenizer_name: str | None) -> None:
    """SmolLM tokenizers split every digit off before merging; Transformers rebuilds them from GGUF without that step."""
    if pre_tokenizer_name != "smollm":
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
