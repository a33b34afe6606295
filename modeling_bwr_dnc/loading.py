"""Reading a saved model so that whatever is wrong with its folder is a `ValueError` that says so."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from .configuration_bwr_dnc import BwrDncConfig
from .memory_parameters import is_memory_parameter
from .modeling_bwr_dnc import BwrDncForCausalLM


def read_config(name: str | Path, **settings) -> BwrDncConfig:
    """
    The config of a folder or Hub repository, with `settings` in place of its own.

    Raises:
        ValueError: if it cannot be read, is of another architecture, or the settings do not fit.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **settings)
    except (OSError, TypeError) as error:
        raise ValueError(f"the config of {name} could not be read: {first_line(error)}") from error
    if config.model_type != BwrDncConfig.model_type:
        raise ValueError(
            f"{name} is a {config.model_type} model; convert it first: python -m scripts.convert --source {name}"
        )
    return config


def read_model(name: str | Path, **options) -> BwrDncForCausalLM:
    """
    `from_pretrained`, for weights that are all there.

    Raises:
        ValueError: as `read_config` does, or if the weights are missing, damaged, of other shapes, or not complete.
    """
    read_config(name)
    try:
        model, report = BwrDncForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {name} could not be read: {first_line(error)}; restore them from a copy"
        ) from error
    missing = [key for key in report["missing_keys"] if not _is_optional(key)]
    absent = sorted(missing) + sorted(key for key, *_ in report["mismatched_keys"])
    if absent:
        raise ValueError(
            f"{name} lacks the tensor {absent[0]!r} (and {len(absent) - 1} more) or has it in another shape, so it would start "
            "out random; restore the weights from a copy"
        )
    return model


def _is_optional(name: str) -> bool:
    """Whether a parameter is of a part that settings may add to a saved model: it starts out neutral."""
    return is_memory_parameter(name) or ".short_conv." in name


def read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub repository. Raises `ValueError` if it has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        # The library has no error of its own: it is whatever its first reader stumbles over.
        raise ValueError(f"{name} holds no tokenizer that can be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Of its message, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
