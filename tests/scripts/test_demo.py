"""`scripts.demo` refuses in one line what would fail after minutes; `make demo` runs the whole of it."""

from scripts import demo
from tests.tiny_sources import byte_tokenizer


def test_the_fact_stands_where_it_is_said_to_stand():
    tokenizer = byte_tokenizer()
    for num_tokens in (2048, 8192):
        ids, place = demo.text_with_fact(tokenizer, num_tokens)
        assert ids.shape == (1, num_tokens) and place < num_tokens // 2
        assert tokenizer.decode(ids[0, place:]).startswith(" " + demo.FACT.sentence)


def test_bad_input_is_refused_at_once(assert_refused, tmp_path):
    assert_refused("at least 2048", demo, "--output", tmp_path, "--num-tokens", -5)
    assert_refused("nothing can be written", demo, "--output", __file__)
