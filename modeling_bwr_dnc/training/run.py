"""A training run from a recipe: model, data, Trainer, and a folder with the result."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_bwr_dnc import BwrDncConfig
from ..loading import read_config, read_model, read_tokenizer
from ..memory_parameters import is_memory_parameter, memory_in_float32
from ..modeling_bwr_dnc import BwrDncForCausalLM
from ..peft_defaults import MEMORY_MODULES, NOT_QUANTIZED
from ..presets import list_presets, preset_path, tokenizer_path
from ..staging import check_kept, complete_folder
from ..tasks import PHASES, TASKS, Curriculum, Task
from .arguments import BwrDncTrainingArguments
from .curriculum_callback import CurriculumCallback
from .data import DataSource, RowCollator, build_rows, join, split_validation
from .recipe import Recipe
from .stages import UNSEEN_SEED
from .trainer import BwrDncTrainer

# Settings that may differ between a checkpoint and the model that goes on from it; `Trainer` takes the token ids from the tokenizer.
FREE_SETTINGS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "dtype",
    "torch_dtype",
    "architectures",
    "auto_map",
    "_name_or_path",
}


@dataclass
class RunResult:
    """
    What a run has done: its folder, steps, and last losses (nats per token).

    `train_loss` is None where a resumed run had no step left to take.
    """

    folder: Path
    num_steps: int
    train_loss: float | None
    eval_loss: float | None
    num_trained: int  # parameters
    num_parameters: int


def run_recipe(recipe: Recipe, from_scratch: bool, resume: bool = False) -> RunResult:
    """
    Train, and write the result to `<output_dir>/model` (or `<output_dir>/adapter`).

    Args:
        from_scratch: new random weights; otherwise those of `recipe.model`.
        resume: go on from the last checkpoint in `output_dir`, if there is one.

    Raises:
        ValueError: for anything in the recipe that cannot work, before training begins.
    """
    # Small activations decay into denormal numbers, which CPUs compute with many times slower.
    torch.set_flush_denormal(True)
    if from_scratch and recipe.method != "full":
        raise ValueError(
            f"`method` is {recipe.method!r}, but training from scratch trains everything; use scripts.finetune"
        )
    if recipe.model not in list_presets():
        _require_folder_or_hub_name(recipe.model)
    arguments = training_arguments(recipe)
    if not recipe.uses_adapter or recipe.merge:
        check_kept(Path(recipe.model), Path(arguments.output_dir) / "model")
    checkpoint = find_checkpoint(Path(arguments.output_dir), resume)
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(recipe)
    model = new_model(recipe, tokenizer) if from_scratch else load_model(recipe, tokenizer)
    if checkpoint is not None:
        check_checkpoint(checkpoint, model)
    model = prepare_for_method(model, recipe)
    config = model.config
    try:
        # Asked for when training begins; here the data are not read yet.
        BwrDncTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    except ImportError as error:
        raise ValueError(str(error)) from error
    tasks = GeneratedTasks(
        tokenizer, config.vocab_size, config.segment_length, arguments.train_batch_size, arguments.seed
    )
    with arguments.main_process_first(desc="reading the data"):
        train_rows, validation_rows = load_rows(recipe, tokenizer, arguments.seed, tasks)
    try:
        trainer = BwrDncTrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
            data_collator=RowCollator(
                tokenizer.pad_token_id or 0, recipe.data.sequence_length if arguments.world_size > 1 else None
            ),
        )
    except (ImportError, RuntimeError) as error:
        # A missing logger says what to install.
        raise ValueError(str(error)) from error
    for callback in tasks.callbacks:
        callback.follow(trainer)
    if validation_rows is not None:
        trainer.add_callback(EvaluateLast())
    output = trainer.train(resume_from_checkpoint=checkpoint)
    eval_loss = held_out_loss(trainer) if validation_rows is not None else None
    # Merging takes an adapter out of the model.
    num_trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    num_parameters = trainer.model.num_parameters()
    folder = save_result(trainer, recipe, tokenizer)
    return RunResult(
        folder=folder,
        num_steps=output.global_step,
        train_loss=output.training_loss or None,
        eval_loss=eval_loss,
        num_trained=num_trained,
        num_parameters=num_parameters,
    )


class EvaluateLast(TrainerCallback):
    """Evaluates after the last step: within the run, since some loggers count what comes after it as another one."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def held_out_loss(trainer: BwrDncTrainer) -> float:
    """That of the model as it is now; measured unless the last step did."""
    last = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
    measured = [entry["eval_loss"] for entry in last if "eval_loss" in entry]
    if measured and not trainer.args.load_best_model_at_end:
        return measured[-1]
    return trainer.evaluate()["eval_loss"]


