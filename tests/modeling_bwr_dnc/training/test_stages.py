"""From short rows to long ones, from easy questions to hard."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_bwr_dnc.tasks import Copy, Lookup, Mqar, Passkey, Recall, SelectiveCopy, Story, VariableTracking
from modeling_bwr_dnc.token_loss import IGNORED
from modeling_bwr_dnc.training.stages import Stage, Stages, staged


def test_stages_double_up_to_the_task():
    task = Lookup(length=256)
    stages = staged(task).stages
    assert [(stage.task.length, stage.task.num_pairs) for stage in stages] == [(64, 8), (128, 16), (256, 16)]
    assert [stage.until for stage in stages] == [pytest.approx(0.4), pytest.approx(0.65), 1.0]
    assert stages[-1].task == task
    assert staged(Copy(length=40)).stages == [Stage(Copy(length=40), 1.0)]
    dense = Lookup(length=256, num_pairs=24)
    assert [stage.task.num_pairs for stage in staged(dense).stages] == [8, 16, 24]


def test_fewer_hops_come_first_in_dense_rows():
    stages = staged(Recall(length=128, hops=3)).stages
    assert [(stage.task.length, stage.task.hops) for stage in stages] == [(32, 1), (32, 2), (32, 3), (64, 3), (128, 3)]
    assert [stage.until for stage in stages] == [pytest.approx(end) for end in (0.2, 0.45, 0.7, 0.85, 1.0)]
    assert [stage.task.num_chains for stage in stages] == [6, 4, 3, 2, 8]
    assert [stage.task.num_queries for stage in stages] == [4, 4, 3, 2, 4]
    short = staged(Recall(length=9, hops=3, num_chains=1, num_queries=1)).stages
    assert [(stage.task.length, stage.task.num_chains) for stage in short] == [(5, 1), (7, 1), (9, 1), (9, 1)]
    for hops in (0, 1, 9):
        ends = [stage.until for stage in staged(VariableTracking(length=2048, hops=hops), 1024).stages]
        assert ends == sorted(ends) and ends[-1] == 1.0 and len(set(ends)) == len(ends)


def test_batches_go_from_short_to_long_in_equal_tokens():
    steps = list(staged(Lookup(length=256)).batches(100, 1024))
    shapes = [(len(step["input_ids"]), len(step["input_ids"][0])) for step in steps]
    assert {rows * length for rows, length in shapes} == {1024}
    assert {length for _, length in shapes[:40]} == {64}
    assert {length for _, length in shapes[66:]} == {128, 256}
    assert steps == list(staged(Lookup(length=256)).batches(100, 1024))
    assert steps != list(staged(Lookup(length=256, seed=1)).batches(100, 1024))


def test_a_stage_ends_when_it_is_learned_but_the_last_one_does_not():
    tasks = [Copy(length=length) for length in (16, 32, 64)]
    stages = Stages([Stage(tasks[0], 0.5, learned_at=0.9), Stage(tasks[1], 0.9), Stage(tasks[2], 1.0, learned_at=0.5)])
    lengths = []
    for step, batch in enumerate(stages.batches(100, 64)):
        lengths.append(len(batch["input_ids"][0]))
        stages.report(0.95 if step in (9, 20, 95) else 0.8)
    assert set(lengths[:10]) == {16} and set(lengths[10:90]) == {16, 32} and set(lengths[90:]) == {32, 64}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stages([]),
        lambda: Stages([Stage(Copy(), 0.5)]),
        lambda: Stages([Stage(Copy(), 0.9), Stage(Copy(), 0.5), Stage(Copy(), 1.0)]),
        lambda: Stage(Copy(), 1.0, lesson_weight=0.5),
    ],
)
def test_stages_that_cannot_be_are_refused(make):
    with pytest.raises(ValueError, match="`stages` is|`lesson_weight` is"):
        make()


def test_stories_of_several_hops_begin_with_openings_and_lessons():
    task = Story(length=512, hops=2, num_facts=10, num_queries=2, seed=7)
    stages = staged(task).stages
    told = [stage.task for stage in stages]
    assert [story.length for story in told] == [48, 32, 56, 64, 64, 128, 256, 512]
    assert [story.hops for story in told] == [1] + 7 * [2]
    assert [story.num_facts for story in told] == [8, 4, 8] + 5 * [10]
    openings = [(story.num_arrivals, story.num_takings) for story in told]
    assert openings == [(0, 0), (2, 2), (4, 4), (3, 4)] + 4 * [(0, 0)]
    assert [(story.num_queries, story.num_easier) for story in told] == [(4, 0), (2, 2)] + 6 * [(4, 2)]
    assert {story.seed for story in told} == {7}
    assert [stage.learned_at for stage in stages] == 7 * [0.97] + [None]
    assert [stage.lesson_weight for stage in stages] == [0.0] + 6 * [0.5] + [0.05]


@pytest.mark.parametrize("hops", [2, 3])
def test_stories_of_any_size_have_stages(hops):
    for num_facts in range(hops, 14):
        for length in (4 * num_facts + 6, 70, 300):
            stages = staged(Story(length=length, hops=hops, num_facts=num_facts)).stages
            ends = [stage.until for stage in stages]
            assert ends == sorted(set(ends)) and ends[-1] == 1.0
            assert [stage.task.hops for stage in stages] == sorted(stage.task.hops for stage in stages)
            last = stages[-1].task
            assert (last.length, last.num_facts, last.hops) == (length, num_facts, hops)
            for stage in stages:
                stage.batch(range(3), np.random.default_rng(0))


def test_answers_and_lessons_have_means_of_their_own():
    task = Story(hops=2, length=64, num_facts=6, num_queries=2)
    stage = Stage(task, 1.0, lesson_weight=0.25)
    batch = {name: torch.tensor(value) for name, value in stage.batch(range(5), np.random.default_rng(1)).items()}
    plain = torch.from_numpy(task.batch(range(5))[1])
    lessons = torch.tensor(
        [task.lessons(row, random) for random in [np.random.default_rng(1)] for row in batch["input_ids"].tolist()]
    )
    losses = torch.randn(5, 64).exp()
    means = [losses[labels != IGNORED].mean() for labels in (plain, lessons)]
    batch["label_weights"] = batch["label_weights"].float()
    whole = (losses * batch["label_weights"])[batch["labels"] != IGNORED].mean()
    torch.testing.assert_close(whole, means[0] + 0.25 * means[1])
    assert not batch["label_weights"][batch["labels"] == IGNORED].any()
    assert "label_weights" not in replace(stage, lesson_weight=0.0).batch(range(5), np.random.default_rng(1))


@pytest.mark.parametrize(
    ("task", "lengths"),
    [
        (Copy(length=256, num_symbols=50), [128, 256]),
        (Mqar(length=260, num_pairs=8), [130, 260]),
        (SelectiveCopy(length=256, num_symbols=60), [128, 256]),
        (Passkey(length=1024), [256, 512, 1024]),
    ],
)
def test_rows_that_a_task_does_not_fit_are_left_out(task, lengths):
    stages = staged(task).stages
    assert [stage.task.length for stage in stages] == lengths
    assert all(stage.batch(range(2), np.random.default_rng(0))["input_ids"] for stage in stages)
    with pytest.raises(ValueError, match="must be"):
        staged(Passkey(length=100)).stages[-1].batch(range(1), np.random.default_rng(0))
