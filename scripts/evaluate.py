"""Measure a model's memory beside the controls, all on the same weights: full attention, sinks and window, a window of as many
slots, and random eviction. Writes results.json, results.md and a picture per measurement.

Examples:
  python -m scripts.evaluate --model DIR --output results --measures loss passkey --lengths 1024 2048 4096
  python -m scripts.evaluate --model DIR --output results --measures loss --text book.txt --lengths 16384
  python -m scripts.evaluate --model DIR --output results --measures needle --kind name --score attention
  python -m scripts.evaluate --model DIR --output results --measures facts --text book.txt --lengths 2048 16384 --rows 4
  python -m scripts.evaluate --model DIR --output results --measures sessions --text book.txt --lengths 4096 --policies memory
  python -m scripts.evaluate --model DIR --output results --measures budgets --text book.txt --lengths 8192 --budgets 256 768
  python -m scripts.evaluate --model DIR --output results --measures accuracy pairs --task lookup --pairs 8 16 32
"""

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.configuration_bwr_dnc import RETENTION_SCORES
from modeling_bwr_dnc.evaluation.measuring import (
    measure_depths,
    measure_lengths,
    measure_loss,
    measure_pairs_and_slots,
)
from modeling_bwr_dnc.evaluation.policies import CONTROLS, PINNED, POLICIES
from modeling_bwr_dnc.evaluation.recall import measure_budgets, measure_recall
from modeling_bwr_dnc.evaluation.report import named, write_report
from modeling_bwr_dnc.evaluation.sessions import measure_sessions
from modeling_bwr_dnc.tasks import TASKS, Passkey, Task, TextNeedle
from modeling_bwr_dnc.texts import python_manual, read_text_file
from scripts.command_line import (
    add_budget,
    add_device,
    check_least,
    check_no_results,
    check_output,
    key_and_value,
    load_bare_model,
    load_model,
    run,
    use_budget,
)

