"""From a pretrained checkpoint to a folder that holds everything its BWR-DNC model needs."""

import json
import os
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_relative_imports

from modeling_bwr_dnc.conversion.hub_folder import CHAT_TEMPLATES, TOKENIZER_FILES, WEIGHT_FILES
from modeling_bwr_dnc.conversion.llama_family import (
    EqualityProof,
    converted_config,
    prove_equality,
    source_window,
    transfer_weights,
)
from modeling_bwr_dnc.conversion.memory_adapter import adapter_budget, load_memory_adapter
from modeling_bwr_dnc.conversion.model_card import write_model_card
from modeling_bwr_dnc.conversion.sources import Source, load_source
from modeling_bwr_dnc.memory_parameters import is_memory_parameter
from modeling_bwr_dnc.staging import check_kept, complete_folder
from modeling_bwr_dnc.texts import python_manual, read_text_file

RECORD_FILE = "conversion.json"
# What a converted model's folder holds, beside the code that it loads with.
_ENTRIES = (
    RECORD_FILE,
    "README.md",
    "config.json",
    "generation_config.json",
    *WEIGHT_FILES,
    *TOKENIZER_FILES,
    CHAT_TEMPLATES,
)


@dataclass
class Conversion:
    """What a conversion did; saved beside the model as `conversion.json`.

    Attributes:
        source: name of the folder, file or repository that was converted.
        segment_length, num_sink_tokens, memory_slots, slot_shares, layer_types, dtype: what the converted model was given.
        lossless_length: tokens up to which it equals full attention.
        num_parameters: all parameters, tied ones once.
        num_memory_parameters: those of the memory, which the source does not have.
        memory_adapter: names of the memory parameters that came from an adapter; the others are neutral.
        notices: what the user should know about this source.
        proof: the measured equality with the source, `None` if it was not asked for.
    """

    source: str
    segment_length: int
    num_sink_tokens: int
    memory_slots: list[int]
    slot_shares: list[float] | None
    layer_types: list[str]
    dtype: str
    lossless_length: int
    num_parameters: int
    num_memory_parameters: int
    memory_adapter: list[str]
    notices: list[str]
    proof: EqualityProof | None


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    segment_length: int | None = None,
    num_sink_tokens: int | None = None,
    memory_slots: list[int] | None = None,
    layer_types: str | None = None,
    dtype: torch.dtype | None = None,
    memory_adapter: str | Path | None = None,
    card: str | Path | None = None,
    allow_sliding_window: bool = False,
    prove: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """Convert `source`, prove that the result equals it, and only then write `output`.

    The folder holds the weights (safetensors), config, generation config, tokenizer with its chat template, model card,
    the record of the conversion, and the Python files with which it loads elsewhere (`trust_remote_code=True`).

    Args:
        source: a local folder, a Hub name or a `.gguf` file of a Llama, Mistral, Qwen2, Qwen3 or SmolLM2 model.
        output: the folder to write; it appears only when complete.
        segment_length, num_sink_tokens, memory_slots, layer_types, allow_sliding_window: see `converted_config`. Slots that are
            `None` are those that the memory adapter is meant for, layer by layer, if it says so.
        dtype: type of the saved weights; `None` keeps the source's (float32 for GGUF).
        memory_adapter: safetensors file of trained memory parameters, see `load_memory_adapter`.
        card: a model card to use as README.md; `None` writes one.
        prove: measure equality with the source. Without it nothing is compared.
        overwrite: replace `output` if it exists, and holds what a conversion wrote and nothing else.

    Raises:
        ValueError: if the source cannot be read or equalled, the card is no text, or `output` exists and is not to be
            overwritten, holds anything but a converted model, or is or holds what is read.
        OSError: if `output` cannot be written; what stood there stays.
    """
    output = Path(os.path.abspath(output))
    staging = f"{output.name}.partial"
    for path in (source, memory_adapter):
        if path:
            check_kept(Path(path).expanduser(), output, staging)
    _check_replaceable(output, overwrite)
    card_text = None if card is None else read_text_file(card)

    budget: dict = {"memory_slots": memory_slots}
    if memory_slots is None and memory_adapter is not None:
        budget = adapter_budget(memory_adapter)
    original = load_source(source, dtype)
    # Files may say that head and embeddings are one, and hold both: then the library takes them for two.
    embeddings, head = original.model.get_input_embeddings(), original.model.get_output_embeddings()
    original.model.config.tie_word_embeddings = head.weight is embeddings.weight
    config = converted_config(
        original.model.config,
        segment_length,
        num_sink_tokens,
        layer_types=layer_types,
        allow_sliding_window=allow_sliding_window,
        **budget,
    )
    model = transfer_weights(original.model, config)
    adapted = [] if memory_adapter is None else load_memory_adapter(model, memory_adapter)
    proof = prove_equality(original.model, model, original.tokenizer, python_manual()) if prove else None
    memory_sizes = [p.numel() for name, p in model.named_parameters() if is_memory_parameter(name)]
    record = Conversion(
        source=original.name,
        segment_length=config.segment_length,
        num_sink_tokens=config.num_sink_tokens,
        memory_slots=list(config.memory_slots),
        slot_shares=None if config.slot_shares is None else list(config.slot_shares),
        layer_types=config.layer_types,
        dtype=str(model.dtype).removeprefix("torch."),
        lossless_length=config.lossless_length,
        num_parameters=model.num_parameters(),
        num_memory_parameters=sum(memory_sizes),
        memory_adapter=adapted,
        notices=_notices(original, proof),
        proof=proof,
    )

    with complete_folder(output, staging=staging) as partial:
        model.save_pretrained(partial)
        if original.tokenizer is not None:
            # The source's limit on the length of a text no longer holds.
            original.tokenizer.model_max_length = int(1e30)
            original.tokenizer.save_pretrained(partial)
        (partial / RECORD_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        if card_text is not None:
            (partial / "README.md").write_text(card_text, encoding="utf-8")
        else:
            write_model_card(partial / "README.md", original, record)
    return record


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Raises `ValueError` for what must not be replaced: anything unless asked for, and then only a converted model."""
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists already; choose another folder, or overwrite it (--overwrite)")
    names = sorted(os.listdir(output)) if output.is_dir() else [output.name]
    if names and RECORD_FILE not in names:
        raise ValueError(
            f"{output} is no converted model (it holds no {RECORD_FILE}), so it is kept; choose another folder"
        )
    code = _code_files(output)
    foreign = [name for name in names if name not in code and not any(fnmatch(name, entry) for entry in _ENTRIES)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ValueError(
            f"{output} holds {shown}, but must hold a converted model and nothing else to be overwritten; move that "
            "elsewhere, or choose another folder"
        )


def _code_files(folder: Path) -> set[str]:
    """Names of the Python files that the model in `folder` loads with, whichever version wrote them."""
    found: set[str] = set()
    waiting = ["configuration_bwr_dnc", "modeling_bwr_dnc"]
    while waiting:
        path = folder / f"{waiting.pop()}.py"
        if path.name not in found and path.is_file():
            found.add(path.name)
            waiting += get_relative_imports(path)
    return found


def _notices(original: Source, proof: EqualityProof | None) -> list[str]:
    notices = []
    window = source_window(original.model.config)
    if window is not None:
        tested = "" if proof is None else f" (tested up to {proof.length} tokens)"
        notices.append(
            f"The source sees a sliding window of {window} tokens; the converted model sees its bank as well, so beyond "
            f"that length the two differ{tested}."
        )
    if original.tokenizer is None:
        notices.append("The source has no tokenizer; add one to the folder before using it with text.")
    return notices
