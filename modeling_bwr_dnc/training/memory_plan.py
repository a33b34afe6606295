"""
How much memory a training step needs, before it is taken: simulated on tensors that have shapes but no data, and measured.

The simulation runs the very code of a step (`read_in_spans`, autograd, checkpointing) and adds up what is alive after every
operation. Optimizer states, and what an update needs for a moment, are computed from the shapes of the parameters. What a
running process holds beside tensors (Python, PyTorch and its libraries) is measured, in one that trains next to nothing.

Small tensors come from a heap that the C library never shrinks, large ones from the system (`allocator.py`): the heap is as
large as the most that it ever held, so the peaks of small and of large tensors add up, whenever each of them is.
"""

import functools
import json
import math
import multiprocessing
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..allocator import LARGE
from ..configuration_bwr_dnc import BwrDncConfig
from ..loading import read_config
from ..memory_parameters import is_memory_parameter
from ..modeling_bwr_dnc import BwrDncForCausalLM
from ..presets import list_presets, preset_path
from .spans import read_in_spans

SIZES = ("small", "large")
PARTS = ("weights", "gradients", "optimizer", "activations", "bank", "allocator", "libraries")
# What the C library and the kernels hold beside live tensors (gaps between blocks, scratch), as a share of the tensors: it is not
# simulated. Without it, plans were 1% to 14% below measured peaks (model_cards/results/training_memory_cpu_202611.md).
ALLOCATOR_SHARE = 0.08
PRECISIONS = ("float32", "bf16-autocast", "bfloat16")
# Bytes of optimizer state per element, in 32 bits, and whether matrices are kept in 8 bits (with a scale per 256 elements).
OPTIMIZERS = {
    "adamw_torch": (8, False),
    "adamw_bnb_8bit": (8, True),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (8, False),
    "lion_32bit": (4, False),
    "lion_8bit": (4, True),
    "rmsprop_bnb_8bit": (4, True),
    "sgd": (0, False),
}
SMALLEST_8BIT = 4096  # elements; below, bitsandbytes keeps 32 bits
# Linear maps of a decoder layer, which are what quantisation reaches.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}


