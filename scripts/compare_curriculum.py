"""Whether a curriculum saves time: small models learn five long-range tasks from scratch, with it and without, and are measured
alike, on unseen rows of full length. Minutes per training on one CPU core.

  curriculum  three phases from short rows of easy tasks to all five at full length, moved by measured success
  lengths     all five tasks from the start, at random numbers of segments
  none        all five tasks at full length from the start

Examples:
  python -m scripts.compare_curriculum --output runs/curriculum
  python -m scripts.compare_curriculum --output runs/curriculum --seeds 0 1 2 3 4 --steps 2000 --targets 0.5 0.8
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import transformers

from modeling_bwr_dnc.evaluation.measuring import task_accuracy
from modeling_bwr_dnc.staging import write_text
from modeling_bwr_dnc.tasks import Curriculum
from modeling_bwr_dnc.training.learning import learn, small_config
from scripts.command_line import check_least, check_output, run

WAYS = ("curriculum", "lengths", "none")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.compare_curriculum", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder for results.json")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of training (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each (0 1 2)")
    parser.add_argument("--steps", type=int, default=1000, help="at most (1000)")
    parser.add_argument(
        "--first-length",
        type=int,
        default=64,
        help="tokens of a row in the first phase; four times that in the last (64)",
    )
    parser.add_argument("--vocab-size", type=int, default=80, help="symbols of the tasks (80)")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="of a step (2048)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="at its height (0.005)")
    parser.add_argument("--adapt-every", type=int, default=25, help="steps between two looks at the success rate (25)")
    parser.add_argument("--promote-at", type=float, default=0.9, help="success rate that makes it harder (0.9)")
    parser.add_argument("--measure-every", type=int, default=50, help="steps between two measurements (50)")
    parser.add_argument("--rows", type=int, default=16, help="rows per task and measurement (16)")
    parser.add_argument(
        "--targets",
        nargs="+",
        type=float,
        default=[0.25, 0.5, 0.75],
        help="mean accuracies to reach; the greatest ends a training",
    )
    return parser


def compare_curriculum(arguments: argparse.Namespace) -> None:
    check_least(arguments, steps=1, rows=1, measure_every=1, adapt_every=1, tokens_per_batch=1, targets=0)
    results = Path(arguments.output) / "results.json"
    if results.exists():
        raise ValueError(f"{results} exists already; choose another folder, or remove it")
    check_output(arguments.output)
    trainings = []
    for seed in arguments.seeds:
        for way in arguments.ways:
            curriculum = Curriculum.scaled(
                arguments.first_length,
                vocab_size=arguments.vocab_size,
                promote_at=arguments.promote_at,
                seed=seed,
                random_lengths=way != "none",
            )
            tasks = curriculum.tasks(len(curriculum.ladder) - 1)
            if way != "curriculum":
                curriculum.go_to_the_top()
            learned = learn(
                small_config("memory", tasks["lookup"]),
                curriculum,
                arguments.steps,
                seed,
                arguments.tokens_per_batch,
                arguments.learning_rate,
                measure=partial(mean_accuracy, tasks=tasks, num_rows=arguments.rows),
                measure_every=arguments.measure_every,
                stop_at=max(arguments.targets),
                adapt_every=arguments.adapt_every if way == "curriculum" else None,
            )
            of_tasks = accuracies(learned.model, tasks, 2 * arguments.rows)
            trainings.append(
                {"way": way, "seed": seed, "curve": learned.curve, "tasks": of_tasks, "step": curriculum.step}
            )
            reached = {target: seconds_to(target, learned.curve) for target in arguments.targets}
            print(f"seed {seed}, {way}: {learned.seconds:.0f} s, reached {reached}, ended with {of_tasks}", flush=True)
            # After every training, so that an interrupted run leaves what it has measured.
            _write(arguments, trainings)
    _print_table(trainings, arguments.targets)


def accuracies(model, tasks: dict, num_rows: int) -> dict[str, float]:
    """Share of the right tokens of the answers, by task, on unseen rows."""
    return {
        name: round(task_accuracy(model, replace(task, seed=20_000), num_rows)["token"], 3)
        for name, task in tasks.items()
    }


def mean_accuracy(model, tasks: dict, num_rows: int) -> float:
    return mean(accuracies(model, tasks, num_rows).values())


def seconds_to(target: float, curve: list[dict]) -> float | None:
    """Seconds of training until the accuracy was `target`; None if it never was."""
    return next((point["seconds"] for point in curve if point["accuracy"] >= target), None)


def _print_table(trainings: list[dict], targets: list[float]) -> None:
    print("\n| target | way | seconds by seed |\n|---:|---|---|")
    for target in targets:
        for way in dict.fromkeys(training["way"] for training in trainings):
            found = [seconds_to(target, training["curve"]) for training in trainings if training["way"] == way]
            cells = ["not reached" if seconds is None else f"{seconds:.0f}" for seconds in found]
            print(f"| {target} | {way} | {', '.join(cells)} |")


def _write(arguments: argparse.Namespace, trainings: list[dict]) -> None:
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": f"python -m scripts.compare_curriculum {shlex.join(sys.argv[1:])}",
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    results = {"facts": facts, "trainings": trainings}
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(build_parser(), compare_curriculum)
