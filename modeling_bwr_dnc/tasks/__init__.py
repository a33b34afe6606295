"""Long-range tasks made on the fly from a seed, each with an oracle that solves it by reading."""

from ..token_loss import IGNORED
from .curriculum import PHASES, Curriculum, Phase
from .stories import Story
from .symbols import Copy, Infill, Lookup, Mqar, Needle, Recall, SelectiveCopy
from .task import Task
from .text import Passkey, TextNeedle, VariableTracking

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
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
}

__all__ = [
    "IGNORED",
    "PHASES",
    "TASKS",
    "Curriculum",
    "Phase",
    "Task",
    *sorted(task.__name__ for task in TASKS.values()),
]
