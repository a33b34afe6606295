"""The shipped tokenizer: stock class, exactly 50,000 entries, lossless, with a chat template."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_bwr_dnc.presets import tokenizer_path
from scripts.train_tokenizer import CHAT_TEMPLATE

TOKENIZER = AutoTokenizer.from_pretrained(tokenizer_path())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
]


def test_is_a_stock_class_of_50000_entries():
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    assert type(TOKENIZER).__module__.startswith("transformers.")
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 50_000
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(50_000))


def test_special_tokens_have_the_first_ids():
    assert TOKENIZER.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert TOKENIZER("a<|im_end|><|endoftext|>").input_ids[-2:] == [2, 0]
    assert TOKENIZER.decode(TOKENIZER("Hi<|im_end|>").input_ids, skip_special_tokens=True) == "Hi"


def test_adds_nothing_of_its_own():
    assert TOKENIZER("hello").input_ids == TOKENIZER("hello", add_special_tokens=False).input_ids


@given(st.text())
def test_decoding_gives_back_any_text(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_digits_stand_alone():
    assert [TOKENIZER.decode([token]) for token in TOKENIZER("2026").input_ids] == ["2", "0", "2", "6"]


def test_common_words_are_one_token():
    for word in (" the", " because", " function", " return", " Schiff", " maison"):
        assert len(TOKENIZER(word).input_ids) <= 2, word
    assert len(TOKENIZER(" the").input_ids) == len(TOKENIZER(" because").input_ids) == 1


def test_chat_template_is_chatml():
    text = TOKENIZER.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_template_marks_what_the_assistant_says():
    encoded = TOKENIZER.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert TOKENIZER.decode(said) == "It is 42.<|im_end|>"


def test_shipped_template_is_that_of_the_script():
    assert TOKENIZER.chat_template == CHAT_TEMPLATE
