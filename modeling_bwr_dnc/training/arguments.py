"""What can be set for training beside the library's `TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class BwrDncTrainingArguments(TrainingArguments):
    """The library's arguments, and those of a bounded memory. Raises `ValueError` for combinations that cannot work."""

    memory_learning_rate: float | None = field(
        default=1e-2,
        metadata={
            "help": "Peak learning rate of the memory parameters (salience, routing, compressor); None: `learning_rate`."
        },
    )
    span_length: int | None = field(
        default=None,
        metadata={"help": "Read each sequence in spans of so many tokens, carrying the memory; None: all at once."},
    )
    gradient_spans: int = field(
        default=1,
        metadata={"help": "Spans that a gradient may cross before the memory is detached; 0: the whole sequence."},
    )
    loss_chunk_length: int = field(
        default=256,
        metadata={
            "help": "Tokens whose logits exist at the same time, in the forward pass; the backward pass needs none."
        },
    )
    retention_noise: bool = field(
        default=False, metadata={"help": "Gumbel noise on what the memory retains, seeded by the step."}
    )
    salience_cost: float = field(
        default=0.0,
        metadata={
            "help": "Weight beside the loss of the mean softplus of salience logits, at which what nothing needs sinks: the "
            "answers of a task stop teaching it once they are right."
        },
    )
    salience_margin: float = field(
        default=0.0,
        metadata={
            "help": "How far below 0 the salience cost pushes, added to the logits in its softplus; above 0 it leaves alone what the loss "
            "pulls up. Rows longer than those of the training have more noise, so that facts must be ahead of it by more."
        },
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={"help": "Update each parameter as soon as its gradient is complete, and free the gradient at once."},
    )
    return_freed_memory: bool = field(
        default=True,
        metadata={"help": "On a CPU, give freed memory back at once: a lower and predictable peak, a little slower."},
    )
    use_cache: bool = field(
        default=True,
        metadata={"help": "The setting of the saved model (the library switches it off there); training needs none."},
    )
    log_memory: bool = field(default=True, metadata={"help": "Log what the memory holds, forgets and learns."})

    def __post_init__(self):
        super().__post_init__()
        counts = (
            ("gradient_spans", 0),
            ("loss_chunk_length", 1),
            ("gradient_accumulation_steps", 1),
            ("salience_cost", 0),
            ("salience_margin", 0),
        )
        for name, least in counts:
            if not getattr(self, name) >= least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {least}.")
        if self.span_length is not None and self.span_length < 1:
            raise ValueError(
                f"`span_length` is {self.span_length}, but must be at least 1; leave it out to read all at once."
            )
        if self.memory_learning_rate is not None and not 0 <= self.memory_learning_rate < float("inf"):
            raise ValueError(
                f"`memory_learning_rate` is {self.memory_learning_rate}, but must be a number of at least 0."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, but the chunked loss has none; set it to 0, or use the "
                "library's `Trainer`."
            )
        if self.optimizer_in_backward:
            self._check_optimizer_in_backward()

    def _check_optimizer_in_backward(self) -> None:
        problems = {
            f"max_grad_norm is {self.max_grad_norm}; set it to 0": self.max_grad_norm != 0,
            f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; set it to 1": (
                self.gradient_accumulation_steps > 1
            ),
            "spans are detached; set gradient_spans to 0 or leave span_length out": bool(
                self.span_length and self.gradient_spans
            ),
            f"there are {self.world_size} processes; use one": self.world_size > 1,
            "fp16 needs a gradient scaler; use bf16": self.fp16,
        }
        found = [text for text, is_problem in problems.items() if is_problem]
        if found:
            raise ValueError(
                "`optimizer_in_backward` updates a parameter the moment its gradient is there, so each step must be one "
                f"backward pass, and nothing may look at all gradients together: {'; '.join(found)}."
            )
