"""Reading text into a StateBank and going on from there: documents, continuations, turns of a chat."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from modeling_bwr_dnc.state_bank import StateBankCache


@torch.no_grad()
def read_tokens(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    cache: StateBankCache,
    on_progress: Callable[[int], object] | None = None,
    **forward_options,
) -> None:
    """Read `token_ids` [1, T] into `cache`, in blocks; none are no mistake.

    Args:
        on_progress: called after every block with the number of tokens it held.
    """
    if token_ids.shape[1] == 0:
        return
    for block in token_ids.split(4 * model.config.segment_length, dim=1):
        model(block.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **forward_options)
        if on_progress is not None:
            on_progress(block.shape[1])


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: torch.Tensor,
    cache: StateBankCache,
    streamer: BaseStreamer | None = None,
    on_progress: Callable[[int], object] | None = None,
    use_memory: bool = True,
    **generation_options,
) -> torch.Tensor:
    """Read the new tokens `token_ids` [1, T], write on from them, and return what was written, [1, N].

    Afterwards `cache` holds all of it, the last written token included, so that the next call goes on seamlessly.
    """
    memory: dict = {} if use_memory else {"use_memory": False}
    read_tokens(model, token_ids[:, :-1], cache, on_progress, **memory)
    before = cache.get_seq_length()
    last = token_ids[:, -1:].to(model.device)
    generation_options.setdefault("pad_token_id", tokenizer.pad_token_id)
    sequence = model.generate(
        last,
        # As wide as the history: the last token is a new one, even where what was read is equal to it.
        attention_mask=last.new_ones(1, before + 1),
        past_key_values=cache,
        streamer=streamer,
        **memory,
        **generation_options,
    )
    num_read = cache.get_seq_length() - before
    if num_read < sequence.shape[1]:
        read_tokens(model, sequence[:, num_read:], cache, **memory)
    return sequence[:, 1:]


def chat_turn(tokenizer: PreTrainedTokenizerBase, message: str, is_first: bool) -> torch.Tensor:
    """Token ids [1, T] of a user's turn up to where the assistant begins; a later turn goes on from an earlier state.

    Raises:
        ValueError: if the tokenizer has no chat template, or one whose later turns do not extend the earlier ones.
    """
    turn = {"role": "user", "content": message}
    earlier = [] if is_first else [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    text = _render(tokenizer, [*earlier, turn], add_generation_prompt=True)
    if earlier:
        prefix = _render(tokenizer, earlier)
        if not text.startswith(prefix):
            raise ValueError("this chat template rewrites earlier turns, so a saved state cannot be continued with it")
        text = text.removeprefix(prefix)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids


def close_chat_turn(tokenizer: PreTrainedTokenizerBase, reply: torch.Tensor) -> torch.Tensor:
    """Token ids [1, T] that the chat template puts after the assistant's `reply` [1, N], less what the reply ends with."""
    mark = "REPLY"
    turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": mark}]
    ending = _render(tokenizer, turns).rpartition(mark)[2]
    ids = tokenizer(ending, add_special_tokens=False, return_tensors="pt").input_ids.long()
    # The end of the turn is written already, by itself or before the end of the text.
    if ids.shape[1] and ids[0, 0] in reply[0, -2:]:
        ids = ids[:, 1:]
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **options) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template; leave --chat away")
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)
