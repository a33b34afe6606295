"""
Compressed slots that are worth their place: the compressors alone are trained, by the loss of text read through a small memory.

Everything that is not a compressor stays as it is, the weights of the source and what is salient too. Segments and slots are
run-time settings, so a memory a few times smaller than the one to be used teaches compression with short texts.

If asked for, facts are hidden in a share of the stretches, and asked for at the end: what is compressed is to be read not by prose
alone. And tokens that go on with what was said before, word for word and before the window, can count several times.
"""

import math
import random
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..settings import settings_changed
from ..token_loss import summed_cross_entropy
from .freezing import only_trained
from .salience import said_before, text_with_facts


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
    tokenizer: PreTrainedTokenizerBase | None = None,
    share: float = 1.0,
    copy_weight: float = 1.0,
    fact_share: float = 0.0,
    answer_weight: float = 0.25,
    gap: tuple[int, int] = (100, 400),
    num_questions: int = 3,
    on_step: Callable[[int, float], object] | None = None,
) -> None:
    """
    Train the compressors of `model` on stretches of `texts`, one per step, from a text drawn at random.

    Args:
        length: tokens of a stretch. The loss is that of the tokens for which sinks, slots and window have no more room.
        segment_length, memory_slots: settings that the model reads with meanwhile; levels 1 and 2 need slots.
        learning_rate: at its height, of Adam; the latent queries learn ten times as fast. It rises over ten steps, and falls to
            nothing over the second half.
        share: of the way from the compressors as they were to those of the last step that is gone in the end; where both are
            trained, half of it can be better than either.
        copy_weight: of the loss of a token that ends four in a row that were there before, and since then not in the window.
        tokenizer, fact_share: facts are hidden in this share of the stretches, least and most tokens apart by `gap`;
            `num_questions` of them are put at the end, and the loss of the answers, times `answer_weight`, is added.
        on_step: called with the number of the step and its loss of prose, in nats per token.

    Raises:
        ValueError: if the model has no compressor, or one in less than float32, nothing is ever compressed, a text or a stretch is too
            short, or facts are to be hidden without a tokenizer; if the loss or a gradient is no longer finite, with the compressors
            as they were then.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if ".memory.compressor." in name}
    if not named:
        raise ValueError("the model has no 'state_bank_attention' layer, so there is no compressor to fit")
    narrow = {parameter.dtype for parameter in named.values() if torch.finfo(parameter.dtype).bits < 32}
    if narrow:
        raise ValueError(
            f"the compressors are in {narrow.pop()}, in which small steps are lost; make the memory parameters float32 "
            "(`memory_in_float32`)"
        )
    room = checked_room(model, texts, length, segment_length, memory_slots)
    if fact_share and tokenizer is None:
        raise ValueError(f"fact_share is {fact_share}, but facts cannot be hidden without a tokenizer")
    draw = random.Random(f"{seed} compressor")
    before = [parameter.detach().clone() for parameter in named.values()]
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
                text, is_fact, answers = token_ids[begin : begin + length], [False] * length, []
                if fact_share and draw.random() < fact_share:
                    text, is_fact, facts = text_with_facts(tokenizer, text, draw, gap)
                    asked = draw.sample(facts, min(num_questions, len(facts)))
                    answers = [fact.token_ids(tokenizer) for fact in asked]
                copied = said_before(text, 2 * segment_length)
                weights = [
                    0.0 if index < room or hidden else copy_weight if is_copy else 1.0
                    for index, (is_copy, hidden) in enumerate(zip(copied, is_fact, strict=True))
                ]
                prose = _add_gradients(model, text, weights, answers, answer_weight)
                norm = torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
                if not math.isfinite(prose + norm.item()):
                    raise ValueError(
                        f"after {step} steps of the compressors the loss is {prose} and the norm of its gradient {norm.item()}, but both must "
                        f"be finite; lower the learning rate, now {learning_rate}"
                    )
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if on_step is not None:
                    on_step(step, prose)
        with torch.no_grad():
            for parameter, start in zip(named.values(), before, strict=True):
                parameter.lerp_(start, 1 - share)
    finally:
        model.train(was_training)


def checked_room(
    model: PreTrainedModel, texts: Sequence[list[int]], length: int, segment_length: int, memory_slots: Sequence[int]
) -> int:
    """
    Tokens that the memory of `fit_compressor` has room for, in a layer with an equal share of the slots.

    Raises:
        ValueError: for settings below the least, if it compresses nothing, or a stretch of `length` tokens does not overflow it,
            or is longer than a text.
    """
    if segment_length < 1 or min(memory_slots) < 0:
        raise ValueError(
            f"segment_length is {segment_length} and memory_slots {list(memory_slots)}, but a segment must have at least one token, and "
            "no level less than no slot"
        )
    room = model.config.num_sink_tokens + sum(memory_slots) + 2 * segment_length
    if not memory_slots[1]:
        raise ValueError(f"memory_slots is {list(memory_slots)}, without a compressed level; give level 1 some slots")
    if length <= room or any(len(token_ids) < length for token_ids in texts) or not texts:
        raise ValueError(
            f"length is {length} and the texts have {[len(token_ids) for token_ids in texts]} tokens, but a stretch must be longer "
            f"than what the memory has room for, {room} tokens, and no longer than the texts"
        )
    return room


def _add_gradients(
    model: PreTrainedModel,
    text: list[int],
    weights: list[float],
    answers: Sequence[tuple[list[int], list[int]]],
    answer_weight: float,
) -> float:
    """
    Read a text, and at its end questions with their answers. Add to the gradients of the parameters those of the mean loss of the
    text, its tokens weighted, and those of the mean loss of the answers; returns the former.
    """
    token_ids, of_answers = list(text), [0.0] * len(text)
    for question, answer in answers:
        token_ids += question + answer
        of_answers += [0.0] * len(question) + [1.0] * len(answer)
    ids = torch.tensor(token_ids, device=model.device)
    hidden_states = model.get_decoder()(ids[None, :-1], use_cache=False).last_hidden_state[0]

    def mean_loss(weights: list[float]) -> torch.Tensor:
        total, head = hidden_states.new_zeros(()), model.get_output_embeddings().weight
        for weight in set(weights) - {0.0}:
            places = torch.tensor([index for index, other in enumerate(weights) if other == weight], device=ids.device)
            total = total + weight * summed_cross_entropy(hidden_states[places - 1], head, ids[places])[0]
        return total / sum(weights)

    prose = mean_loss(weights)
    loss = prose + answer_weight * mean_loss(of_answers) if answers else prose
    loss.backward()
    return prose.item()
