"""The curriculum mixes tasks as stated, goes up and down by measured success, and gives solvable rows at every step."""

from collections import Counter

import numpy as np
import pytest

from modeling_bwr_dnc.tasks import IGNORED, Curriculum
from modeling_bwr_dnc.tasks.curriculum import PHASES


def climbed(curriculum: Curriculum, steps: int) -> Curriculum:
    for _ in range(steps):
        curriculum.report(1.0)
    return curriculum


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_tasks_come_in_their_shares(phase):
    curriculum = climbed(Curriculum.scaled(128), 3 * phase)
    random = np.random.default_rng(0)
    counts = Counter(curriculum.task(random).name for _ in range(1000))
    assert {name: pytest.approx(share, abs=0.05) for name, share in PHASES[phase].shares.items()} == {
        name: count / 1000 for name, count in counts.items()
    }


def test_success_moves_the_difficulty_up_and_failure_down():
    curriculum = Curriculum(max_length=8192)
    seen = []
    for _ in curriculum.ladder[1:]:
        phase, length, share = curriculum.ladder[curriculum.step]
        seen.append((length, share))
        assert curriculum.report(0.95)
    assert seen[:4] == [(512, 0.25), (512, 0.5), (512, 1.0), (1024, 0.25)]
    assert curriculum.ladder[-1][1] == 8192 and not curriculum.report(1.0)
    assert curriculum.report(0.1) and curriculum.step == len(curriculum.ladder) - 2
    assert not curriculum.report(0.6)


def test_lengths_are_random_and_whole_segments():
    curriculum = climbed(Curriculum.scaled(128, segment_length=16), 8)
    random = np.random.default_rng(0)
    tasks = [curriculum.task(random) for _ in range(200)]
    lengths = {task.length for task in tasks}
    assert len(lengths) > 4 and all(length % 16 == 0 and 32 <= length <= 512 for length in lengths)


@pytest.mark.parametrize("step", [0, 2, 4, 8])
def test_rows_of_every_step_are_solvable_and_use_the_allowed_symbols(step):
    curriculum = climbed(Curriculum.scaled(64, segment_length=16, vocab_size=200), step)
    random = np.random.default_rng(step)
    for _ in range(30):
        task = curriculum.task(random)
        row = task.row(0)
        for position, label in enumerate(row["labels"]):
            if label != IGNORED:
                assert task.oracle(row["input_ids"][:position]) == label
        allowed = {token for kind in task.kinds for token in task.symbols(kind)} | set(range(8))
        assert set(row["input_ids"]) <= allowed


def test_rows_follow_the_curriculum_and_come_in_groups():
    curriculum = Curriculum.scaled(64, rows_per_length=4)
    rows = curriculum.rows()
    group = [next(rows) for _ in range(4)]
    assert len({len(row["input_ids"]) for row in group}) == 1 and max(len(row["input_ids"]) for row in group) <= 64
    climbed(curriculum, 8)
    later = [len(next(rows)["input_ids"]) for _ in range(200)]
    assert max(later) == 256


def test_seeds_reproduce():
    first, second = (Curriculum.scaled(64, seed=5).rows() for _ in range(2))
    other = Curriculum.scaled(64, seed=6).rows()
    rows = [next(first) for _ in range(5)]
    assert rows == [next(second) for _ in range(5)] != [next(other) for _ in range(5)]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="promote_at"):
        Curriculum(promote_at=0.2, demote_at=0.5)
    with pytest.raises(ValueError, match="segment_length"):
        Curriculum(segment_length=512)
