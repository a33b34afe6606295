"""
How much more attention salient slots get, by layer: a few dozen numbers, fitted by gradients through questions and prose alone.

A model reads a stretch of text with facts hidden in it, its memory overflowing, and no gradient. Then, with gradients to the boosts
only, it is asked for some of the facts, and reads on. The boosts minimise the mean loss of the answers plus `prose_weight` times
that of what follows in the text: without the latter every layer would stare at what is salient, whatever it reads.
"""

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import read_blocks
from .freezing import only_trained
from .salience import text_with_facts

# A boost below this is none.
NEGLIGIBLE = 0.05


def fit_attention_boost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[int]],
    *,
    seed: int = 0,
    num_steps: int = 40,
    lengths: tuple[float, float] = (1.2, 3.2),
    gap: tuple[int, int] = (100, 600),
    num_questions: int = 4,
    num_prose: int = 256,
    prose_weight: float = 4.0,
    learning_rate: float = 0.15,
    start: float = 1.0,
    on_step: Callable[[int, float, float], object] | None = None,
) -> list[float]:
    """
    Set `config.attention_boost` of `model`, whose salience is fitted already, and return it: one number per layer.

    Args:
        lengths: least and most that is read before each step, in times of `config.max_keys`.
        gap: least and most tokens between two facts.
        num_questions, num_prose: facts that are asked for, and tokens that are read on, in each step.
        start: all boosts at the beginning.
        on_step: called with the number of the step, the loss of its answers and of its prose, in nats per token.

    Raises:
        ValueError: if the model has no slots, or a text is shorter than `lengths` and `num_prose` ask for.
    """
    config = model.config
    if not config.use_memory or not any(config.memory_slots):
        raise ValueError(
            "the model reads no slots, so none can gain attention; give it some (`memory_slots`, `use_memory`)"
        )
    shortest, longest = (round(times * config.max_keys) for times in lengths)
    for token_ids in texts:
        if len(token_ids) < longest + num_prose:
            raise ValueError(
                f"a text has {len(token_ids)} tokens, but fitting the attention boosts takes {longest + num_prose}; give longer "
                "texts, or leave the boosts out"
            )
    draw = random.Random(f"{seed} boost")
    raw = torch.full((config.num_hidden_layers,), start).expm1().log().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=learning_rate)
    try:
        with only_trained(model):
            for step in range(num_steps):
                token_ids, length = texts[step % len(texts)], draw.randrange(shortest, longest)
                begin = draw.randrange(len(token_ids) - length - num_prose + 1)
                stretch, after = (
                    token_ids[begin : begin + length],
                    token_ids[begin + length : begin + length + num_prose],
                )
                text, _, facts = text_with_facts(tokenizer, stretch, draw, gap)
                boosts = F.softplus(raw)
                # A leaf, in which the gradients of all losses of this step add up.
                seen = boosts.detach().requires_grad_()
                _set_boosts(model, seen)
                with torch.no_grad():
                    *_, (_, _, memory) = read_blocks(model, torch.tensor([text[:-1]]))
                prose = _loss(model, memory, [text[-1], *after], len(after))
                (prose_weight * prose).backward()
                answers = 0.0
                asked = draw.sample(facts, min(num_questions, len(facts)))
                for fact in asked:
                    question, answer = fact.token_ids(tokenizer)
                    loss = _loss(model, memory, [text[-1], *question, *answer], len(answer))
                    (loss / len(asked)).backward()
                    answers += loss.item() / len(asked)
                boosts.backward(seen.grad)
                optimizer.step()
                optimizer.zero_grad()
                if on_step is not None:
                    on_step(step, answers, prose.item())
    finally:
        found = F.softplus(raw).tolist()
        config.attention_boost = [round(boost, 3) if boost >= NEGLIGIBLE else 0.0 for boost in found]
    return config.attention_boost


def _set_boosts(model: PreTrainedModel, boosts: torch.Tensor) -> None:
    """Past the check of the config, which takes numbers only: gradients flow to these."""
    vars(model.config)["attention_boost"] = list(boosts.to(model.device).unbind())


def _loss(model: PreTrainedModel, memory, token_ids: list[int], count: int) -> torch.Tensor:
    """Mean loss of the last `count` of some tokens after what a memory has read, which stays as it is."""
    ids = torch.tensor([token_ids], device=model.device)
    # That something in it requires a gradient is what makes a layer read with gradients.
    embedded = model.get_input_embeddings()(ids[:, :-1]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, past_key_values=memory, use_cache=False, logits_to_keep=count).logits
    return F.cross_entropy(logits[0].float(), ids[0, -count:])
