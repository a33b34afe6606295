"""
Learning a task from scratch with a very small model, in minutes on a CPU: ours, and others beside it.

Rows of a batch share a length, batches have about the same number of tokens; which come when is a matter of `stages`.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Qwen3NextConfig,
    Trainer,
    TrainerCallback,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from ..configuration_bwr_dnc import BwrDncConfig
from ..tasks import Curriculum, Task
from ..tasks.task import require
from ..token_loss import IGNORED
from .arguments import BwrDncTrainingArguments
from .curriculum_callback import CurriculumCallback
from .stages import Stages, StagesCallback
from .trainer import BwrDncTrainer

# What is trained alike and compared: the memory; with the same parameters full attention (slots that hold everything, positions as
# ranks), sinks and window only, and sinks and a window longer by all slots; and two recurrent models (Dao and Gu, 2024; Yang et al.,
# 2024).
MODEL_KINDS = ("memory", "full", "window", "equal_slot_window", "mamba2", "gated_deltanet")
# The memory less one of its parts each, or in the case of usage with one more; without noise is a matter of the training.
ABLATIONS: dict[str, dict] = {
    "no_salience": {"use_salience": False, "usage_weight": 1.0},
    "with_usage": {"usage_weight": 1.0},
    "no_routing": {"use_routing": False},
    "no_compression": {},
    "mean_compressor": {"use_learned_compressor": False},
    "no_noise": {},
}


def small_config(kind: str, task: Task, memory_slots: Sequence[int] = (32, 16, 8), **settings) -> PreTrainedConfig:
    """
    A model of 0.1 million parameters: two layers with a short convolution, or three of Mamba2; or of 0.25, two of gated DeltaNet.

    Args:
        kind: one of `MODEL_KINDS`, of which the first four have the same parameters, or of `ABLATIONS`.
        memory_slots: raw, 2x, 4x, of the kind `memory`; as many in all, raw, of the kind `equal_slot_window`.
        settings: other fields of the config.
    """
    kinds = (*MODEL_KINDS, *ABLATIONS)
    require(kind in kinds, "kind", kind, f"be one of {', '.join(kinds)}")
    num_ids = getattr(task, "vocab_size", 256)
    require(
        settings.get("vocab_size", num_ids) >= num_ids,
        "vocab_size",
        settings.get("vocab_size"),
        f"be at least {num_ids}, the ids of the task",
    )
    shared = {
        "vocab_size": num_ids,
        "hidden_size": 64,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "mamba2":
        shape = {"num_hidden_layers": 3, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}
        return Mamba2Config(**shared | shape | {"tie_word_embeddings": True, "pad_token_id": None} | settings)
    attention = {"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gated_deltanet":
        heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
        heads |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
        # Of Qwen3-Next only the recurrent layers, with dense MLPs.
        layers = {"layer_types": ["linear_attention"] * 2, "mlp_only_layers": [0, 1], "tie_word_embeddings": True}
        return Qwen3NextConfig(**shared | attention | heads | layers | settings)
    longest = 1 << 20
    memory = {"memory_slots": list(memory_slots), "memory_position": "constant"}
    recent = {"memory_slots": [sum(memory_slots), 0, 0], "memory_position": "rank"}
    by_kind: dict[str, dict] = {
        "full": {"memory_slots": [longest // 2, 0, 0], "memory_position": "rank", "max_position_embeddings": longest},
        "window": memory | {"use_memory": False},
        "equal_slot_window": recent | {"retention_score": "recency", "use_salience": False},
        "no_compression": memory | {"memory_slots": [sum(memory_slots), 0, 0]},
    }
    by_kind |= {name: memory | changes for name, changes in ABLATIONS.items() if name not in by_kind}
    reader = {"segment_length": 16, "num_sink_tokens": 4, "short_conv_kernel": 3, "usage_weight": 0.0}
    return BwrDncConfig(**shared | attention | reader | by_kind.get(kind, memory) | settings)


# Settings of a config by which the same weights compute something else.
FIXED = ("hidden_act", "rms_norm_eps", "rope_parameters", "head_dim", "num_attention_heads", "num_key_value_heads")


def grown(config: PreTrainedConfig, start: PreTrainedModel) -> PreTrainedModel:
    """
    A new BWR-DNC model of `config` that computes what `start` does: with its weights, and, where it has fewer layers, with further
    ones that add nothing yet.

    Raises:
        ValueError: if the two differ in more than layers and run-time settings.
    """
    model = AutoModelForCausalLM.from_config(config)
    weights, places = start.state_dict(), model.state_dict()
    num_layers = start.config.num_hidden_layers
    misfits = [name for name, tensor in weights.items() if name not in places or tensor.shape != places[name].shape]
    further = [f"layers.{index}." for index in range(num_layers, config.num_hidden_layers)]
    misfits += [name for name in places if name not in weights and not any(part in name for part in further)]
    misfits += [name for name in FIXED if getattr(config, name, None) != getattr(start.config, name, None)]
    if config.model_type != BwrDncConfig.model_type or misfits:
        raise ValueError(
            f"a {config.model_type} model of these settings cannot go on from one that differs in {(misfits or ['its type'])[0]!r}; "
            "give it the settings of that one, and as many layers or more"
        )
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for layer in model.model.layers[num_layers:]:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in output.parameters():
                    parameter.zero_()
    return model


@dataclass
class Learned:
    """A trained model, the seconds it took without measuring, and what was measured on the way: step, seconds, accuracy."""

    model: PreTrainedModel
    seconds: float
    curve: list[dict] = field(default_factory=list)


def learn(
    config: PreTrainedConfig,
    source: Stages | Curriculum,
    num_steps: int = 700,
    seed: int = 0,
    tokens_per_batch: int = 2048,
    learning_rate: float = 5e-3,
    memory_learning_rate: float = 1e-2,
    retention_noise: bool = True,
    salience_cost: float = 0.02,
    salience_margin: float = 0.0,
    measure: Callable[[PreTrainedModel], float] | None = None,
    measure_every: int = 50,
    stop_at: float | None = None,
    adapt_every: int | None = 50,
    warmup_steps: int = 50,
    start: PreTrainedModel | None = None,
    on_step: Callable[[], object] | None = None,
) -> Learned:
    """
    Train a model on the stages of a task, or on the tasks of a curriculum.

    Args:
        adapt_every: steps after which the success at a curriculum, or at a stage that ends when it is learned, is measured, to move
            it; None: a curriculum stays where it is, a stage lasts as long as it may. The time that this takes counts as training.
        memory_learning_rate: of salience, routing and compressor, which get no weight decay.
        retention_noise: Gumbel noise on what the memory keeps, without which an entry that is never kept is never tried.
        salience_cost, salience_margin: see `BwrDncTrainingArguments`.
        measure: accuracy of the model; called every `measure_every` steps.
        stop_at: end the training when `measure` has reached this.
        warmup_steps: in which the learning rates rise; a quarter of all steps at most.
        start: a model whose training goes on, see `grown`; None: a new one.
        on_step: called after every step.
    """
    # Small activations decay into denormal numbers, which CPUs compute with many times slower.
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config) if start is None else grown(config, start)
    if start is None:
        slow_gates(model)
    # A list is cut into shards: one that holds all.
    options = {"sources": [source], "num_steps": num_steps, "tokens_per_batch": tokens_per_batch}
    rows = IterableDataset.from_generator(_batches, gen_kwargs=options)
    is_ours = config.model_type == BwrDncConfig.model_type
    watch = _Watch(measure, measure_every, stop_at, on_step)
    with tempfile.TemporaryDirectory() as folder:
        arguments = BwrDncTrainingArguments(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=1,
            learning_rate=learning_rate,
            memory_learning_rate=memory_learning_rate,
            retention_noise=retention_noise,
            salience_cost=salience_cost if is_ours else 0.0,
            salience_margin=salience_margin,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": round(0.3 * num_steps), "min_lr_ratio": 0.05},
            warmup_steps=min(warmup_steps, num_steps // 4),
            adam_beta2=0.98,
            weight_decay=0.01,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            log_memory=False,
            return_freed_memory=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cache=is_ours,
        )
        trainer = (BwrDncTrainer if is_ours else _WeightedTrainer)(
            model=model, args=arguments, train_dataset=rows, data_collator=_whole_batch, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        if adapt_every is not None:
            if isinstance(source, Curriculum):
                CurriculumCallback(source, adapt_every).follow(trainer)
            else:
                trainer.add_callback(StagesCallback(source, adapt_every))
        trainer.train()
    model.config.use_cache = True
    return Learned(model.eval(), watch.elapsed(), watch.curve)


@torch.no_grad()
def slow_gates(model: PreTrainedModel) -> None:
    """
    Start the gates of gated DeltaNet, if the model has any, as its authors do (and Mamba2): time steps between 0.001 and 0.1.

    Transformers starts them at 1.3, times up to 16: within a token or two such a model forgets everything, and learns no recall.
    """
    for module in model.modules():
        if isinstance(module, Qwen3NextGatedDeltaNet):
            steps = torch.empty_like(module.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            module.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of this is the step


def _batches(sources: list[Stages | Curriculum], num_steps: int, tokens_per_batch: int) -> Iterator[dict]:
    for source in sources:
        yield from source.batches(num_steps, tokens_per_batch)


def _whole_batch(items: list[dict]) -> dict[str, torch.Tensor]:
    (batch,) = items
    return {name: torch.tensor(value) for name, value in batch.items()}


class _WeightedTrainer(Trainer):
    """The library's, which does not know `label_weights`; `BwrDncTrainer` does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if "label_weights" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        weights, labels = inputs["label_weights"][:, 1:], inputs["labels"][:, 1:]
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        losses = F.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return (losses * weights).sum() / (labels != IGNORED).sum()


class _Watch(TrainerCallback):
    """Measures now and then, and keeps the time, less that of measuring."""

    def __init__(self, measure, every: int, stop_at: float | None, on_step):
        self.measure, self.every, self.stop_at, self.told = measure, every, stop_at, on_step
        self.curve: list[dict] = []
        self.begin = self.measuring = 0.0

    def elapsed(self) -> float:
        return time.process_time() - self.begin - self.measuring

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.told is not None:
            self.told()
        if self.measure is None or state.global_step % self.every:
            return
        seconds, start = self.elapsed(), time.process_time()
        accuracy = self.measure(model)
        model.train()
        self.measuring += time.process_time() - start
        self.curve.append({"step": state.global_step, "seconds": round(seconds, 1), "accuracy": accuracy})
        if self.stop_at is not None and accuracy >= self.stop_at:
            control.should_training_stop = True
