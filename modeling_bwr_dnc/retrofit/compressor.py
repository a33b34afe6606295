"""
Compressed slots that are worth their place: the compressors alone are trained, by the loss of text read through a small memory.

Everything that is not a compressor stays as it is, the weights of the source and what is salient too. Segments and slots are
run-time settings, so a memory a few times smaller than the one to be used teaches compression with short texts.
"""

import random
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ..settings import settings_changed
from ..token_loss import IGNORED
from .freezing import only_trained


def fit_compressor(
    model: PreTrainedModel,
    texts: Sequence[list[int]],
    *,
    seed: int = 0,
    num_steps: int = 300,
    length: int = 1100,
    segment_length: int = 64,
    memory_slots: Sequence[int] = (96, 64, 32),
    learning_rate: float = 1e-3,
    on_step: Callable[[int, float], object] | None = None,
) -> None:
    """
    Train the compressors of `model` on stretches of `texts`, one per step, from a text drawn at random.

    Args:
        length: tokens of a stretch. The loss is that of the tokens for which sinks, slots and window have no more room.
        segment_length, memory_slots: settings that the model reads with meanwhile; levels 1 and 2 need slots.
        learning_rate: at its height, of Adam; the latent queries learn ten times as fast. It rises over ten steps, and falls to
            nothing over the second half.
        on_step: called with the number of the step and its loss, in nats per token.

    Raises:
        ValueError: if the model has no compressor, nothing is ever compressed, or a text or a stretch is too short.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if ".memory.compressor." in name}
    room = model.config.num_sink_tokens + sum(memory_slots) + 2 * segment_length
    if not named:
        raise ValueError("the model has no 'state_bank_attention' layer, so there is no compressor to fit")
    if not memory_slots[1]:
        raise ValueError(f"memory_slots is {list(memory_slots)}, without a compressed level; give level 1 some slots")
    if length <= room or any(len(token_ids) < length for token_ids in texts) or not texts:
        raise ValueError(
            f"length is {length} and the texts have {[len(token_ids) for token_ids in texts]} tokens, but a stretch must be longer "
            f"than what the memory has room for, {room} tokens, and no longer than the texts"
        )
    draw = random.Random(f"{seed} compressor")
    groups = [
        {"params": [parameter], "lr": learning_rate * (10 if name.endswith("latent_query") else 1)}
        for name, parameter in named.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10, 2 * (num_steps - step) / num_steps)
    )
    was_training = model.training
    model.train()
    small = settings_changed(model, segment_length=segment_length, memory_slots=list(memory_slots))
    try:
        with only_trained(model, named.values()), small:
            for step in range(num_steps):
                token_ids = draw.choice(texts)
                begin = draw.randrange(len(token_ids) - length + 1)
                ids = torch.tensor([token_ids[begin : begin + length]], device=model.device)
                labels = ids.clone()
                labels[:, :room] = IGNORED
                loss = model(ids, labels=labels, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if on_step is not None:
                    on_step(step, loss.item())
    finally:
        model.train(was_training)
