"""A curriculum that follows what a model in training can do."""

from transformers import Trainer, TrainerCallback

from ..evaluation.measuring import task_accuracy
from ..tasks import Curriculum
from ..tasks.task import require


class CurriculumCallback(TrainerCallback):
    """
    Moves a curriculum up and down in a training: now and then it measures the success rate at the present step.

    It logs `curriculum/step`, `curriculum/length` and `curriculum/success`, and finds its step again in the log of a checkpoint.

    Args:
        every: optimizer steps between two measurements.
        num_rows: rows measured, shared among the step's tasks in proportion.
    """

    def __init__(self, curriculum: Curriculum, every: int = 50, num_rows: int = 16):
        require(every >= 1, "every", every, "be at least 1")
        require(num_rows >= 1, "num_rows", num_rows, "be at least 1")
        self.curriculum, self.every, self.num_rows = curriculum, every, num_rows
        self.trainer: Trainer | None = None

    def follow(self, trainer: Trainer) -> None:
        """Take part in the training of `trainer`, and log there. Raises `ValueError` if other processes load its rows."""
        require(
            not trainer.args.dataloader_num_workers,
            "dataloader_num_workers",
            trainer.args.dataloader_num_workers,
            "be 0 with a curriculum, of which a worker has a copy that does not move",
        )
        self.trainer = trainer
        trainer.add_callback(self)

    def success_rate(self, model) -> float:
        """Share of the answers that are right, in [0, 1], each task counting by its share of the phase."""
        phase, _, _ = self.curriculum.ladder[self.curriculum.step]
        return sum(
            share * task_accuracy(model, task, max(1, round(share * self.num_rows)))["exact"]
            for (name, task), share in zip(self.curriculum.tasks().items(), phase.shares.values(), strict=True)
        )

    def on_train_begin(self, args, state, control, **kwargs):
        steps = [entry["curriculum/step"] for entry in state.log_history if "curriculum/step" in entry]
        if steps:
            self.curriculum.step = steps[-1]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        model.eval()
        success = self.success_rate(model)
        model.train()
        self.curriculum.report(success)
        step = self.curriculum.step
        if self.trainer is not None:
            self.trainer.log(
                {
                    "curriculum/success": success,
                    "curriculum/step": step,
                    "curriculum/length": self.curriculum.ladder[step][1],
                }
            )
