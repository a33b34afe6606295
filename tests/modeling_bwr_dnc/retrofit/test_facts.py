"""Facts are whole, their questions have one answer, and hiding them changes nothing of the text around."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from modeling_bwr_dnc.evaluation.recall import KINDS, text_to_recall, unseen_facts
from modeling_bwr_dnc.retrofit.facts import CHOICES, MADE, TEMPLATES, Fact, hide_facts, make_fact, sentence_ends


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_makes_a_fact(template):
    draw = random.Random(0)
    fact = Fact.parse(template, lambda name: MADE[name](draw) if name in MADE else draw.choice(CHOICES[name]))
    assert fact.answer and fact.stem + fact.answer in fact.sentence.replace(" " + fact.answer, fact.answer)
    assert fact.question.endswith("?") and not set("{}[]|") & set(fact.sentence + fact.question)


@given(some.integers(0, 10_000), some.lists(some.integers(0, 400), unique=True, max_size=12))
def test_hidden_facts_leave_the_text_around_them_as_it_was(tokenizer, manual, seed, places):
    draw = random.Random(seed)
    facts = {place: make_fact(draw) for place in places}
    text, is_fact = hide_facts(tokenizer, manual[:400], facts)
    assert [token for token, hidden in zip(text, is_fact, strict=True) if not hidden] == manual[:400]
    hidden = tokenizer.decode([token for token, mine in zip(text, is_fact) if mine])
    assert hidden == "".join(" " + facts[place].sentence for place in sorted(places))


def test_sentences_end_where_a_reader_says_so(tokenizer):
    ids = tokenizer("It rained. The sun came out.\nThen, at 3.14, it set").input_ids
    pieces = [tokenizer.decode(ids[:end]).strip() for end in sentence_ends(tokenizer, ids)]
    assert pieces[0] == "It rained." and "It rained. The sun came out." in pieces
    assert sentence_ends(tokenizer, tokenizer("no end").input_ids) == [2]


@given(some.integers(0, 10_000), some.integers(400, 3000))
def test_a_text_to_recall_has_its_length_and_every_fact_once(tokenizer, manual, seed, length):
    ids, _, facts = text_to_recall(tokenizer, manual, length, random.Random(seed))
    text = tokenizer.decode(ids)
    assert len(ids) == length and len(facts) == len(KINDS)
    starts = [text.find(fact.sentence) for fact in facts]
    assert -1 not in starts and starts == sorted(starts)
    assert all(text.count(fact.sentence) == 1 for fact in facts)


def test_too_short_for_the_facts_is_refused(tokenizer, manual):
    with pytest.raises(ValueError, match="no room for"):
        text_to_recall(tokenizer, manual, 100, random.Random(0))
    with pytest.raises(ValueError, match="give a longer text"):
        text_to_recall(tokenizer, manual[:500], 1000, random.Random(0))


def test_what_is_tested_is_not_what_is_taught():
    taught = {fact.sentence for seed in range(300) for fact in [make_fact(random.Random(seed))]}
    tested = {fact.sentence for seed in range(300) for fact in unseen_facts(random.Random(seed))}
    assert not taught & tested
    assert not {template.split(" | ")[1] for template in KINDS.values()} & {t.split(" | ")[1] for t in TEMPLATES}
