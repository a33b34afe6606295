"""Train models of 0.1 to 0.25 million parameters from scratch on a long-range task: the memory, full attention, window only, a window
longer by all slots, Mamba2 and gated DeltaNet, alike, or the memory without one of its parts; then measure them far beyond the
training length. Minutes per model on one CPU core.

Examples:
  python -m scripts.train_task --output runs/recall
  python -m scripts.train_task --output runs/recall --seeds 0 1 2 --lengths 256 1024 4096 16384
  python -m scripts.train_task --output runs/hops --task recall --option hops=2 num_chains=5 --models memory full
  python -m scripts.train_task --output runs/hops3 --task recall --option hops=3 --models memory --start-from runs/hops
  python -m scripts.train_task --output runs/parts --models memory no_salience no_noise mean_compressor
"""

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_bwr_dnc.blocks import read_blocks
from modeling_bwr_dnc.evaluation.measuring import task_accuracy
from modeling_bwr_dnc.evaluation.peers import cache_nbytes, plain_cache_nbytes
from modeling_bwr_dnc.evaluation.report import write_report
from modeling_bwr_dnc.staging import complete_folder, write_text
from modeling_bwr_dnc.tasks import TASKS, Task
from modeling_bwr_dnc.training.learning import ABLATIONS, MODEL_KINDS, grown, learn, small_config
from modeling_bwr_dnc.training.stages import Stage, Stages, staged
from scripts.command_line import check_least, check_no_results, check_output, key_and_value, load_bare_model, run
from scripts.evaluate import TASK_FILE, task_from

# Rows of the measurements; training uses small seeds.
MEASURING_SEED = 10_000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.train_task", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder for the models and the results")
    parser.add_argument("--task", choices=sorted(TASKS), default="lookup", help="what is learned (lookup)")
    parser.add_argument(
        "--option", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the task, such as num_pairs=16"
    )
    parser.add_argument("--length", type=int, default=256, help="the longest training rows, in tokens (256)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=(*MODEL_KINDS, *ABLATIONS),
        default=list(MODEL_KINDS),
        metavar="KIND",
        help=f"of {', '.join(MODEL_KINDS)} (these by default); the memory with one part changed: {', '.join(ABLATIONS)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one model each (0)")
    parser.add_argument("--steps", type=int, default=700, help="of training (700)")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="of a step (2048)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="at its height, of AdamW (0.005)")
    parser.add_argument("--memory-learning-rate", type=float, default=1e-2, help="of the memory parameters (0.01)")
    parser.add_argument(
        "--warmup-steps", type=int, default=50, help="in which the learning rates rise, at most a quarter of all (50)"
    )
    parser.add_argument("--salience-cost", type=float, default=0.02, help="weight of the cost of being salient (0.02)")
    parser.add_argument(
        "--salience-margin", type=float, default=0.0, help="how far below 0 that cost pushes what no answer needs (0)"
    )
    parser.add_argument(
        "--memory-slots", nargs=3, type=int, default=[32, 16, 8], metavar="N", help="raw, 2x, 4x (32 16 8)"
    )
    parser.add_argument(
        "--setting",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the model's config, such as usage_weight=1",
    )
    parser.add_argument(
        "--start-from",
        metavar="RUN",
        help="output folder of an earlier run, from whose model of the same kind and seed each goes on; further layers add nothing yet",
    )
    parser.add_argument(
        "--no-stages", action="store_true", help="rows of full length from the start, instead of short ones first"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], help="to measure at (256 to 4096)"
    )
    parser.add_argument(
        "--pairs", nargs="*", type=int, default=[], help="also measure with so many pairs, at twice the length"
    )
    parser.add_argument("--rows", type=int, default=32, help="rows per point (32)")
    parser.add_argument(
        "--full-limit", type=int, default=8192, help="the longest rows that full attention is measured on (8192)"
    )
    return parser


