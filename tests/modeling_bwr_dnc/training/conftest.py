import pydoc_data.topics

import pytest
import torch
from datasets import Dataset

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.training import BwrDncTrainer, BwrDncTrainingArguments
from modeling_bwr_dnc.training.data import RowCollator, pack
from tests.modeling_bwr_dnc.builders import tiny_config


@pytest.fixture(scope="session")
def text():
    """Real English prose with tables: the documentation of Python's topics."""
    return "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="session")
def rows(text):
    """Bytes of real text in packed rows of 96 tokens."""
    ids = list(text[:8000].encode())
    documents = [(ids[i : i + 130], ids[i : i + 130]) for i in range(0, len(ids), 130)]
    return Dataset.from_list(list(pack(documents, 96)))


@pytest.fixture
def train(tmp_path, rows):
    """Train a tiny model on real text; returns the trainer."""

    def run(resume=None, model=None, config=None, data=rows, **arguments):
        torch.manual_seed(0)
        if model is None:
            model = BwrDncForCausalLM(tiny_config(vocab_size=256, hidden_dropout=0.1, **config or {}))
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "span_length": 32,
        }
        trainer = BwrDncTrainer(
            model=model,
            args=BwrDncTrainingArguments(**defaults | arguments),
            train_dataset=data,
            eval_dataset=rows.select(range(4)),
            data_collator=RowCollator(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
