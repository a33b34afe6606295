"""Memory adapters: the trained memory parameters of a model, without the base weights they were trained on.

An adapter is one safetensors file that holds only tensors whose names contain ".memory." (salience, routing, compressor).
It is small, and it is all that training the memory of a frozen checkpoint changes. The run-time settings that a trained memory
counts on travel with it. So do the slots it is meant for, which a conversion takes unless it is told otherwise.
"""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_bwr_dnc.memory_parameters import MEMORY, is_memory_parameter

SECONDARY = ".secondary_salience."
SETTINGS = (
    "salience_pooling",
    "salience_boost",
    "attention_boost",
    "salience_scale",
    "recency_weight",
    "usage_weight",
)


def save_memory_adapter(model: PreTrainedModel, path: str | Path) -> list[str]:
    """Write those memory parameters of the model that are not neutral (zero) to `path` and return their names.

    Raises:
        ValueError: if the model has no memory parameters, an untrained memory, or one with numbers that are not finite; a file that
            is there already is kept.
        OSError: if the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if is_memory_parameter(name)}
    if not tensors:
        raise ValueError("the model has no memory parameters; give it at least one 'state_bank_attention' layer")
    tensors = {name: tensor for name, tensor in tensors.items() if bool(tensor.any())}
    if not tensors:
        raise ValueError("all memory parameters of the model are neutral; train its memory first")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"the memory parameter {broken[0]!r} (of {len(broken)}) holds numbers that are not finite; train it anew"
        )
    settings = {name: getattr(model.config, name) for name in SETTINGS}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {
        "format": "pt",
        "model_type": model.config.model_type,
        "settings": json.dumps(settings),
        "memory_slots": json.dumps(list(model.config.memory_slots)),
        "slot_shares": json.dumps(model.config.slot_shares),
    }
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error
    return sorted(tensors)


def load_memory_adapter(model: PreTrainedModel, path: str | Path) -> list[str]:
    """
    Copy the adapter's tensors into the model, its settings into the model's config, and return the names of the tensors.
    Memory parameters it lacks stay as they are, and so does the budget, `memory_slots` and `slot_shares`.

    Raises:
        ValueError: if the file cannot be read, holds a tensor that is no memory parameter of this model, holds one in
            another shape, or holds numbers that are not finite. The model is then unchanged.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        settings = _said(path, file, "settings")
    if not tensors:
        raise ValueError(f"the memory adapter {path} is empty")
    shapes = {name: place.shape for name, place in model.state_dict().items() if is_memory_parameter(name)}
    # The second head is one like the first, and comes with the adapter.
    shapes |= {name.replace(".salience.", SECONDARY): shape for name, shape in shapes.items() if ".salience." in name}
    for name, tensor in tensors.items():
        if not is_memory_parameter(name):
            raise ValueError(f"the memory adapter {path} holds {name!r}, which is no memory parameter ('{MEMORY}')")
        if name not in shapes:
            raise ValueError(f"the memory adapter {path} holds {name!r}, which this model does not have")
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"the memory adapter's {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(shapes[name])}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"the memory adapter's {name!r} holds numbers that are not finite")
    if not isinstance(settings, dict | None):
        raise ValueError(
            f"the memory adapter {path} has the settings {settings!r}, but they must be names with values"
        )
    settings = settings or {}
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"the memory adapter {path} has the settings {unknown}, but may have {list(SETTINGS)} only")
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    config.validate_architecture()
    if any(SECONDARY in name for name in tensors):
        model.add_secondary_salience()
    places = model.state_dict()
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return sorted(tensors)


def adapter_budget(path: str | Path) -> dict[str, list]:
    """`memory_slots` and `slot_shares` that the adapter is meant for; without what it does not say.

    Raises:
        ValueError: if the file cannot be read, or what it says are no such lists.
    """
    with _opened(path) as file:
        said = {name: _said(path, file, name) for name in ("memory_slots", "slot_shares")}
    budget = {}
    for name, is_one, rule in (
        ("memory_slots", lambda found: [type(count) for count in found] == [int] * 3, "three counts"),
        ("slot_shares", lambda found: {type(share) for share in found} <= {int, float}, "numbers"),
    ):
        found = said[name]
        if found is not None and not (isinstance(found, list) and is_one(found)):
            raise ValueError(
                f"the memory adapter {path} is meant for {name} = {found!r}, but they must be a list of {rule}"
            )
        if found is not None:
            budget[name] = found
    return budget


def _said(path: str | Path, file: safe_open, name: str) -> object:
    """A piece of an adapter's metadata, None if it is not there. Raises `ValueError` for what is no JSON, NaN among it."""
    text = (file.metadata() or {}).get(name, "null")
    try:
        return json.loads(text, parse_constant=lambda constant: json.loads(f"no {constant}"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the memory adapter {path} has {name} = {text}, which is no JSON ({error}); restore it from a copy"
        ) from error


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the memory adapter {path} could not be read: {error}") from error
