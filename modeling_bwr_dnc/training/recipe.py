"""One training run as one YAML file, with every key checked, and overrides from a command line."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType

import yaml

from ..field_types import check_types
from ..texts import read_text_file
from .arguments import BwrDncTrainingArguments
from .data import DataSource

METHODS = ("full", "memory", "lora", "qlora")
QUANTIZATIONS = ("nf4", "fp4", "int8")


@dataclass
class DataRecipe:
    """
    What to read.

    Attributes:
        sources: paths, or mappings with the fields of `DataSource`.
        validation: sources of the held-out rows, each read once whatever its weight, 256 rows of a task; or
            `validation_fraction` of the training rows is set aside, of every source that has two at least.
        sequence_length: tokens of a row.
        packing, streaming: see `build_rows`.
    """

    sources: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    validation_fraction: float | None = None
    sequence_length: int = 1024
    packing: bool = True
    streaming: bool = False

    def __post_init__(self):
        self.sources = [_source(item) for item in _as_list(self.sources)]
        self.validation = [_source(item) for item in _as_list(self.validation)]
        if self.validation and self.validation_fraction is not None:
            raise ValueError("`data` names both `validation` and `validation_fraction`; keep one of them")


@dataclass
class Recipe:
    """
    A training run.

    Attributes:
        model: a preset, a folder or a Hub name.
        model_settings: fields of its config to change, such as `memory_slots` or `segment_length`.
        tokenizer: folder, Hub name, or name of a tokenizer that comes with the package; None: the model's own.
        dtype: type of the weights.
        method: `full` (everything), `memory` (only salience, routing and compressors), `lora` (adapters and the memory), or
            `qlora` (the same on a quantised base).
        quantization: of the base for `qlora`: `nf4`, `fp4` or `int8`.
        adapter: arguments of PEFT's `LoraConfig`.
        merge: write the adapter merged into its base as well.
        data: see `DataRecipe`.
        training: arguments of `BwrDncTrainingArguments`.
    """

    model: str
    model_settings: dict = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: str = "float32"
    method: str = "full"
    quantization: str = "nf4"
    adapter: dict = field(default_factory=dict)
    merge: bool = False
    data: DataRecipe = field(default_factory=DataRecipe)
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.data, DataRecipe):
            self.data = _build(DataRecipe, self.data, "data")
        check_keys(self.training, BwrDncTrainingArguments, "training")
        # The library takes several types for its other arguments, whatever their hints say, and null for any.
        given = {name: value for name, value in self.training.items() if value is not None}
        check_types(given, BwrDncTrainingArguments, "training", (int, float, bool, NoneType))
        for name, known in (("method", METHODS), ("quantization", QUANTIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but must be one of {', '.join(known)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` is {self.dtype!r}, but must be float32, bfloat16 or float16")
        if self.merge and self.method != "lora":
            raise ValueError(
                f"`merge` needs the method lora, not {self.method}; a quantised base cannot take an adapter exactly"
            )

    @property
    def uses_adapter(self) -> bool:
        return self.method in ("lora", "qlora")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and `no` is a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
# Without this, `eval_strategy: no` would be `eval_strategy: false`.
_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """
    The recipe of a YAML file.

    Args:
        overrides: `key=value` with dotted keys and YAML values, such as `training.learning_rate=1e-4`.

    Raises:
        ValueError: for a missing file, wrong YAML, or a key that does not exist, with the nearest that does.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; name a YAML file such as configuration/bwr-dnc-tiny/training.yaml")
    description = _parse(read_text_file(path), str(path))
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds no mapping of keys to values")
    for override in overrides:
        key, found, value = override.partition("=")
        if not found:
            raise ValueError(f"an override is {override!r}, but must be key=value, such as training.max_steps=100")
        _put(description, key.strip().split("."), _parse(value, override))
    return _build(Recipe, description, str(path))


def _parse(text: str, where: str):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no valid YAML: {error}") from None


def _put(description: dict, keys: list[str], value) -> None:
    """Set a value in nested mappings, made where there are none. Raises `ValueError` if something else is there."""
    for key in keys[:-1]:
        if description.get(key) is None:
            description[key] = {}
        description = description[key]
        if not isinstance(description, dict):
            raise ValueError(f"the override of {'.'.join(keys)} goes through {key!r}, which is no mapping")
    description[keys[-1]] = value


def _build(kind, description, where: str):
    """A dataclass from a mapping, with its keys checked."""
    if not isinstance(description, dict):
        raise ValueError(f"`{where}` is {description!r}, but must be a mapping")
    check_keys(description, kind, where)
    values = {name: value for name, value in description.items() if value is not None}
    check_types(values, kind, where)
    for item in fields(kind):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where} does not say what `{item.name}` is; set it there, or as {item.name}=VALUE")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def check_keys(description: dict, kind, where: str) -> None:
    """Raises `ValueError` for keys of `description` that `kind`, a dataclass, does not have."""
    known = [item.name for item in fields(kind) if item.init]
    for name in description:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known[:20])}"
            raise ValueError(f"{where} has the unknown key {name!r}; {hint}")


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _source(item) -> DataSource:
    """A source as it stands in a YAML file: a path, or the fields of `DataSource`."""
    if isinstance(item, DataSource):
        return item
    if isinstance(item, str):
        return DataSource(path=item)
    if not isinstance(item, dict):
        raise ValueError(f"a data source is {item!r}, but must be a path or a mapping")
    return _build(DataSource, item, "a data source")