def training_arguments(recipe: Recipe) -> BwrDncTrainingArguments:
    """Those of a recipe. Raises `ValueError` for what does not work together, or a logger that is not there."""
    defaults = {
        "output_dir": f"runs/{Path(recipe.model).name}",
        "report_to": "none",
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "disable_tqdm": False,
    }
    try:
        arguments = BwrDncTrainingArguments(**defaults | recipe.training)
    except (TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"`training` does not work: {error}") from error
    for logger in arguments.report_to:
        try:
            for report in get_reporting_integration_callbacks([logger]):
                report()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"`training.report_to` names {logger}: {error} Try: pip install {logger}") from error
    if arguments.eval_strategy != "no" and not recipe.data.validation and recipe.data.validation_fraction is None:
        raise ValueError(
            "`training.eval_strategy` asks for evaluation; name `data.validation` or `data.validation_fraction`"
        )
    return arguments


def find_checkpoint(output: Path, resume: bool) -> str | None:
    """The last complete checkpoint to go on from, None to begin."""
    if not output.is_dir():
        return None
    last = get_last_checkpoint(str(output))
    if last is not None and resume:
        check_state(Path(last))
    if last is not None and not resume:
        raise ValueError(
            f"{output} holds checkpoints of an earlier run; go on with --resume, or set training.output_dir"
        )
    return last


def check_state(checkpoint: Path) -> None:
    """Raises `ValueError` if the checkpoint does not say how far its run had come."""
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is damaged (trainer_state.json: {error}); remove it to go on from the one before"
        ) from error


def check_checkpoint(checkpoint: str, model: BwrDncForCausalLM) -> None:
    """Raises `ValueError`, naming what differs, for the checkpoint of another model."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        # An adapter: its shapes are compared when it is read.
        return
    theirs, mine = BwrDncConfig.from_pretrained(checkpoint).to_dict(), model.config.to_dict()
    different = [
        f"{name} ({theirs.get(name)!r}, now {mine.get(name)!r})"
        for name in sorted(theirs.keys() | mine.keys())
        if name not in FREE_SETTINGS and theirs.get(name) != mine.get(name)
    ]
    if different:
        raise ValueError(
            f"{checkpoint} belongs to another model: {', '.join(different)}; use its settings, or another training.output_dir"
        )


# ------------------------------------------------------------------------------------------------------ model, tokenizer


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The one that the recipe names, else the model's own or, of a preset, the package's. Raises `ValueError` if it has none."""
    name = recipe.tokenizer
    if name is None and recipe.model in list_presets():
        name = str(tokenizer_path())
    elif name is None:
        name = recipe.model
        # A folder that is broken altogether is not mended by another tokenizer.
        read_config(name)
    elif "/" not in name and not Path(name).exists():
        name = str(tokenizer_path(name))
    try:
        return read_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"there is no tokenizer at {name}; set `tokenizer` ({error})") from error


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> BwrDncForCausalLM:
    """Random weights for the config of a preset or folder, with the tokenizer's special tokens."""
    name = str(preset_path(recipe.model)) if recipe.model in list_presets() else recipe.model
    _require_folder_or_hub_name(name)
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {key: value for key, value in tokens.items() if value is not None} | recipe.model_settings
    check_settings(settings)
    config = read_config(name, **settings)
    check_vocabulary(config, tokenizer)
    return BwrDncForCausalLM._from_config(config, dtype=getattr(torch, recipe.dtype))