@dataclass(frozen=True)
class TrainingSetting:
    """
    What the memory of a training step depends on.

    `model` is a preset or a folder; lengths are in tokens; `span_length` None reads a sequence at once.
    """

    model: str = "bwr-dnc-500m"
    model_settings: dict = field(default_factory=dict)
    method: str = "full"
    quantization: str = "nf4"
    adapter: dict = field(default_factory=dict)
    optimizer: str = "adamw_torch"
    precision: str = "float32"
    sequence_length: int = 2048
    span_length: int | None = None
    gradient_spans: int = 1
    batch_size: int = 1
    gradient_checkpointing: bool = True
    optimizer_in_backward: bool = False
    loss_chunk_length: int = 256

    def __post_init__(self):
        for name, known in (
            ("method", ("full", "memory", "lora", "qlora")),
            ("optimizer", tuple(OPTIMIZERS)),
            ("precision", PRECISIONS),
            ("quantization", tuple(QUANTIZED_BYTES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but must be one of {', '.join(known)}")
        for name in ("sequence_length", "batch_size", "loss_chunk_length", "span_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1")
        if self.gradient_spans < 0:
            raise ValueError(f"`gradient_spans` is {self.gradient_spans}, but must be at least 0 (0: all)")
        if self.optimizer_in_backward and self.span_length and self.gradient_spans:
            raise ValueError(
                "`optimizer_in_backward` needs one backward pass per step; set gradient_spans to 0, or no spans"
            )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes at the moment of the peak, by `PARTS`."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


# ------------------------------------------------------------------------------------------------------------ simulation


Peaks = dict[tuple, dict[str, dict[str, int]]]  # by phase of a step, "small" or "large", and part


class LiveStorage(TorchDispatchMode):
    """
    Adds up the storages that are alive, each in the part it was put into, small ones apart from large ones.

    Attributes:
        peaks: the most that each phase of the step held.
    """

    def __init__(self):
        super().__init__()
        self.part_of: dict[int, tuple[str, int]] = {}  # by the id of a live storage: its part and bytes
        self.live = {size: dict.fromkeys(PARTS, 0) for size in SIZES}
        self.phase: tuple = ("begin",)
        self.peaks: Peaks = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self.put(leaf)
        self.note_peak()
        return result

    def put(self, tensor: torch.Tensor, part: str | None = None, num_bytes: int | None = None) -> None:
        """
        Count the storage of a tensor, as activations unless told otherwise; a known one moves to `part`.

        `num_bytes` is what it really takes, where that is not what its type says.
        """
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.part_of:
            count = storage.nbytes() if num_bytes is None else num_bytes
            self.part_of[key] = ("activations", count)
            self.live[size_of(count)]["activations"] += count
            weakref.finalize(storage, self._forget, key)
        if part is not None:
            before, count = self.part_of[key]
            self.live[size_of(count)][before] -= count
            self.live[size_of(count)][part] += count
            self.part_of[key] = (part, count)

    def _forget(self, key: int) -> None:
        part, count = self.part_of.pop(key)
        self.live[size_of(count)][part] -= count

    def add_state(self, parts: "OptimizerBytes") -> None:
        """Count the states of a parameter."""
        self.live[size_of(parts.largest_state)]["optimizer"] += parts.states

    def note_peak(self, update: "OptimizerBytes | None" = None) -> None:
        """Remember the present if it is the most of its phase; `update` exists just for now."""
        peaks = self.peaks.setdefault(self.phase, {size: dict.fromkeys(PARTS, 0) for size in SIZES})
        for size in SIZES:
            extra = update.update if update is not None and size == size_of(update.largest_update) else 0
            if sum(self.live[size].values()) + extra > sum(peaks[size].values()):
                peaks[size] = self.live[size] | {"optimizer": self.live[size]["optimizer"] + extra}


def size_of(num_bytes: int) -> str:
    """Whether a tensor is small or large to the C library."""
    return "large" if num_bytes >= LARGE else "small"


def plan_memory(setting: TrainingSetting, libraries: int | None = None) -> MemoryPlan:
    """
    Predicted peak of a training step in the long run, when the optimizer has its states.

    Args:
        libraries: bytes of a process beside tensors; measured by default, in a process of its own.

    Raises:
        ValueError: for a model or setting that cannot be.
    """
    libraries = baseline_of(setting) if libraries is None else libraries
    kinds = list(model_config(setting).layer_types)
    period = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p])
    rest, count = len(kinds) % period, len(kinds) // period
    if count <= 3:
        peaks = _simulate(setting)
    else:
        # With every further repetition of its layers a model needs the same again, in each phase of a step.
        one, two = (
            _simulate(_with_layers(setting, kinds[: repeats * period + rest]), period, period + rest)
            for repeats in (1, 2)
        )
        peaks = {
            phase: {
                size: {
                    part: one[phase][size][part] + (count - 1) * (two[phase][size][part] - one[phase][size][part])
                    for part in PARTS
                }
                for size in SIZES
            }
            for phase in one.keys() & two.keys()
        }
    step = highest(peaks)
    loading = _loading(setting)
    parts = step if sum(step.values()) >= sum(loading.values()) else loading
    allocator = round(ALLOCATOR_SHARE * sum(parts.values()))
    return MemoryPlan(parts | {"allocator": allocator, "libraries": libraries})


def highest(peaks: Peaks) -> dict[str, int]:
    """Bytes by part at the peak of a step: that of its large tensors, and that of the heap of its small ones."""
    large, small = (
        max((phase[size] for phase in peaks.values()), key=lambda parts: sum(parts.values()))
        for size in ("large", "small")
    )
    return {part: large[part] + small[part] for part in PARTS}


def ways_to_save(setting: TrainingSetting) -> dict[str, TrainingSetting]:
    """The setting itself, and what makes it smaller without changing what is trained, by a description of the change."""
    ways = {"as given": setting}
    small = setting
    if not setting.gradient_checkpointing:
        small = replace(small, gradient_checkpointing=True)
        ways["with gradient checkpointing"] = small
    if setting.method == "full" and not OPTIMIZERS[setting.optimizer][1]:
        small = replace(small, optimizer="adamw_bnb_8bit")
        ways["and an 8-bit optimizer"] = small
    if setting.method == "full" and not setting.optimizer_in_backward and setting.span_length is None:
        ways["and the optimizer in the backward pass"] = replace(small, optimizer_in_backward=True)
    if setting.span_length is None:
        ways["and detached spans of 1,024 instead"] = replace(
            small, span_length=1024, gradient_spans=1, optimizer_in_backward=False
        )
    return ways


def largest_length(
    setting: TrainingSetting, size: int, libraries: int | None = None, longest: int = 1 << 17
) -> tuple[int, MemoryPlan] | None:
    """
    The longest sequence, a multiple of 256 tokens of at most `longest`, whose step needs at most `size` bytes.

    Returns it with its plan, or None if not even 256 tokens fit.
    """
    libraries = baseline_of(setting) if libraries is None else libraries
    step, best = 256, None
    low, high = 0, 1
    while high * step <= longest:
        planned = plan_memory(replace(setting, sequence_length=high * step), libraries)
        if planned.total > size:
            break
        low, best, high = high, (high * step, planned), high * 2
        if (
            setting.span_length is not None
            and _shortened(replace(setting, sequence_length=longest)).sequence_length <= low * step
        ):
            # From here on memory does not grow.
            return longest, planned
    while high - low > 1 and high * step <= 2 * longest:
        middle = (low + high) // 2
        planned = plan_memory(replace(setting, sequence_length=middle * step), libraries)
        if planned.total > size:
            high = middle
        else:
            low, best = middle, (middle * step, planned)
    return best


def _with_layers(setting: TrainingSetting, kinds: list[str]) -> TrainingSetting:
    settings = setting.model_settings | {"num_hidden_layers": len(kinds), "layer_types": kinds}
    return replace(setting, model_settings=settings)


def _simulate(setting: TrainingSetting, num_bottom: int = 0, num_top: int = 0) -> Peaks:
    """
    Bytes by size and part at the peak of every phase of a step.

    Phases are the forward passes, the backward pass of the head, the update, and the backward pass of each of the lowest
    `num_bottom` and the highest `num_top` layers (all layers together if both are 0).
    """
    setting = _shortened(setting)
    with torch.device("meta"):
        model = build_model(setting)
    num_layers = model.config.num_hidden_layers
    with _fake_cpu(model):
        tracker = LiveStorage()
        quantized = _quantized_bytes(model, setting)
        _dequantize_when_used(model, quantized, setting.quantization)
        for name, parameter in model.named_parameters():
            tracker.put(parameter, "weights", quantized.get(name))
        for buffer in model.buffers():
            tracker.put(buffer, "weights")
        updates = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                update = optimizer_bytes(name, parameter, setting.optimizer)
                tracker.add_state(update)
                updates.append(update)
                phase = ("backward", _layer_of(name)) if num_bottom + num_top else ("backward", None)
                parameter.register_post_accumulate_grad_hook(_gradient_hook(tracker, setting, update, phase))
        with tracker:
            _take_step(model, setting, tracker)
        tracker.phase = ("update",)
        for update in updates:
            tracker.note_peak(update)
    if not num_bottom + num_top:
        return tracker.peaks
    peaks: Peaks = {}
    for phase, held in tracker.peaks.items():
        layer = phase[1] if phase[0] == "backward" else None
        if layer is None:
            peaks[phase] = held
        else:
            if layer < num_bottom:
                peaks["bottom", layer] = held
            if layer >= num_layers - num_top:
                peaks["top", num_layers - layer] = held
    return peaks


def _shortened(setting: TrainingSetting) -> TrainingSetting:
    """The same with no more detached spans than it takes until the memory is full, and the gradient twice over."""
    if setting.span_length is None or setting.gradient_spans == 0:
        return setting
    config = model_config(setting)
    slots = max(map(config.layer_slots, range(config.num_hidden_layers)))
    full = config.num_sink_tokens + slots[0] + 2 * slots[1] + 4 * slots[2] + 3 * config.segment_length
    num_spans = -(-full // setting.span_length) + 2 * setting.gradient_spans
    return replace(setting, sequence_length=min(setting.sequence_length, num_spans * setting.span_length))


def _layer_of(name: str) -> int | None:
    """Index of the decoder layer that a parameter belongs to."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else None


@contextmanager
def _fake_cpu(model: nn.Module) -> Iterator[None]:
    """Fake tensors on the CPU, also for the weights of a model on the meta device; tied ones stay tied."""
    replaced: dict[int, torch.Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in replaced:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        replaced[id(tensor)] = fake
                    tensors[name] = replaced[id(tensor)]
        yield


def _gradient_hook(tracker: LiveStorage, setting: TrainingSetting, update: "OptimizerBytes", phase: tuple):
    """What follows the gradient of a parameter."""

    def note(parameter: torch.Tensor) -> None:
        tracker.phase = phase
        tracker.put(parameter.grad, "gradients")
        if setting.optimizer_in_backward:
            tracker.note_peak(update)
            parameter.grad = None

    return note


def _put_bank(tracker: LiveStorage, cache) -> None:
    for state in cache.states:
        for tensor in state.tensors().values():
            tracker.put(tensor, "bank")


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes of the states of a parameter, and of what its update needs for a moment; and of the largest tensor in each."""

    states: int
    largest_state: int
    update: int
    largest_update: int


def optimizer_bytes(name: str, parameter: torch.Tensor, optimizer: str) -> OptimizerBytes:
    """What an optimizer needs for a parameter."""
    per_element, is_8bit = OPTIMIZERS[optimizer]
    count = parameter.numel()
    precise = count * 4
    if is_8bit and count >= SMALLEST_8BIT and not is_memory_parameter(name) and "embed_tokens" not in name:
        # One byte instead of four, and a 32-bit scale per block of 256. The update works on 32-bit copies.
        return OptimizerBytes(math.ceil(count * per_element / 4 * (1 + 4 / 256)), count, 3 * precise, precise)
    copies = (2 if optimizer == "adamw_torch" else 3) if per_element else 0
    return OptimizerBytes(count * per_element, precise, copies * precise, precise)


def _quantized_bytes(model: nn.Module, setting: TrainingSetting) -> dict[str, int]:
    """Bytes of the frozen weights that quantisation would shrink, by name."""
    if setting.method != "qlora":
        return {}
    return {
        name: math.ceil(parameter.numel() * QUANTIZED_BYTES[setting.quantization])
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.dim() == 2 and "_proj" in name and not is_memory_parameter(name)
    }


class _QuantizedLinear(torch.autograd.Function):
    """
    A linear map as bitsandbytes computes it in training: with the whole matrix, dequantised anew for each use.

    The one for int8 keeps its input where gradient checkpointing does not see it, so that nothing frees it before the backward
    pass (bitsandbytes 0.50, `MatMul8bitFp`: `ctx.A = A`).
    """

    @staticmethod
    def forward(ctx, inputs, weight, keeps_input):
        ctx.weight, ctx.inputs = weight, inputs if keeps_input else None
        return nn.functional.linear(inputs, weight.to(inputs.dtype, copy=True))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.to(gradient.dtype, copy=True), None, None


def _dequantize_when_used(model: nn.Module, quantized: dict[str, int], quantization: str) -> None:
    """Let the linear maps in `quantized`, by name of their weight, compute as quantised ones do."""
    for name, module in model.named_modules():
        if f"{name}.weight" in quantized:
            module.forward = functools.partial(_quantized_linear, module, quantization == "int8")


def _quantized_linear(module: nn.Module, keeps_input: bool, inputs: torch.Tensor) -> torch.Tensor:
    return _QuantizedLinear.apply(inputs, module.weight, keeps_input)


def _loading(setting: TrainingSetting) -> dict[str, int]:
    """
    Bytes by part while a base is quantised: what is done, and the whole file, which stays mapped to the end.

    Other methods hold no more than their weights while they load.
    """
    parts = dict.fromkeys(PARTS, 0)
    if setting.method != "qlora":
        return parts
    with torch.device("meta"):
        model = build_model(setting)
    quantized = _quantized_bytes(model, setting)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            count = parameter.numel() * parameter.element_size()
            parts["weights"] += count + quantized.get(name, count)
    return parts


# --------------------------------------------------------------------------------------------------- the step, both ways


def model_config(setting: TrainingSetting) -> BwrDncConfig:
    """Raises `ValueError` if there is no such model."""
    name = str(preset_path(setting.model)) if setting.model in list_presets() else setting.model
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"there is no preset or model folder {name!r}; presets are {', '.join(list_presets())}")
    return read_config(name, **setting.model_settings)


def build_model(setting: TrainingSetting) -> nn.Module:
    """The model of a setting, with random weights, prepared for its method (the base is not quantised)."""
    from .run import add_adapter

    model = BwrDncForCausalLM._from_config(model_config(setting), dtype=setting.dtype).train()
    if setting.method in ("lora", "qlora"):
        model = add_adapter(model, dict(setting.adapter))
    elif setting.method == "memory":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad = is_memory_parameter(parameter_name)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _take_step(model: nn.Module, setting: TrainingSetting, tracker: LiveStorage) -> None:
    """Forward and backward passes of one step, as `BwrDncTrainer` takes them."""
    shape = (setting.batch_size, setting.sequence_length)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64), "labels": torch.zeros(shape, dtype=torch.int64)}
    autocast = torch.autocast("cpu", torch.bfloat16) if setting.precision == "bf16-autocast" else nullcontext()
    num_spans = -(-setting.sequence_length // (setting.span_length or setting.sequence_length))
    per_gradient = setting.gradient_spans or num_spans
    spans = read_in_spans(model, inputs, setting.span_length, setting.loss_chunk_length, keeps_state=False)
    losses = []
    for index in range(num_spans):
        tracker.phase = ("forward", index)
        with autocast:
            loss, cache = next(spans)
        losses.append(loss)
        del loss
        if cache is not None:
            _put_bank(tracker, cache)
        if (index + 1) % per_gradient == 0 or index + 1 == num_spans:
            total = torch.stack(losses).sum()
            losses = []
            tracker.phase = ("head", index)
            total.backward()
            del total
            if cache is not None:
                cache.detach()
        del cache


# ----------------------------------------------------------------------------------------------------------- measurement


@functools.lru_cache
def process_baseline(quantization: str | None = None) -> int:
    """
    Bytes that a training process holds beside its tensors: the peak of one that trains next to nothing.

    A quantised base (`quantization`) brings in more libraries than others.
    """
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 8, "num_hidden_layers": 1}
    nothing = TrainingSetting(
        "bwr-dnc-tiny",
        sizes | {"layer_types": ["state_bank_attention"], "pad_token_id": None},
        method="lora" if quantization is None else "qlora",
        quantization=quantization or "nf4",
        optimizer="adamw_bnb_8bit",
        sequence_length=128,
    )
    return int(measure_memory(nothing)["peak"])