TEXT_MEASURES = ("loss", "passkey", "needle", "facts", "sessions", "budgets")
# Written beside a model that was trained on a task.
TASK_FILE = "task.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--output", required=True, help="folder to write the results into")
    parser.add_argument(
        "--measures", nargs="+", choices=MEASURING, default=["loss", "passkey"], help="what to measure (loss passkey)"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 2048, 4096], help="in tokens (1024 2048 4096)"
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="0 is far, 1 is near (0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--rows", type=int, default=8, help="examples per point (8)")
    parser.add_argument("--seed", type=int, default=10_000, help="of the examples (10000)")
    parser.add_argument("--text", help="UTF-8 file; by default the Python language reference")
    parser.add_argument("--kind", help="of needle: code, word, name, date; by default all")
    parser.add_argument("--task", choices=sorted(TASKS), help="by default what the model was trained on")
    parser.add_argument(
        "--option", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the task, such as hops=2"
    )
    parser.add_argument(
        "--pairs", nargs="+", type=int, default=[8, 16, 32, 64], help="pairs in a row, for `pairs` (8 to 64)"
    )
    parser.add_argument(
        "--slots", nargs="+", type=int, default=[8, 16, 32, 64], help="raw slots, for `pairs` (8 to 64)"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        default=[192, 384, 768, 1536],
        help="slots, shared out among the levels as the model's, for `budgets`: facts and loss against bytes (192 to 1536)",
    )
    add_budget(parser)
    parser.add_argument(
        "--score", nargs="+", choices=RETENTION_SCORES, default=[], help="further eviction scores to compare"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=POLICIES,
        metavar="POLICY",
        help=f"of {', '.join(POLICIES)}; by default the memory and the controls: {', '.join(CONTROLS)}",
    )
    parser.add_argument(
        "--full-limit",
        type=int,
        default=8192,
        help="the longest text that full attention is measured on (8192; its cost grows); `budgets` and `pairs` have no limit",
    )
    add_device(parser)
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    check_least(arguments, lengths=2, rows=1, pairs=1, slots=0, budgets=1, full_limit=0)
    check_output(arguments.output)
    check_no_results(arguments.output)
    if set(arguments.measures) & set(TEXT_MEASURES) or asks_in_words(arguments):
        model, tokenizer = load_model(arguments.model, arguments.device)
    else:
        model, tokenizer = load_bare_model(arguments.model, arguments.device), None
    use_budget(model, arguments)
    if PINNED in (arguments.policies or ()) and not set(arguments.measures) <= {"facts", "sessions"}:
        raise ValueError(
            f"--policies has {PINNED}, which needs to know where answers stand; measure only facts or sessions with it"
        )
    policies = [*(arguments.policies or CONTROLS), *(f"score:{score}" for score in arguments.score)]
    shares = "" if model.config.slot_shares is None else f", by layer times {model.config.slot_shares}"
    facts = {
        "command": f"`python -m scripts.evaluate {shlex.join(sys.argv[1:])}`",
        "policies": "; ".join(f"{name} = {POLICIES[name]}" for name in policies),
        "memory": f"segment {model.config.segment_length}, sinks {model.config.num_sink_tokens}, slots "
        f"{'/'.join(map(str, model.config.memory_slots))}{shares}, positions by {model.config.memory_position}",
        "rows per point": arguments.rows,
        "seed": arguments.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device.type}, {model.dtype}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    measurements: dict[str, list[dict]] = {}
    begin = time.monotonic()
    try:
        for measure in arguments.measures:
            print(f"measuring {measure} ...", flush=True)
            num_found = 0
            for name, record in MEASURING[measure](arguments, model, tokenizer, policies):
                measurements.setdefault(name, []).append(record)
                num_found += 1
                print(f"  {described(record)}", flush=True)
            if not num_found:
                print(f"  nothing: all of --lengths are beyond --full-limit {arguments.full_limit}")
    finally:
        # An interrupted run leaves what it has measured.
        if measurements:
            facts["seconds"] = round(time.monotonic() - begin)
            results = {
                "title": f"Memory of {Path(arguments.model).name}",
                "facts": facts,
                "measurements": measurements,
            }
            for path in write_report(results, arguments.output):
                print(f"wrote {path}")


