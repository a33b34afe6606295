"""The library's Trainer for a model that carries its memory through a sequence."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..allocator import return_freed_memory
from ..memory_parameters import is_memory_parameter
from ..staging import complete_folder
from ..state_bank import StateBankCache
from ..token_loss import IGNORED
from .arguments import BwrDncTrainingArguments
from .memory_metrics import GateMovement, bank_metrics
from .salience_cost import SalienceCost
from .spans import read_in_spans, shift_labels


class BwrDncTrainer(Trainer):
    """
    `Trainer` with what a bounded memory needs, set by `BwrDncTrainingArguments`.

    Sequences can be read in spans (truncated back-propagation through time, in memory that does not grow with their length);
    the loss never holds all logits, and labels count by weights of their own if a batch has `label_weights` [B, T] (the mean is
    still over the number of labels, so that weights of 2 double the loss); the memory parameters have a learning rate of their
    own, no weight decay and full precision states; the log shows what the memory holds and how its gates move; a checkpoint
    appears only when it is complete.
    """

    args: BwrDncTrainingArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            warnings.warn(
                f"One process sees {self.args.n_gpu} GPUs, and uses one of them; start one for each, with `accelerate launch`.",
                stacklevel=2,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        if self.model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(self.model).__name__} has no language-model head, whose loss this trainer computes; use the library's `Trainer`."
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` would not be called: the loss is computed in chunks, without all logits; leave it out, or use the "
                "library's `Trainer`."
            )
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "PEFT's prompt learning puts tokens of its own before every span, for which there are no labels; use LoRA, or the library's "
                "`Trainer`."
            )
        if self.args.return_freed_memory and self.args.device.type == "cpu":
            return_freed_memory()
        if self.is_deepspeed_enabled and self.args.span_length and self.args.gradient_spans:
            raise ValueError(
                "DeepSpeed updates the weights after every backward pass, but detached spans need several per step; set "
                "gradient_spans to 0, or use DDP or FSDP2."
            )
        self.salience_cost = None
        if self.args.salience_cost:
            self.salience_cost = SalienceCost(self.model, self.args.salience_margin)
        self.gate_movement = GateMovement(self.model) if self.args.log_memory else None
        self.memory_metrics: dict[str, float] = {}

    def _set_signature_columns_if_needed(self):
        """The library drops columns that no forward pass takes; this one is taken here."""
        super()._set_signature_columns_if_needed()
        if "label_weights" not in self._signature_columns:
            self._signature_columns.append("label_weights")

    def _run_epoch(self, *args, **kwargs):
        """The library takes a step before it asks whether any is left; a checkpoint may have taken all of them."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    # ----------------------------------------------------------------------------------------------------------- loss

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """One micro-batch: read it span by span, back-propagate after every `gradient_spans` of them."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        scale = self._loss_scale(inputs, num_items_in_batch)
        num_tokens = inputs["labels"].shape[1]
        num_spans = -(-num_tokens // (self.args.span_length or num_tokens))
        per_gradient = self.args.gradient_spans or num_spans
        options = {"retention_noise_seed": self.state.global_step} if self.args.retention_noise else {}
        spans = self._spans(model, inputs, self._is_about_to_log(), **options)
        total, cache = 0.0, None
        for first in range(0, num_spans, per_gradient):
            is_last = first + per_gradient >= num_spans
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses = []
                for _ in range(min(per_gradient, num_spans - first)):
                    with self.compute_loss_context_manager(), self._salience_heard():
                        loss, cache = next(spans)
                    losses.append(loss * scale)
                loss = torch.stack(losses).sum()
                total = total + loss.detach()
                del losses
                if self.salience_cost is not None:
                    weight = self.args.salience_cost * min(per_gradient, num_spans - first) / num_spans
                    loss = loss + self.salience_cost.take() * weight / self._accumulated()
                self.accelerator.backward(loss)
            if cache is not None:
                cache.detach()
        if cache is not None and self.args.log_memory:
            self.memory_metrics = bank_metrics(cache)
        return total

    def _salience_heard(self) -> AbstractContextManager:
        return nullcontext() if self.salience_cost is None else self.salience_cost.listening()

    def _accumulated(self) -> int:
        """Backward passes of this optimizer step."""
        return max(getattr(self, "current_gradient_accumulation_steps", 1), 1)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The library's; only where predictions are wanted are there logits of whole rows."""
        if "labels" in inputs:
            inputs = {**inputs, "skip_logits": bool(prediction_loss_only)}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one batch, read in spans; without gradients their memory does not grow with the length either."""
        if not inputs.get("skip_logits", True):
            if "label_weights" in inputs:
                raise ValueError(
                    "A batch has `label_weights`, which count where only the loss is wanted; set prediction_loss_only=True, or leave "
                    "them out of data whose logits are wanted."
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}
        scale = self._loss_scale(inputs, num_items_in_batch)
        losses = [loss for loss, _ in self._spans(model, inputs, keeps_state=False)]
        loss = torch.stack(losses).sum() * scale
        return (loss, {}) if return_outputs else loss

    def _spans(
        self, model: nn.Module, inputs: dict, keeps_state: bool, **options
    ) -> Iterator[tuple[torch.Tensor, StateBankCache | None]]:
        return read_in_spans(
            model, inputs, self.args.span_length, self.args.loss_chunk_length, keeps_state=keeps_state, **options
        )

    def _loss_scale(self, inputs: dict, num_items_in_batch) -> torch.Tensor | float:
        """What a sum over tokens is multiplied with, to make the mean over the label tokens of the whole optimizer step."""
        if inputs.get("labels") is None:
            raise ValueError(
                f"A batch has {', '.join(inputs)}, but must have `labels`, too; have them added by the library's "
                "`DataCollatorForLanguageModeling(tokenizer, mlm=False)`, or take rows from `build_rows` and a `RowCollator`."
            )
        if num_items_in_batch is None:
            count = (shift_labels(inputs["labels"]) != IGNORED).sum()
            return 1 / (count.clamp(min=1) * self._accumulated())
        # Gradients of processes are averaged, but the count is over all of them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return processes / max(num_items_in_batch, 1)

    # ------------------------------------------------------------------------------------------------------ optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The library's optimizer, with the memory parameters in a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        mine = {id(p): p for name, p in model.named_parameters() if p.requires_grad and is_memory_parameter(name)}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mine]
        if mine:
            rate = (
                self.args.learning_rate if self.args.memory_learning_rate is None else self.args.memory_learning_rate
            )
            optimizer.add_param_group({"params": list(mine.values()), "lr": rate, "weight_decay": 0.0})
            _keep_states_precise(optimizer, list(mine.values()))
        if self.args.optimizer_in_backward:
            update_in_backward(optimizer)
        return optimizer

    def _get_grad_norm(self, model, grad_norm=None):
        # The gradients are gone by the time of the log.
        return None if self.args.optimizer_in_backward else super()._get_grad_norm(model, grad_norm)

    # ------------------------------------------------------------------------------------------------------------ log

    def _is_about_to_log(self) -> bool:
        """Whether the step under way is going to be logged, so that its memory is worth keeping."""
        if not self.args.log_memory or not self.is_world_process_zero():
            return False
        step, every = self.state.global_step + 1, self.state.logging_steps
        return (step == 1 and self.args.logging_first_step) or (every > 0 and step % every == 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.gate_movement is not None and "loss" in logs:
            logs |= self.memory_metrics | self.gate_movement.metrics()
            self.memory_metrics = {}
        super().log(logs, start_time)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Written beside its place and renamed when complete, so that a kill or a full disk leaves the last one intact."""
        output = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with complete_folder(output / name, self.args.should_save, self.accelerator.wait_for_everyone) as staged:
                self._staged_output = staged.parent
                super()._save_checkpoint(model, trial)
                best = self.state.best_model_checkpoint
                if best is not None and Path(best).parent == staged.parent:
                    self.state.best_model_checkpoint = str(output / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
        finally:
            self._staged_output = None
            self.args.push_to_hub, self.args.save_total_limit = pushes, limit
        if pushes:
            self._push_from_checkpoint(str(output / name))
        if self.args.should_save:
            rotate_checkpoints(str(output), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    _staged_output: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staged_output is None else str(self._staged_output)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Whatever the library stumbles over while it reads a checkpoint becomes a `ValueError` that names the checkpoint."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{checkpoint} is damaged, or of another model or method ({reason}); use the settings that it was made with, or "
            "remove it to go on from the one before"
        ) from error


def _keep_states_precise(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """8-bit optimizers keep the states of these parameters in 32 bits."""
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        manager.override_config(parameters, "optim_bits", 32)
        for parameter in parameters:
            # It goes by `id`, which a later model in this process may get for something else.
            weakref.finalize(parameter, manager.pid2config.pop, id(parameter), None)


def update_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """
    Step each parameter as soon as its gradient is complete, and free the gradient: never more than a few exist at once.

    At that moment it is the only parameter that has a gradient, so an ordinary step of the whole optimizer changes it alone.
    """

    def update(parameter: torch.Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(update)
