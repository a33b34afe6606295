"""
The stages in which a task is learned from scratch: short rows first, where everything is still in sight, and only then what to keep.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import TrainerCallback

from ..evaluation.measuring import task_accuracy
from ..tasks import Recall, Story, Task
from ..tasks.task import require
from ..token_loss import IGNORED

# Rows that tell whether a stage is learned; training uses small seeds, measurements of results others.
UNSEEN_SEED = 20_000
UNSEEN_ROWS = 64
UNSEEN_TOKENS = 16_384
# Accuracy on them, in [0, 1], that ends a stage of several hops.
LEARNED = 0.97


@dataclass(frozen=True)
class Stage:
    """
    A task, and until which share of the training it is the hardest one.

    Args:
        learned_at: accuracy on unseen rows, in [0, 1], that ends the stage early; None: it lasts.
        lesson_weight: of the mean loss of the lessons of a `Story`, beside 1 for that of its answers; 0: without them.
    """

    task: Task
    until: float
    learned_at: float | None = None
    lesson_weight: float = 0.0

    def __post_init__(self):
        lessons = self.lesson_weight == 0 or isinstance(self.task, Story)
        require(
            lessons, "lesson_weight", self.lesson_weight, f"be 0, since the task {self.task.name!r} has no lessons"
        )

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> dict[str, list]:
        """`input_ids` and `labels` [B, T] of rows; with lessons among the labels also their `label_weights` [B, T]."""
        input_ids, labels = self.task.batch(indices)
        if not isinstance(self.task, Story) or not self.lesson_weight:
            return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
        lessons = np.array([self.task.lessons(row, random) for row in input_ids.tolist()])
        are_lessons, are_answers = lessons != IGNORED, labels != IGNORED
        # The loss is divided by the number of labels of both kinds.
        count = are_lessons.sum() + are_answers.sum()
        weights = are_answers * (count / are_answers.sum())
        weights = weights + are_lessons * (self.lesson_weight * count / max(are_lessons.sum(), 1))
        labels = np.where(are_lessons, lessons, labels)
        names = ("input_ids", "labels", "label_weights")
        return dict(zip(names, (input_ids.tolist(), labels.tolist(), weights.tolist())))


@dataclass
class Stages:
    """Stages in order, of which the open ones take turns at random: the hardest, and the one before it."""

    stages: Sequence[Stage]
    seed: int = 0
    hardest: int = field(default=0, init=False)
    accuracy: float | None = field(default=None, init=False)  # the one reported last

    def __post_init__(self):
        ends = [stage.until for stage in self.stages]
        require(
            ends[-1:] == [1.0] and ends == sorted(ends), "stages", ends, "end at ascending shares, the last at 1.0"
        )

    def report(self, accuracy: float) -> None:
        """Tell the measured accuracy at the hardest open stage, which may end it."""
        self.accuracy = accuracy
        learned_at = self.stages[self.hardest].learned_at
        if learned_at is not None and accuracy >= learned_at:
            self.hardest = min(self.hardest + 1, len(self.stages) - 1)

    def batches(self, num_steps: int, tokens_per_batch: int) -> Iterator[dict]:
        """One batch per step, of about `tokens_per_batch` tokens."""
        random = np.random.default_rng(self.seed)
        self.hardest = 0
        for step in range(num_steps):
            while step >= self.stages[self.hardest].until * num_steps:
                self.hardest += 1
            stage = self.stages[int(random.integers(max(0, self.hardest - 1), self.hardest + 1))]
            first, size = step * tokens_per_batch, max(1, tokens_per_batch // stage.task.length)
            yield stage.batch(range(first, first + size), random)


class StagesCallback(TrainerCallback):
    """Ends stages that are learned: every so many optimizer steps the accuracy at the hardest open one is measured."""

    def __init__(self, stages: Stages, every: int):
        self.stages, self.every = stages, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        stage = self.stages.stages[self.stages.hardest]
        if stage.learned_at is None or state.global_step % self.every:
            return
        model.eval()
        num_rows = max(8, min(UNSEEN_ROWS, UNSEEN_TOKENS // stage.task.length))
        accuracy = task_accuracy(model, replace(stage.task, seed=UNSEEN_SEED), num_rows, num_rows)["exact"]
        model.train()
        self.stages.report(accuracy)


def staged(task: Task, shortest: int = 64) -> Stages:
    """
    A task at lengths that double up to its own, as far as its rows fit them: the first until 0.4 of the training, the last from
    0.65 on.

    Pairs, if the task has any, are as dense as in the whole, but at most an eighth of the tokens and at least what fits.

    Where an answer takes several hops, rows of the shortest length come before, of one hop until 0.2 of the training, of all until
    0.7, and the lengths share the rest alike. Chains fill rows of half that length there, with hardly any noise: finding how to take
    two hops is what lasts, and a batch of such rows has the most answers. These stages end as soon as they are learned.

    Stories of several hops have stages of their own, see `_told`; these rows have as many questions as there can be.
    """
    lengths = [task.length]
    while lengths[0] // 2 >= shortest:
        lengths.insert(0, lengths[0] // 2)
    hops = getattr(task, "hops", 1)
    if hops > 1 and isinstance(task, Story):
        return Stages(_told(task, lengths), task.seed)
    rows = [*filter(None, (_fitting(task, length) for length in lengths[:-1])), task]
    stages, shares = [], np.linspace(0.4, 0.65, len(rows) - 1).tolist()
    if hops > 1:
        dense = [_dense(replace(task, **{"hops": count}), lengths[0]) for count in range(1, hops + 1)]
        stages = [Stage(easy, end, LEARNED) for easy, end in zip(dense, np.linspace(0.2, 0.7, hops).tolist())]
        shares = np.linspace(0.7, 1.0, len(rows) + 1)[1:-1].tolist()
    stages += [Stage(row, end) for row, end in zip(rows, [*shares, 1.0], strict=True)]
    return Stages(stages, task.seed)


def _told(task: Story, lengths: Sequence[int]) -> list[Stage]:
    """
    Stories of several hops: first without noise, at last at the lengths, with as many questions as there can be. All stages but the
    last end as soon as they are learned.

    The first is of kind 1: until a model looks up by content where somebody is, it takes kind 2 for a matter of places in the row.
    Lessons come after it, and stories with an opening: several actors go somewhere and several things are taken, so that looking up
    who holds a thing pays. In stories told at random it hardly does: the last places are right so often that a model goes no further.
    """
    last = task.num_sentences
    arrivals = min(3, last // 2)
    takings = min(4, last // 2, last - arrivals - task.hops + 2)
    dense = [_opened(task, 8, 0, 0, hops=1)]
    dense += [_opened(task, count, count // 2, count // 2, hops=2) for count in (4, 8) if count < last]
    dense += [_opened(task, last, arrivals, takings, task.hops), _asking(task)]
    longer = [replace(dense[-1], length=length) for length in lengths if length > dense[-1].length] or [task]
    ends = [
        0.25,
        *np.linspace(0.4, 0.55, len(dense) - 1).tolist(),
        *np.linspace(0.55, 1.0, len(longer) + 1)[1:].tolist(),
    ]
    stages = [
        Stage(story, end, LEARNED, lesson_weight=0.5 if story.hops > 1 else 0.0)
        for story, end in zip([*dense, *longer], ends, strict=True)
    ]
    return [*stages[:-1], replace(stages[-1], learned_at=None, lesson_weight=0.05)]


def _opened(task: Story, num_facts: int, num_arrivals: int, num_takings: int, hops: int) -> Story:
    opening: dict = {"num_facts": num_facts, "num_arrivals": num_arrivals, "num_takings": num_takings, "hops": hops}
    return _asking(replace(task, length=1 << 20, num_queries=1, num_easier=0, **opening))


def _asking(story: Story) -> Story:
    """With as many questions as there can be, two of the kind below, and no noise."""
    most, easier = story.most_questions(story.hops), story.most_questions(story.hops - 1)
    return replace(story, length=1 << 20, num_queries=most, num_easier=min(2, easier)).without_noise()


def _dense(task: Task, shortest: int) -> Task:
    """Rows of half the shortest length, or what a chain needs, with as many chains as fit; of other tasks, of the shortest length."""
    if not isinstance(task, Recall):
        return _shortened(task, shortest)
    with_question = 2 * task.hops + 3
    length = max(shortest // 2, with_question)
    changes = {name: min(getattr(task, name), length // with_question) for name in ("num_chains", "num_queries")}
    return replace(task, length=length, **changes)


def _fitting(task: Task, length: int) -> Task | None:
    """A task in rows of another length; None if what it needs does not fit them."""
    try:
        shortened = _shortened(task, length)
        shortened.row(0)
    except ValueError:
        return None
    return shortened


def _shortened(task: Task, length: int) -> Task:
    if length == task.length:
        return task
    changes: dict = {"length": length}
    for name in ("num_pairs", "num_chains", "num_queries"):
        if hasattr(task, name):
            changes[name] = max(1, min(getattr(task, name), length // (8 * max(getattr(task, "hops", 1), 1))))
    return replace(task, **changes)