def described(record: dict) -> str:
    """A record as a line to follow a run by."""
    values = {name: f"{value:,.3f}" if isinstance(value, float) else named(value) for name, value in record.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _token_ids(arguments: argparse.Namespace, tokenizer) -> list[int]:
    text = python_manual() if arguments.text is None else read_text_file(arguments.text)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


# Each gives the name of a measurement and a record of it, one after the other, as soon as it is known.
Found = Iterator[tuple[str, dict]]


def _loss(arguments, model, tokenizer, policies) -> Found:
    token_ids, longest = _token_ids(arguments, tokenizer), max(arguments.lengths)
    if len(token_ids) < longest:
        raise ValueError(
            f"the text has {len(token_ids)} tokens, but --lengths asks for {longest}; give a longer --text"
        )
    edges, edge = [0], 256
    while edge < longest:
        edges.append(edge)
        edge *= 2
    input_ids = torch.tensor([token_ids[:longest]])
    for record in measure_loss(model, input_ids, policies, edges, arguments.full_limit):
        yield "loss_by_position", record


def _passkey(arguments, model, tokenizer, policies) -> Found:
    return _depths("passkey", Passkey(tokenizer=tokenizer, seed=arguments.seed), arguments, model, policies)


def _needle(arguments, model, tokenizer, policies) -> Found:
    text = None if arguments.text is None else read_text_file(arguments.text)
    task = TextNeedle(tokenizer=tokenizer, seed=arguments.seed, kind=arguments.kind, text=text)
    return _depths(f"needle_{arguments.kind or 'any'}", task, arguments, model, policies)


def _depths(name: str, task: Task, arguments, model, policies) -> Found:
    for record in measure_depths(
        model, task, policies, arguments.lengths, arguments.depths, arguments.rows, arguments.full_limit
    ):
        yield name, record


def _texts(arguments, tokenizer) -> dict:
    """What facts are asked for in."""
    options = {"lengths": arguments.lengths, "num_texts": arguments.rows, "full_limit": arguments.full_limit}
    return options | {"token_ids": _token_ids(arguments, tokenizer), "seed": arguments.seed}


def _facts(arguments, model, tokenizer, policies) -> Found:
    for record in measure_recall(model, tokenizer, policies=policies, **_texts(arguments, tokenizer)):
        yield "facts_by_kind" if "kind" in record else "facts", record


def _sessions(arguments, model, tokenizer, policies) -> Found:
    same = answers = 0
    for record in measure_sessions(
        model, tokenizer, policies=policies, model_name=arguments.model, **_texts(arguments, tokenizer)
    ):
        same, answers = same + round(record["same"] * record["answers"]), answers + record["answers"]
        yield "sessions", record
    print(f"  {same} of {answers} answers are those without the break, bit for bit")


def _budgets(arguments, model, tokenizer, policies) -> Found:
    token_ids, length = _token_ids(arguments, tokenizer), max(arguments.lengths)
    for record in measure_budgets(
        model, tokenizer, token_ids, policies, arguments.budgets, length, arguments.rows, arguments.seed
    ):
        yield f"budgets_at_{length}", record


def _accuracy(arguments, model, tokenizer, policies) -> Found:
    task = chosen_task(arguments, model, tokenizer)
    for record in measure_lengths(model, task, policies, arguments.lengths, arguments.rows, arguments.full_limit):
        yield f"{task.name}_by_length", record


def _pairs(arguments, model, tokenizer, policies) -> Found:
    task = dataclasses.replace(chosen_task(arguments, model, tokenizer), length=max(arguments.lengths))
    if not hasattr(task, "num_pairs"):
        raise ValueError(f"the task {task.name!r} has no pairs; use lookup or mqar")
    for record in measure_pairs_and_slots(model, task, policies, arguments.pairs, arguments.slots, arguments.rows):
        yield f"{task.name}_pairs_by_slots", record


MEASURING = {
    "loss": _loss,
    "passkey": _passkey,
    "needle": _needle,
    "facts": _facts,
    "sessions": _sessions,
    "budgets": _budgets,
    "accuracy": _accuracy,
    "pairs": _pairs,
}


def trained_on(arguments: argparse.Namespace) -> dict:
    """What the model's folder says that it was trained on; nothing if it does not say."""
    path = Path(arguments.model) / TASK_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def asks_in_words(arguments: argparse.Namespace) -> bool:
    """Whether the task asked for is made of words, and was not learned as bytes by a model without a tokenizer."""
    name = arguments.task if {"accuracy", "pairs"} & set(arguments.measures) else None
    return (
        name is not None
        and "tokenizer" in TASKS[name].__dataclass_fields__
        and name != trained_on(arguments).get("task")
    )


def chosen_task(arguments: argparse.Namespace, model: BwrDncForCausalLM, tokenizer) -> Task:
    """The task asked for, or the one that the model's folder names."""
    described = trained_on(arguments)
    name = arguments.task or described.get("task")
    if name is None:
        raise ValueError(f"{arguments.model} does not say what it was trained on ({TASK_FILE}); choose a --task")
    known = dict(described["options"]) if name == described.get("task") else {}
    if "vocab_size" in TASKS[name].__dataclass_fields__:
        known.setdefault("vocab_size", model.config.vocab_size)
    known |= {"length": max(arguments.lengths), "seed": arguments.seed}
    words = {"tokenizer": tokenizer} if asks_in_words(arguments) else {}
    return task_from(name, arguments.option, known, **words)


def task_from(name: str, options: list[str], known: dict, **others) -> Task:
    """A task by its name, from options KEY=VALUE and `known` ones. Raises `ValueError` for those that do not fit it."""
    return TASKS[name].from_settings(known | dict(map(key_and_value, options)), **others)


if __name__ == "__main__":
    run(build_parser(), evaluate)