def train_task(arguments: argparse.Namespace) -> None:
    check_least(arguments, steps=1, warmup_steps=0, tokens_per_batch=1, lengths=1, pairs=1, rows=1, full_limit=0)
    check_output(arguments.output)
    check_no_results(arguments.output)
    task = task_from(arguments.task, arguments.option, {"length": arguments.length})
    settings = dict(map(key_and_value, arguments.setting))
    if "memory_slots" in settings:
        raise ValueError("--setting has memory_slots, which have an option of their own; say --memory-slots 32 16 8")
    configs = [small_config(kind, task, arguments.memory_slots, **settings) for kind in arguments.models]
    unknown = [name for name in settings if not any(name in type(config)().to_dict() for config in configs)]
    if unknown:
        raise ValueError(
            f"--setting has {', '.join(unknown)}, which no model asked for has; name fields of its config"
        )
    if arguments.pairs and not hasattr(task, "num_pairs"):
        raise ValueError(f"--pairs was given, but the task {task.name!r} has no pairs; use lookup or mqar")
    by_lengths = {length: _unseen(task, length=length) for length in arguments.lengths}
    with_pairs = {pairs: _unseen(task, length=2 * task.length, num_pairs=pairs) for pairs in arguments.pairs}
    for unseen in (*by_lengths.values(), *with_pairs.values()):
        # Texts say only then that a length has no room for them.
        unseen.row(0)
    starts = {
        (kind, seed): start_of(arguments, kind, seed, config)
        for kind, config in zip(arguments.models, configs, strict=True)
        for seed in arguments.seeds
    }
    output, trainings = Path(arguments.output), []
    by_length: list[dict] = []
    by_pairs: list[dict] = []
    for kind in arguments.models:
        for seed in arguments.seeds:
            trained = dataclasses.replace(task, seed=seed)
            stages = Stages([Stage(trained, 1.0)], seed) if arguments.no_stages else staged(trained)
            config = small_config(kind, task, arguments.memory_slots, **settings)
            with tqdm(total=arguments.steps, unit="step", desc=f"{kind}, seed {seed}", delay=1) as progress:
                learned = learn(
                    config,
                    stages,
                    arguments.steps,
                    seed,
                    arguments.tokens_per_batch,
                    arguments.learning_rate,
                    arguments.memory_learning_rate,
                    retention_noise=kind != "no_noise",
                    salience_cost=arguments.salience_cost,
                    salience_margin=arguments.salience_margin,
                    measure=lambda model: task_accuracy(model, _unseen(task), 8)["exact"],
                    warmup_steps=arguments.warmup_steps,
                    start=starts[kind, seed],
                    on_step=functools.partial(_show_step, progress, stages),
                )
            model = learned.model
            training = {
                "model": kind,
                "seed": seed,
                "parameters": model.num_parameters(),
                "state_bytes": state_bytes(kind, model, _unseen(task)),
                "seconds": round(learned.seconds, 1),
                "curve": learned.curve,
            }
            trainings.append(training)
            print(
                f"{kind}, seed {seed}: {training['parameters']:,} parameters, {training['state_bytes']:,} bytes of state after "
                f"{task.length:,} tokens, {learned.seconds:.0f} s of one core",
                flush=True,
            )
            folder = output / f"{kind}-{seed}"
            described = {"task": task.name, "options": _options(trained)}
            with complete_folder(folder) as staged_folder:
                model.save_pretrained(staged_folder)
                write_text(staged_folder / TASK_FILE, json.dumps(described, indent=1) + "\n")
            for length, unseen in by_lengths.items():
                if kind != "full" or length <= arguments.full_limit:
                    accuracy = task_accuracy(model, unseen, arguments.rows)
                    by_length.append({"policy": kind, "seed": seed, "length": length, **accuracy})
                    print(f"  {length:,} tokens: {accuracy['exact']:.3f}", flush=True)
            for pairs, unseen in with_pairs.items():
                accuracy = task_accuracy(model, unseen, arguments.rows)
                by_pairs.append({"policy": kind, "seed": seed, "length": unseen.length, "pairs": pairs, **accuracy})
                print(f"  {pairs} pairs in {unseen.length:,} tokens: {accuracy['exact']:.3f}", flush=True)
            # After every model, so that an interrupted run leaves what it has measured.
            results = _results(arguments, task, by_length, by_pairs, trainings)
            write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    for path in write_report(results, output):
        print(f"wrote {path}")


def start_of(arguments: argparse.Namespace, kind: str, seed: int, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model that one of `config` goes on from, if any. Raises `ValueError` if it is not there, or does not fit."""
    if arguments.start_from is None:
        return None
    start = load_bare_model(str(Path(arguments.start_from) / f"{kind}-{seed}"), "cpu")
    grown(config, start)
    return start


def _show_step(progress: tqdm, stages: Stages) -> None:
    shown = {"stage": f"{stages.hardest + 1} of {len(stages.stages)}"}
    if stages.accuracy is not None:
        shown["right"] = f"{stages.accuracy:.2f}"
    progress.set_postfix(shown, refresh=False)
    progress.update()


def _results(arguments, task: Task, by_length: list[dict], by_pairs: list[dict], trainings: list[dict]) -> dict:
    measurements = {"accuracy_by_length": _mean_of_seeds(by_length)}
    if by_pairs:
        measurements["accuracy_by_pairs"] = _mean_of_seeds(by_pairs)
    facts = {
        "command": f"`python -m scripts.train_task {shlex.join(sys.argv[1:])}`",
        "seeds": ", ".join(map(str, arguments.seeds)),
        "rows per point and seed": arguments.rows,
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    return {
        "title": f"{task.name}, learned from scratch on rows of at most {task.length} tokens",
        "facts": facts,
        "measurements": measurements,
        "by_seed": by_length + by_pairs,
        "trainings": trainings,
    }


def state_bytes(kind: str, model: PreTrainedModel, task: Task) -> int:
    """Bytes that a model carries on after reading a row; full attention those of its keys and values."""
    if kind == "full":
        return plain_cache_nbytes(model, task.length)
    row = torch.tensor([task.row(0)["input_ids"]])
    for _, _, cache in read_blocks(model, row):
        carried = cache_nbytes(cache)
    return carried


def _unseen(task: Task, **changes) -> Task:
    return dataclasses.replace(task, seed=MEASURING_SEED, **changes)


def _options(task: Task) -> dict:
    return {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name != "tokenizer"}


def _mean_of_seeds(records: list[dict]) -> list[dict]:
    """One record per point, with the mean over the seeds, and the least and greatest."""
    points: dict[tuple, list[dict]] = {}
    for record in records:
        key = tuple((name, record[name]) for name in ("policy", "length", "pairs") if name in record)
        points.setdefault(key, []).append(record)
    return [
        dict(key)
        | {name: sum(record[name] for record in found) / len(found) for name in ("exact", "token")}
        | {"least": min(record["exact"] for record in found), "greatest": max(record["exact"] for record in found)}
        for key, found in points.items()
    ]


if __name__ == "__main__":
    run(build_parser(), train_task)
