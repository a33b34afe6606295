"""Training: the Trainer for a bounded memory, data, adapters, and what fits into how much memory."""

from ..captured_step import CapturedStep
from ..peft_defaults import register_peft_defaults
from .arguments import BwrDncTrainingArguments
from .trainer import BwrDncTrainer

register_peft_defaults()

__all__ = ["BwrDncTrainer", "BwrDncTrainingArguments", "CapturedStep", "register_peft_defaults"]
