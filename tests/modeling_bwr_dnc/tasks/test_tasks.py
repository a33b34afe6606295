"""The tasks can be solved by reading, are what their docstrings show, and can be made again from their seeds."""

import dataclasses
import doctest
import importlib
import re

import numpy as np
import pytest

from modeling_bwr_dnc.presets import tokenizer_path
from modeling_bwr_dnc.tasks import (
    IGNORED,
    TASKS,
    Copy,
    Infill,
    Lookup,
    Mqar,
    Needle,
    Passkey,
    Recall,
    SelectiveCopy,
    Story,
    TextNeedle,
    VariableTracking,
)
from modeling_bwr_dnc.tasks.stories import IDS
from modeling_bwr_dnc.tasks.task import BLANK, COPY

VARIANTS = [
    *(task() for task in TASKS.values()),
    *(Recall(hops=hops, num_chains=5) for hops in (2, 3)),
    *(Story(hops=hops, length=512, seed=3) for hops in (1, 2, 3)),
    *(Story(hops=hops, length=512, num_facts=8 * hops, num_queries=4) for hops in (1, 2, 3)),
    Story(hops=2, length=300, num_facts=10, num_arrivals=3, num_takings=4, num_queries=4, num_easier=2),
    Story(hops=3, length=80, num_facts=12, num_arrivals=4, num_takings=3, num_queries=2, num_easier=3),
    Copy(length=200, num_symbols=7),
    Copy(length=33),
    Lookup(symbols_per_kind=9, num_pairs=9),
    Mqar(length=64, num_pairs=4),
    Needle(num_needles=5, needle_length=1, depth=0.0, length=300),
    TextNeedle(num_needles=4, length=1500),
    VariableTracking(num_chains=3, length=1500, depth=0.5),
]


def answered(task, row):
    """Label positions of a row, and what the oracle says there, reading only what comes before."""
    return {
        position: (label, task.oracle(row["input_ids"][:position]))
        for position, label in enumerate(row["labels"])
        if label != IGNORED
    }


@pytest.mark.parametrize("task", VARIANTS, ids=lambda task: task.name)
def test_oracle_solves_every_row(task):
    for row in task.dataset(20):
        answers = answered(task, row)
        assert answers and all(label == said for label, said in answers.values())


@pytest.mark.parametrize("task", VARIANTS, ids=lambda task: task.name)
def test_oracle_depends_on_what_it_reads(task):
    """An oracle that knew the rows, or labels that did not follow from them, would pass the test above."""
    said = set()
    for index in range(40):
        row = task.row(index)
        first = next(position for position, label in enumerate(row["labels"]) if label != IGNORED)
        if isinstance(task, (TextNeedle, Passkey, VariableTracking)):
            # The first token of an answer is a space.
            first += 1
        said.add(task.oracle(row["input_ids"][:first]))
    assert len(said) > 3


@pytest.mark.parametrize("task", VARIANTS, ids=lambda task: task.name)
def test_labels_repeat_the_input_unless_the_definition_hides_answers(task):
    row = task.row(5)
    assert len(row["input_ids"]) == len(row["labels"]) == task.length
    if not isinstance(task, (Mqar, SelectiveCopy)):
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"]))


@pytest.mark.parametrize("task", VARIANTS, ids=lambda task: task.name)
def test_seeds_reproduce(task):
    rows = list(task.dataset(4))
    assert rows == list(task.dataset(4))
    assert [task.row(2), task.row(3)] == rows[2:]
    assert rows[2:] == list(task.dataset(2, first=2))
    assert rows != list(dataclasses.replace(task, seed=task.seed + 1).dataset(4))
    assert len({tuple(row["input_ids"]) for row in rows}) == 4


def test_shards_hold_every_row_once():
    task = Lookup(length=64, num_pairs=4, num_queries=2)
    whole = task.dataset(10, num_shards=3)
    assert whole.num_shards == 3
    parts = [list(whole.shard(3, index)) for index in range(3)]
    assert sorted(map(str, sum(parts, []))) == sorted(str(task.row(index)) for index in range(10))