def baseline_of(setting: TrainingSetting) -> int:
    """`process_baseline` of what a setting loads."""
    return process_baseline(setting.quantization if setting.method == "qlora" else None)


def measure_memory(setting: TrainingSetting, num_steps: int = 2) -> dict[str, float]:
    """
    Take real steps with `BwrDncTrainer` in a process of its own.

    Returns `peak` (bytes of resident memory), `seconds` per step, the set-up of the trainer included, and `loss` of the last step.

    Raises:
        ValueError: if that process fails, such as for want of memory.
    """
    if setting.model not in list_presets():
        # That process starts elsewhere.
        setting = replace(setting, model=str(Path(setting.model).resolve()))
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(asdict(setting)), str(num_steps)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [
            "nothing was said, as where the system ends it for want of memory"
        ]
        raise ValueError(
            f"the process that takes steps of {setting.sequence_length} tokens ended with {done.returncode} ({said[0]}); ask for shorter "
            "sequences, or for a machine with more memory"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _save_base(setting: TrainingSetting, folder: str) -> None:
    build_model(replace(setting, method="full")).save_pretrained(folder)


def _measure_here(setting: TrainingSetting, num_steps: int) -> dict[str, float]:
    """`measure_memory`, in this process."""
    import tempfile
    import time

    from datasets import Dataset

    from ..evaluation.machine import peak_memory
    from .arguments import BwrDncTrainingArguments
    from .data import RowCollator
    from .run import add_adapter, load_base
    from .trainer import BwrDncTrainer

    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        if setting.method == "qlora":
            # Another process makes the weights, so that this one never holds them whole.
            maker = multiprocessing.get_context("spawn").Process(target=_save_base, args=(setting, folder))
            maker.start()
            maker.join()
            model = load_base(folder, setting.dtype, setting.quantization)
            model = add_adapter(model, dict(setting.adapter))
        else:
            model = build_model(setting)
        ids = torch.randint(0, model.config.vocab_size, (setting.batch_size * num_steps, setting.sequence_length))
        rows = Dataset.from_dict({name: ids.tolist() for name in ("input_ids", "labels")}).add_column(
            "position_ids", [list(range(setting.sequence_length))] * len(ids)
        )
        arguments = BwrDncTrainingArguments(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=setting.batch_size,
            optim=setting.optimizer,
            bf16=setting.precision == "bf16-autocast",
            span_length=setting.span_length,
            gradient_spans=setting.gradient_spans,
            gradient_checkpointing=setting.gradient_checkpointing,
            optimizer_in_backward=setting.optimizer_in_backward,
            max_grad_norm=0.0 if setting.optimizer_in_backward else 1.0,
            loss_chunk_length=setting.loss_chunk_length,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = BwrDncTrainer(model=model, args=arguments, train_dataset=rows, data_collator=RowCollator())
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / num_steps
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"peak": peak_memory(), "seconds": seconds, "loss": losses[-1]}


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(TrainingSetting(**described), int(sys.argv[2]))))
