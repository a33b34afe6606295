"""Reading in blocks, going on from there, and turns of a chat."""

import pytest
import torch

from modeling_bwr_dnc import StateBankCache
from modeling_bwr_dnc.conversion import converted_config, transfer_weights
from modeling_bwr_dnc.evaluation.reading import (
    chat_turn,
    close_chat_turn,
    continue_text,
    read_tokens,
)
from tests.tiny_sources import CONFIGS, byte_tokenizer, random_source

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model():
    source = random_source(CONFIGS["llama"])
    return transfer_weights(source, converted_config(source.config, 8, 2, [16, 8, 4]))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def test_reading_in_blocks_leaves_the_memory_of_one_pass(model):
    ids = torch.randint(257, (1, 150))
    blocks, once = StateBankCache(config=model.config), StateBankCache(config=model.config)
    counted = []
    read_tokens(model, ids, blocks, counted.append)
    with torch.no_grad():
        model(ids, past_key_values=once)
    assert sum(counted) == blocks.get_seq_length() == 150 and len(counted) > 1
    strip = [
        {key: slot[key] for key in ("layer", "head", "level", "positions", "token_ids")} for slot in blocks.tokens()
    ]
    assert strip == [{key: slot[key] for key in strip[0]} for slot in once.tokens()]


def test_continuing_writes_what_generate_writes_and_remembers_all_of_it(model, tokenizer):
    ids = torch.randint(257, (1, 90))
    cache = StateBankCache(config=model.config)
    written = continue_text(model, tokenizer, ids, cache, **GREEDY)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=259, **GREEDY)[:, 90:]
    assert torch.equal(written, expected)
    assert cache.get_seq_length() == 90 + written.shape[1]


def test_continuing_twice_equals_reading_everything_at_once(model, tokenizer):
    first, second = torch.randint(257, (1, 70)), torch.randint(257, (1, 9))
    cache = StateBankCache(config=model.config)
    written = continue_text(model, tokenizer, first, cache, **GREEDY)
    resumed = continue_text(model, tokenizer, second, cache, **GREEDY)
    history = torch.cat([first, written, second], dim=1)
    assert torch.equal(
        resumed, continue_text(model, tokenizer, history, StateBankCache(config=model.config), **GREEDY)
    )


def test_single_token_prompt_is_continued(model, tokenizer):
    cache = StateBankCache(config=model.config)
    written = continue_text(model, tokenizer, torch.tensor([[65]]), cache, **GREEDY)
    assert cache.get_seq_length() == 1 + written.shape[1]


def test_a_last_token_like_all_before_is_continued(model, tokenizer):
    ids = torch.tensor([[65, 65]])
    written = continue_text(model, tokenizer, ids, StateBankCache(config=model.config), **GREEDY)
    assert torch.equal(written, model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[:, 2:])


def test_a_turn_that_ends_with_nothing_but_what_the_reply_ends_with_is_closed(model, tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    reply = torch.tensor([[65, tokenizer.eos_token_id]])
    cache = StateBankCache(config=model.config)
    read_tokens(model, reply, cache)
    read_tokens(model, close_chat_turn(tokenizer, reply), cache)
    assert cache.get_seq_length() == 2


def test_a_turn_that_was_ended_before_the_text_is_not_ended_again(tokenizer):
    turn_end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    alone = close_chat_turn(tokenizer, torch.tensor([[65]]))[0].tolist()
    assert alone[0] == turn_end
    for reply in ([65, turn_end], [65, turn_end, text_end]):
        assert close_chat_turn(tokenizer, torch.tensor([reply]))[0].tolist() == alone[1:]


def test_turns_of_a_chat_add_up_to_the_template_of_the_whole(tokenizer):
    reply = tokenizer("It is.", return_tensors="pt").input_ids
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    turns.append({"role": "user", "content": "Sure?"})
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for ending in ([], [tokenizer.eos_token_id]):
        written = torch.cat([reply, torch.tensor([ending], dtype=torch.long)], dim=1)
        parts = [chat_turn(tokenizer, "Is it?", True), written, close_chat_turn(tokenizer, written)]
        parts.append(chat_turn(tokenizer, "Sure?", False))
        assert tokenizer.decode(torch.cat(parts, dim=1)[0]) == whole


def test_chat_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_turn(tokenizer, "hello", True)


def test_chat_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        chat_turn(tokenizer, "hello", False)