@pytest.mark.parametrize("module", ["symbols", "stories", "text"])
def test_docstrings_show_what_is_made(module):
    result = doctest.testmod(importlib.import_module(f"modeling_bwr_dnc.tasks.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_every_task_shows_an_example():
    for task in TASKS.values():
        assert ">>> " in task.__doc__


def test_text_tasks_in_the_tokens_of_a_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path())
    for kind in (TextNeedle, Passkey, VariableTracking):
        task = kind(tokenizer=tokenizer, length=400)
        for row in task.dataset(5):
            assert all(label == said for label, said in answered(task, row).values())


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_needle(depth):
    passkey = Passkey(length=4000, depth=depth)
    text = passkey.render(passkey.row(0)["input_ids"])
    begin, end = text.index(" The grass"), text.index(" What is the pass key")
    place = (text.index(" The pass key is") - begin) / (end - begin)
    assert abs(place - depth) < 0.03
    needle = Needle(length=1000, depth=depth)
    assert abs(needle.row(0)["input_ids"].index(COPY) / 1000 - depth) < 0.02


def test_mqar_follows_the_public_definition():
    """Keys below V/2, values above; pairs first; each key asked for once, at an even distance, and never answered."""
    task = Mqar(length=128, num_pairs=8, vocab_size=8192)
    for row in task.dataset(20):
        ids, labels = row["input_ids"], row["labels"]
        keys, values = ids[0:16:2], ids[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert all(1 <= key < 4096 for key in keys) and all(4096 <= value < 8192 for value in values)
        asked = [position - 1 for position, label in enumerate(labels) if label != IGNORED]
        assert sorted(ids[position] for position in asked) == sorted(keys)
        assert all(position >= 16 and position % 2 == 0 for position in asked)
        pairs = dict(zip(keys, values))
        assert all(labels[position + 1] == pairs[ids[position]] for position in asked)


def test_mqar_gaps_follow_a_power_law():
    """Half of the questions come in the first few places: the median gap is far below that of even gaps."""
    task = Mqar(length=256, num_pairs=1)
    gaps = []
    for row in task.dataset(300):
        position = next(i for i, label in enumerate(row["labels"]) if label != IGNORED) - 1
        gaps.append((position - 2) // 2)
    assert sorted(gaps)[150] < 30 < max(gaps)


def test_selective_copy_never_shows_its_answers():
    task = SelectiveCopy(length=64, num_symbols=5)
    row = task.row(0)
    end = row["input_ids"].index(COPY)
    assert set(row["input_ids"][end:]) <= {COPY, BLANK}
    assert [label for label in row["labels"] if label != IGNORED] == [t for t in row["input_ids"][:end] if t != BLANK]


def test_story_of_known_sentences():
    """Answers worked out by hand."""
    told = "mary went kitchen . mary took milk . mary went garden . john went office . mary dropped milk . mary went park ."
    questions = {
        (1, "where mary ?"): "park",
        (2, "where milk ?"): "garden",
        (3, "where milk before garden ?"): "kitchen",
    }
    for (hops, question), answer in questions.items():
        prefix = [IDS[word] for word in f"{told} {question}".split()]
        assert Story(hops=hops, length=512).oracle(prefix) == IDS[answer]


def told(task, row):
    """The words of every sentence of a row, without its ".", and of every question, without its answer."""
    words = [word for word in task.render(row["input_ids"]).split() if word in IDS]
    begin = words.index("where")
    asked = " ".join(words[begin:]).split("where ")[1:]
    return [tuple(words[i : i + 3]) for i in range(0, begin, 4)], [question.split()[:-1] for question in asked]


def test_stories_begin_as_asked_and_ask_for_as_much():
    task = Story(hops=3, length=80, num_facts=12, num_arrivals=4, num_takings=3, num_queries=2, num_easier=3)
    orders = set()
    for row in task.dataset(20):
        sentences, asked = told(task, row)
        arrivals, takings = sentences[:4], sentences[4:7]
        assert len(sentences) == 12
        assert {verb for _, verb, _ in arrivals} == {"went"} and len({actor for actor, _, _ in arrivals}) == 4
        assert {verb for _, verb, _ in takings} == {"took"} and len({thing for _, _, thing in takings}) == 3
        assert {actor for actor, _, _ in takings} <= {actor for actor, _, _ in arrivals}
        assert sorted(map(len, asked)) == [2, 2, 2, 4, 4] and len(set(map(tuple, asked))) == 5
        orders.add(tuple(map(len, asked)))
    assert len(orders) > 3


@pytest.mark.parametrize(("hops", "num_facts"), [(2, 6), (2, 10), (3, 8), (3, 12)])
def test_stories_with_as_many_questions_as_are_allowed_are_found(hops, num_facts):
    for arrivals in range(num_facts - hops + 2):
        for takings in range(num_facts - arrivals - hops + 3 if arrivals else 1):
            if arrivals > 8 or takings > 8 or (hops == 3 and arrivals + takings > num_facts - 1):
                continue
            story = Story(hops=hops, num_facts=num_facts, num_arrivals=arrivals, num_takings=takings)
            most = {"num_queries": story.most_questions(hops), "num_easier": story.most_questions(hops - 1)}
            for name, count in most.items():
                dataclasses.replace(story, **{name: count}).row(0)


def test_a_story_that_can_hardly_be_is_given_up():
    task = Story(hops=2, num_facts=12, num_arrivals=1, num_takings=8, num_queries=8, num_easier=4, seed=1)
    with pytest.raises(ValueError, match="lower num_queries or num_easier"):
        for index in range(1000):
            task.row(index)


def test_rows_without_noise_hold_sentences_and_questions_alone():
    task = Story(hops=2, length=512, num_facts=10, num_queries=4, num_easier=1)
    dense = task.without_noise()
    assert dense.length == 60 and dataclasses.replace(dense, length=512) == task
    assert set(dense.row(0)["input_ids"]) <= set(IDS.values())


@pytest.mark.parametrize("hops", [2, 3])
def test_lessons_say_what_answers_rest_on(hops):
    """A second account of the story, kept as bAbI would: sentence by sentence, all places of everything."""
    task = Story(hops=hops, length=140, num_facts=16, num_queries=2, num_easier=2)
    for index in range(30):
        row = task.row(index)
        lessons = task.lessons(row["input_ids"], np.random.default_rng(index))
        labels = [task.render([label]) if label != IGNORED else None for label in lessons]
        place, holder, last_handler, history = {}, {}, {}, {}
        assert not any(lesson and answer != IGNORED for lesson, answer in zip(labels, row["labels"]))
        expected = 0
        words = task.render(row["input_ids"]).split()
        for position, word in enumerate(words):
            if word == ".":
                actor, verb, what = words[position - 3 : position]
                left = place.get(actor)
                if verb == "went":
                    place[actor] = what
                else:
                    last_handler[what] = actor
                    holder[what] = actor if verb == "took" else None
                held = [thing for thing, who in holder.items() if who == actor]
                for thing in held:
                    history.setdefault(thing, []).append((place[actor], actor))
                assert labels[position] in (held or ["."])
                behind = (left if hops == 3 else None) if verb == "went" else place[actor]
                expected += 1 + (behind is not None)
                assert behind is None or labels[position + 1] == behind
            if word == "?" and words[position - 2] == "before":
                thing, there = words[position - 3], words[position - 1]
                stays = history[thing]
                arrived = max(
                    i for i, (at, _) in enumerate(stays) if at == there and (i == 0 or stays[i - 1][0] != there)
                )
                assert labels[position] == stays[arrived][1]
                expected += 1
            elif word == "?" and words[position - 1] in last_handler:
                assert labels[position] == last_handler[words[position - 1]]
                expected += 1
        assert sum(label is not None for label in labels) == expected


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Copy(length=8, num_symbols=4), "num_symbols"),
        (lambda: Lookup(length=32), "num_pairs"),
        (lambda: Lookup(num_queries=17), "num_queries"),
        (lambda: Lookup(vocab_size=12), "vocab_size"),
        (lambda: Recall(hops=4), "hops"),
        (lambda: Mqar(length=8192), "vocab_size"),
        (lambda: Mqar(length=64, num_pairs=17), "num_pairs"),
        (lambda: Needle(depth=1.5), "depth"),
        (lambda: Story(length=40, num_facts=20), "num_facts"),
        (lambda: Story(length=512, num_facts=8, num_queries=5), "num_queries"),
        (lambda: Story(num_easier=1), "num_easier"),
        (lambda: Story(hops=2, num_facts=4, num_easier=3), "num_easier"),
        (lambda: Story(hops=2, num_facts=4, num_arrivals=4), "num_arrivals"),
        (lambda: Story(num_facts=9, num_arrivals=9), "num_arrivals"),
        (lambda: Story(num_facts=4, num_arrivals=2, num_takings=1), "num_takings"),
        (lambda: Story(hops=2, num_takings=1), "num_takings"),
        (lambda: Story(hops=3, num_facts=4, num_arrivals=2, num_takings=2), "num_takings"),
        (lambda: TextNeedle(kind="colour"), "kind"),
        (lambda: TextNeedle(text=" "), "text"),
        (lambda: Passkey(length=64).row(0), "length"),
    ],
)
def test_what_cannot_be_is_refused(make, named):
    with pytest.raises(ValueError, match=f"`{named}` is .* must"):
        make()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Copy, {}),
        (SelectiveCopy, {}),
        (Infill, {}),
        (Infill, {"passage_length": 2}),
        (Lookup, {}),
        (Lookup, {"num_pairs": 1, "num_queries": 1}),
        *((Recall, {"hops": hops, "symbols_per_kind": symbols}) for hops in (1, 2, 3) for symbols in (None, 2)),
        (Recall, {"hops": 3, "vocab_size": 14}),
        (Mqar, {}),
        (Needle, {}),
        *((Story, {"hops": hops}) for hops in (1, 2, 3)),
    ],
)
def test_a_row_too_short_for_anything_is_said_to_be_so(kind, settings):
    """A rule never asks for a number from a range that is empty, and the length it asks for is long enough."""
    enough = -10
    for length in range(-10, 60):
        try:
            kind(length=length, **settings)
        except ValueError as error:
            message = str(error)
            least, most = re.search(r"from (\d+) to (-?\d+)", message + " from 1 to 1").groups()
            assert int(least) <= int(most), message
            if asked := re.match(r"`length` is .* must be at least (\d+),", message):
                assert length < int(asked[1])
                enough = int(asked[1])
            else:
                assert length >= enough, message


def test_settings_that_a_person_wrote_are_compared_with_their_types():
    assert Needle.from_settings({"depth": 1, "symbols_per_kind": None}) == Needle(depth=1)
    for settings, named in (
        ({"num_pairs": "abc"}, "`num_pairs` of the task 'lookup' is 'abc', but must be a whole number"),
        ({"num_pairs": 8.0}, "`num_pairs` of the task 'lookup' is 8.0, but must be a whole number"),
        ({"num_pairs": None}, "`num_pairs` of the task 'lookup' is None, but must be a whole number"),
        ({"symbols_per_kind": [4]}, "is .4., but must be a whole number or null"),
        ({"pairs": 8}, "the task 'lookup' has no setting 'pairs'; it has length, num_pairs, "),
    ):
        with pytest.raises(ValueError, match=named):
            Lookup.from_settings(settings)
    with pytest.raises(ValueError, match="has no setting 'tokenizer'"):
        Passkey.from_settings({"tokenizer": "gpt2"})