def check_vocabulary(config: BwrDncConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` if the tokenizer has ids that the model has not."""
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the model has {config.vocab_size} token ids, but the tokenizer {len(tokenizer)}; set model_settings.vocab_size of a new model, "
            "or take the tokenizer that belongs to it"
        )


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> BwrDncForCausalLM:
    """Pretrained weights, quantised for `qlora`; the memory parameters in float32 there."""
    name = recipe.model
    if name in list_presets() and not Path(name).is_dir():
        raise ValueError(
            f"{name} is a preset, which has no weights to go on from; train it first, or name a model folder"
        )
    _require_folder_or_hub_name(name)
    check_settings(recipe.model_settings)
    kernel = recipe.model_settings.get("short_conv_kernel")
    if kernel and recipe.method != "full" and not read_config(name).short_conv_kernel:
        raise ValueError(
            f"`model_settings.short_conv_kernel` is {kernel}, but {name} has no such convolution, and the method "
            f"{recipe.method} would leave a new one at zero; leave it out, or use the method full"
        )
    quantization = recipe.quantization if recipe.method == "qlora" else None
    model = load_base(name, getattr(torch, recipe.dtype), quantization, **recipe.model_settings)
    check_vocabulary(model.config, tokenizer)
    if recipe.method != "full":
        memory_in_float32(model)
    return model


def load_base(name: str, dtype: torch.dtype, quantization: str | None = None, **settings) -> BwrDncForCausalLM:
    """Pretrained weights, with the projections of the layers quantised if asked for."""
    if quantization is None:
        return read_model(name, dtype=dtype, **settings)
    model = read_model(
        name,
        dtype=dtype,
        quantization_config=quantization_config(quantization, dtype),
        device_map={"": _own_device()},
        **settings,
    )
    # What is not quantised still lies in the mapped file, which would keep the unquantised rest of it in memory, too.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    for module in model.modules():
        # The first evaluation would pack 4-bit weights for a product without gradients, for good (bitsandbytes 0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _own_device() -> str | int:
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"


def quantization_config(kind: str, dtype: torch.dtype):
    """bitsandbytes settings that leave the head and the memory alone."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=NOT_QUANTIZED
    )


def check_settings(settings: dict) -> None:
    """Raises `ValueError` for what is no field of the config."""
    unknown = sorted(set(settings) - set(BwrDncConfig().to_dict()) - set(BwrDncConfig.attribute_map))
    if unknown:
        raise ValueError(
            f"`model_settings` has unknown keys: {', '.join(unknown)}; the fields of BwrDncConfig are known"
        )


def _require_folder_or_hub_name(name: str) -> None:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is no model folder (it holds no config.json)")
    if not path.is_dir() and (path.is_absolute() or name.count("/") != 1):
        raise ValueError(f"there is no preset or model folder {name}; presets are {', '.join(list_presets())}")


def prepare_for_method(model: BwrDncForCausalLM, recipe: Recipe) -> nn.Module:
    """Freeze what the method does not train; add adapters."""
    if recipe.method == "memory":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = is_memory_parameter(name)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"{recipe.model} has no memory parameters (no layer is a state_bank_attention layer)")
    if not recipe.uses_adapter:
        return model
    return add_adapter(model, recipe.adapter)


def add_adapter(model: BwrDncForCausalLM, settings: dict) -> nn.Module:
    """LoRA on every projection, and the memory trained whole, unless `settings` of `LoraConfig` say otherwise."""
    from peft import LoraConfig, get_peft_model

    has_memory = any(is_memory_parameter(name) for name, _ in model.named_parameters())
    defaults = {"r": 16, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    if has_memory:
        defaults["modules_to_save"] = list(MEMORY_MODULES)
    try:
        config = LoraConfig(**defaults | settings)
        return get_peft_model(model, config)
    except TypeError as error:
        raise ValueError(f"`adapter` does not fit LoraConfig: {error}") from None


# ------------------------------------------------------------------------------------------------------------------ data


CURRICULUM = "curriculum"
# Rows of a task that validates.
VALIDATION_ROWS = 256


class GeneratedTasks:
    """
    The tasks among the sources of a run, and the callbacks that move those that are curricula.

    A source is `{task: NAME, options: {...}}` with the fields of the task (texts become tokens by the model's tokenizer), or
    `{task: curriculum, options: {...}}` with `first_length` and the fields of `Curriculum` and `CurriculumCallback`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, segment_length: int, batch_size: int, seed: int
    ):
        """
        Args:
            vocab_size: of the model; `segment_length` too.
            batch_size: rows in a row that share task and length in a curriculum.
        """
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.defaults = {"segment_length": segment_length, "rows_per_length": batch_size, "seed": seed}
        self.callbacks: list = []
        self.by_source: dict[int, Curriculum] = {}

    def examples(self, source: DataSource) -> Iterable[dict]:
        """Examples of a generated task, without end; the same curriculum whenever it is asked for."""
        if source.task != CURRICULUM:
            return self._task(source).dataset()
        if id(source) not in self.by_source:
            options = self.defaults | source.options
            following = {name: options.pop(name) for name in ("every", "num_rows") if name in options}
            try:
                curriculum = Curriculum.scaled(options.pop("first_length", PHASES[0].length), **options)
                self._require_known_ids(curriculum, CURRICULUM)
                self.callbacks.append(CurriculumCallback(curriculum, **following))
            except TypeError as error:
                raise ValueError(f"`options` of the curriculum do not fit: {error}") from None
            self.by_source[id(source)] = curriculum
        return self.by_source[id(source)].rows()

    def validation_examples(self, source: DataSource) -> Iterable[dict]:
        """`VALIDATION_ROWS` examples of a task, which training does not see unless both have the same `seed` among their options."""
        if source.task == CURRICULUM:
            raise ValueError(
                "a curriculum changes while it is read, so it cannot validate; name one of its tasks instead"
            )
        task = self._task(source)
        return (task if "seed" in source.options else replace(task, seed=UNSEEN_SEED)).dataset(VALIDATION_ROWS)

    def _task(self, source: DataSource) -> Task:
        if source.task not in TASKS:
            raise ValueError(f"there is no task {source.task!r}; known are {', '.join(sorted([*TASKS, CURRICULUM]))}")
        kind = TASKS[source.task]
        reads_text = any(field.name == "tokenizer" for field in fields(kind))
        task = kind.from_settings(source.options, **({"tokenizer": self.tokenizer} if reads_text else {}))
        self._require_known_ids(task, source.task)
        return task

    def _require_known_ids(self, task: Task | Curriculum, name: str) -> None:
        used = getattr(task, "vocab_size", 0)
        if used > self.vocab_size:
            raise ValueError(
                f"the task {name!r} uses {used} token ids, but the model has {self.vocab_size}; lower `vocab_size` in its "
                "`options`, or raise model_settings.vocab_size"
            )


def load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, tasks: GeneratedTasks):
    """Training rows, and validation rows or None."""
    data = recipe.data

    def build(sources, streaming, make_task=tasks.examples):
        return build_rows(
            sources,
            tokenizer,
            data.sequence_length,
            packing=data.packing,
            streaming=streaming,
            seed=seed,
            make_task=make_task,
        )

    if data.validation_fraction is not None and data.sources:
        # Before they are mixed, which repeats the rows of smaller sources.
        parts = [build([source], data.streaming) for source in data.sources]
        return split_validation(parts, [source.weight for source in data.sources], data.validation_fraction, seed)
    rows = build(data.sources, data.streaming)
    validation = [build([source], False, tasks.validation_examples) for source in data.validation]
    return rows, join(validation) if validation else None


# ---------------------------------------------------------------------------------------------------------------- result


def save_result(trainer: BwrDncTrainer, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the model, or the adapter, to a folder that appears when it is complete."""
    output, arguments = Path(trainer.args.output_dir), trainer.args
    name = "adapter" if recipe.uses_adapter else "model"
    with complete_folder(output / name, arguments.should_save, trainer.accelerator.wait_for_everyone) as folder:
        trainer.save_model(str(folder))
    if recipe.merge and arguments.should_save:
        with complete_folder(output / "model") as folder:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        name = "model"
    return output / name
