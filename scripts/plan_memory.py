"""Predict how much memory a training step needs, by simulation on tensors without data, and find what fits.

Examples:
  python -m scripts.plan_memory --model bwr-dnc-500m --memory-slots 256 128 64 --optimizer adamw_bnb_8bit
  python -m scripts.plan_memory --model bwr-dnc-500m --methods full lora qlora --lengths 1024 2048 8192
  python -m scripts.plan_memory --model bwr-dnc-500m --methods full --fit 8GB --optimizer adamw_bnb_8bit
  python -m scripts.plan_memory --model bwr-dnc-60m --methods full --lengths 1024 --measure     (takes real steps, too)
"""

import argparse
import re
import sys
from dataclasses import replace

from modeling_bwr_dnc.training.memory_plan import (
    OPTIMIZERS,
    PARTS,
    PRECISIONS,
    MemoryPlan,
    TrainingSetting,
    largest_length,
    measure_memory,
    plan_memory,
    ways_to_save,
)
from scripts.command_line import run

LONGEST = 1 << 16  # tokens
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.plan_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bwr-dnc-500m", help="preset or model folder (bwr-dnc-500m)")
    parser.add_argument("--segment-length", type=int, help="tokens per segment, instead of the model's")
    parser.add_argument(
        "--memory-slots", type=int, nargs=3, metavar=("RAW", "TWO", "FOUR"), help="instead of the model's"
    )
    parser.add_argument(
        "--methods", nargs="+", default=["full"], help="rows of the table: full, memory, lora, qlora (full)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="sequence lengths to plan for (2048)")
    parser.add_argument("--span-length", type=int, help="read a sequence in spans of so many tokens")
    parser.add_argument("--gradient-spans", type=int, default=1, help="spans a gradient may cross, 0 for all (1)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per step (1)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw_torch", help="(adamw_torch)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of arithmetic and weights (float32)"
    )
    parser.add_argument("--quantization", default="nf4", help="of the base for qlora: nf4, fp4 or int8 (nf4)")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations instead of recomputing them"
    )
    parser.add_argument("--optimizer-in-backward", action="store_true", help="update and free each gradient at once")
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="the longest sequence that fits, such as 8GB or 7.5GiB, also with what saves memory; "
        "without --lengths and --measure",
    )
    parser.add_argument("--measure", action="store_true", help="take two real steps of each setting and compare")
    return parser


def plan(arguments: argparse.Namespace) -> None:
    if arguments.fit is not None and (arguments.lengths or arguments.measure):
        raise ValueError(
            f"--fit is {arguments.fit!r} and looks for the length by itself, without real steps; "
            "leave out --lengths and --measure, or --fit"
        )
    settings = {"segment_length": arguments.segment_length, "memory_slots": arguments.memory_slots}
    setting = TrainingSetting(
        model=arguments.model,
        model_settings={name: value for name, value in settings.items() if value is not None},
        quantization=arguments.quantization,
        optimizer=arguments.optimizer,
        precision=arguments.precision,
        span_length=arguments.span_length,
        gradient_spans=arguments.gradient_spans,
        batch_size=arguments.batch_size,
        gradient_checkpointing=not arguments.no_checkpointing,
        optimizer_in_backward=arguments.optimizer_in_backward,
    )
    rows = [replace(setting, method=method) for method in arguments.methods]
    if arguments.fit is not None:
        _print_fits(rows, parse_size(arguments.fit))
        return
    header = ["method", "length", *PARTS, "total"] + (["measured", "off by"] if arguments.measure else [])
    print(
        f"Bytes in GB (10^9) at the peak of a step of {arguments.model}; {arguments.precision}, {arguments.optimizer}\n"
    )
    _print_row(header)
    _print_row(["---", *["---:"] * (len(header) - 1)])
    for row in rows:
        for length in arguments.lengths or [2048]:
            row = replace(row, sequence_length=length)
            planned = plan_memory(row)
            cells = [row.method, f"{length:,}", *_gigabytes(planned)]
            if arguments.measure:
                peak = measure_memory(row)["peak"]
                cells += [f"{peak / 1e9:.2f}", f"{planned.total / peak - 1:+.1%}"]
            _print_row(cells)


def _print_fits(rows: list[TrainingSetting], size: int) -> None:
    print(
        f"Longest sequence, in tokens up to {LONGEST:,}, that fits in {size / 1e9:.2f} GB, as given and with less memory; GB at the peak\n"
    )
    _print_row(["method", "how", "length", *PARTS, "total"])
    _print_row(["---", "---", *["---:"] * (len(PARTS) + 2)])
    for row in rows:
        for how, setting in ways_to_save(row).items():
            found = largest_length(setting, size, longest=LONGEST)
            if found is None:
                _print_row([row.method, how, "none", *[""] * (len(PARTS) + 1)])
            else:
                length, planned = found
                _print_row([row.method, how, f"{length:,}", *_gigabytes(planned)])


def _gigabytes(planned: MemoryPlan) -> list[str]:
    return [f"{planned.parts[part] / 1e9:.2f}" for part in PARTS] + [f"{planned.total / 1e9:.2f}"]


def _print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def parse_size(text: str) -> int:
    """Bytes of a size such as `8GB`. Raises `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found.group(2).upper() not in UNITS:
        raise ValueError(f"--fit is {text!r}, but must be a size such as 8GB, 7500MB or 7.5GiB")
    return int(float(found.group(1)) * UNITS[found.group(2).upper()])


if __name__ == "__main__":
    run(build_parser(), plan)
