"""A table of contents is put where it is said to be, and those of other texts are kept by second heads that have learned some."""

import random

import pytest
import torch

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.retrofit import fit_contents
from modeling_bwr_dnc.retrofit.contents import headings, stretch_with_contents, with_contents
from tests.modeling_bwr_dnc.builders import tiny_config

NOUNS = "Printers Disks Networks Keyboards Users Packages Kernels Fonts Mirrors Partitions Sounds Cameras".split()


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = BwrDncForCausalLM(
        tiny_config(vocab_size=len(tokenizer), segment_length=16, memory_slots=[64, 8, 8], initializer_range=0.2)
    ).eval()
    # As in trained models, beginnings of lines have something in common.
    number = [tokenizer(str(digit)).input_ids[0] for digit in range(10)]
    model.get_input_embeddings().weight.data[number, 1] += 2
    return model


def book(seed: int) -> str:
    """Chapters of made-up prose under numbered headings."""
    draw = random.Random(seed)
    sentence = "It is not said what the {} are for, but most people have seen some of them.\n"
    parts = []
    for chapter in range(1, 60):
        title = f"{chapter}.{draw.randrange(1, 9)}. {draw.choice(NOUNS)} and {draw.choice(NOUNS).lower()}"
        parts.append(f"{title}\n\n" + "".join(sentence.format(draw.choice(NOUNS).lower()) for _ in range(3)))
    return "\n\n".join(["A book", *parts])


def test_headings_are_short_lines_alone_that_open_with_a_number_or_a_capital():
    text = "\n\nFirst steps\n\nHere it begins.\n\n2.1. Second steps\n\nmore\n\nFirst steps\n\nA line\nof two\n\nNOTE\n\nTable 1: x y\n\nx = {1}\n\n"
    assert headings(text) == ["First steps", "2.1. Second steps"]


def test_a_table_stands_where_it_is_said_to_and_holds_every_heading(tokenizer):
    text = book(0)
    for seed in range(8):
        whole, place = with_contents(text, headings(text), random.Random(seed))
        assert whole[: place.start] + whole[place.stop :] == text
        assert all(name in whole[place] for name in headings(text))
    token_ids, marks = stretch_with_contents(tokenizer, text, 600, random.Random(1))
    assert len(token_ids) == len(marks) == 600
    table = tokenizer.decode([token for token, mark in zip(token_ids, marks, strict=True) if mark])
    rest = tokenizer.decode([token for token, mark in zip(token_ids, marks, strict=True) if not mark])
    assert len(headings(rest)) > 3 and all(name in table for name in headings(rest))


def test_tables_of_other_texts_stand_out_by_the_strength_asked_for(model, tokenizer):
    token_ids, marks = stretch_with_contents(tokenizer, book(9), 600, random.Random(2))
    texts = [book(seed) for seed in range(4)]
    gaps = fit_contents(model, tokenizer, texts, strength=0.5, layers=[1], length=600, seed=3)
    assert set(gaps) == {1} and gaps[1] > 1
    untouched, taught = (layer.self_attn.memory.secondary_salience for layer in model.model.layers)
    assert not untouched.weight.any()
    heard = []
    hook = model.model.layers[1].self_attn.memory.salience.register_forward_pre_hook(lambda _, i: heard.append(i[0]))
    model(torch.tensor([token_ids]))
    hook.remove()
    lifts, is_table = taught(torch.cat(heard, dim=1))[0, :, 0], torch.tensor(marks)
    others = lifts[4:][~is_table[4:]]
    assert others.std().item() == pytest.approx(0.5, rel=0.3) and abs(others.mean()) < 0.2
    assert lifts[is_table].mean() - others.mean() > 0.5
    # What is added comes on top of what the head was.
    before = taught.weight.clone()
    fit_contents(model, tokenizer, texts, strength=0.25, layers=[1], length=600, seed=3)
    torch.testing.assert_close(taught.weight, 1.5 * before)


def test_texts_without_headings_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="7 to 45 headings"):
        fit_contents(model, tokenizer, ["no heading. " * 1000], strength=1.0, length=600)
    with pytest.raises(ValueError, match="no salience to fit"):
        fit_contents(model, tokenizer, [book(0)], strength=1.0, layers=[7], length=600)
