"""
Facts over two sessions: one process reads a text and saves its memory; a new one loads it, and is asked for the facts.

The new process gets a folder: the memory, and `session.json` with the model, its settings and the facts. It leaves the logits of
the answers there: python -m modeling_bwr_dnc.evaluation.sessions FOLDER
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading import read_model, read_tokenizer
from ..retrofit.facts import Fact
from ..state_bank import StateBankCache
from .recall import Answer, accuracy, answer_from, answer_logits, asked_by_depth

SESSION_FILE = "session.json"
LOGITS_FILE = "logits.safetensors"


def measure_sessions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    policies: Sequence[str],
    lengths: Sequence[int],
    num_texts: int,
    model_name: str,
    seed: int = 0,
    full_limit: int | None = None,
) -> Iterator[dict]:
    """
    What `measure_recall` does, but a new process answers; `same` is the share of answers whose logits equal, bit for bit, those
    without the break.

    Args:
        model_name: folder or Hub name that the new process loads the model from.
    """

    def ask(cache: StateBankCache, facts: list[Fact], settings: dict) -> list[tuple[Answer, bool]]:
        budget = {"memory_slots": list(model.config.memory_slots), "slot_shares": model.config.slot_shares}
        settings = budget | settings
        here = [answer_logits(model, tokenizer, cache, fact).cpu() for fact in facts]
        there = answered_elsewhere(cache, facts, model_name, settings, model.device)
        return [
            (answer_from(logits, tokenizer, fact), torch.equal(logits, expected))
            for fact, logits, expected in zip(facts, there, here, strict=True)
        ]

    for point, by_depth in asked_by_depth(
        model, tokenizer, token_ids, policies, lengths, num_texts, seed, full_limit, ask
    ):
        for depth, found in by_depth.items():
            answers, same = zip(*found)
            yield point | {"depth": depth, "same": sum(same) / len(same)} | accuracy(answers)


def answered_elsewhere(
    cache: StateBankCache, facts: Sequence[Fact], model_name: str, settings: dict, device: torch.device
) -> list[torch.Tensor]:
    """Save a memory, and have a new process load it and answer for `facts`: the logits of each answer, [A, V]."""
    with tempfile.TemporaryDirectory() as folder:
        cache.save_pretrained(folder)
        session = {"model": str(model_name), "settings": settings, "device": str(device)}
        # Sums of threads are put together in another order when there are more of them.
        session["threads"] = torch.get_num_threads()
        session["facts"] = [dataclasses.asdict(fact) for fact in facts]
        Path(folder, SESSION_FILE).write_text(json.dumps(session), encoding="utf-8")
        command = [sys.executable, "-m", __name__, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"the new process for {model_name} failed: {reason}")
        logits = load_file(Path(folder, LOGITS_FILE))
    return [logits[str(index)] for index in range(len(facts))]


def answer_session(folder: str) -> None:
    """The second session."""
    session = json.loads(Path(folder, SESSION_FILE).read_text(encoding="utf-8"))
    torch.set_num_threads(session["threads"])
    model, tokenizer = read_model(session["model"]).to(session["device"]).eval(), read_tokenizer(session["model"])
    for name, value in session["settings"].items():
        setattr(model.config, name, value)
    cache = StateBankCache.from_pretrained(folder, config=model.config, device=model.device)
    facts = [Fact(**fact) for fact in session["facts"]]
    logits = [answer_logits(model, tokenizer, cache, fact).cpu().contiguous() for fact in facts]
    save_file({str(index): tensor for index, tensor in enumerate(logits)}, Path(folder, LOGITS_FILE))


if __name__ == "__main__":
    answer_session(sys.argv[1])
