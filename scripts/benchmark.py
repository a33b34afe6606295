"""Measure BWR-DNC beside Llama (SDPA), a sliding-window model and Mamba2 of the same shape: speed, memory, start.

Every figure of a table comes from alternating runs in one process, under the same settings, after a warm-up; memory is taken in
a fresh process each. Results: benchmark.json (everything), benchmark.md (tables), benchmark.png (needs matplotlib).

Examples:
  python -m scripts.benchmark                                           everything, bwr-dnc-120m, less than half an hour
  python -m scripts.benchmark --quick                                   the same tables on bwr-dnc-tiny, about two minutes
  python -m scripts.benchmark --what decode --lengths 512 8192 131072
  python -m scripts.benchmark --what train memory --preset bwr-dnc-60m --models bwr-dnc llama
  python -m scripts.benchmark --what announced                          the figures that this design was announced with
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from modeling_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc.evaluation import benchmark as measure
from modeling_bwr_dnc.evaluation.benchmark import Benchmark, Settings
from modeling_bwr_dnc.evaluation.benchmark_report import (
    ANNOUNCED_CONTEXT_GB,
    ANNOUNCED_LENGTH,
    draw,
    markdown,
    summarize,
)
from modeling_bwr_dnc.evaluation.machine import CLOCKS
from modeling_bwr_dnc.evaluation.peers import DEFAULT_PEERS, FULL, OURS, PEERS
from modeling_bwr_dnc.loading import read_config
from modeling_bwr_dnc.presets import preset_path
from modeling_bwr_dnc.staging import write_text
from scripts.command_line import check_output, run

WHATS = ("train", "prefill", "decode", "memory", "cold", "announced")
MEMORY_VARIANTS = (("own", True), ("own", False), ("chunked", False))
QUICK = {"preset": "bwr-dnc-tiny", "lengths": [64, 256, 1024], "rounds": 2, "decode_tokens": 32, "minutes": 3.0}
DEFAULTS = {"preset": "bwr-dnc-120m", "lengths": None, "rounds": 4, "decode_tokens": None, "minutes": 28.0}
# Throughput by preset, as (batch size, length).
THROUGHPUT = {
    "bwr-dnc-60m": ((1, 512), (4, 512), (8, 512), (1, 2048), (4, 2048)),
    "bwr-dnc-500m": ((1, 512), (2, 512), (1, 2048)),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--what",
        nargs="+",
        choices=WHATS,
        default=list(WHATS[:-1]),
        metavar="WHAT",
        help="train: tokens/s of a step; prefill: of a prompt, which is the time to the first token; decode: of the tokens after it; "
        "memory: peak of a training step and of reading, bytes of state; cold: import, load, first token; announced: the "
        "figures that the design was announced with (all but announced)",
    )
    parser.add_argument(
        "--preset", help=f"preset, or folder with a config.json ({DEFAULTS['preset']}; quick: {QUICK['preset']})"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS",
        help="lengths for everything, 512 to 131072 say (by default train 512 2048 8192, prefill up to 32768, decode after 512 8192 "
        "32768, memory of a step at 8192, of reading at 2048 16384 131072)",
    )  # fmt: skip
    parser.add_argument(
        "--models",
        nargs="+",
        choices=PEERS,
        default=DEFAULT_PEERS,
        help="which models (all but llama-onednn: Llama, its linear layers computed as BWR-DNC's are)",
    )
    parser.add_argument("--quick", action="store_true", help="small model, short lengths, about two minutes")
    process = parser.add_argument_group("process")
    process.add_argument("--threads", type=int, help=f"threads of torch (here {torch.get_num_threads()})")
    process.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    process.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)"
    )
    process.add_argument(
        "--optimizer", choices=("adamw", "none"), default="adamw", help="part of a training step (adamw)"
    )
    process.add_argument(
        "--cuda-graphs", action="store_true", help="train with a step recorded as a CUDA graph, all models alike"
    )
    process.add_argument(
        "--rounds", type=int, help=f"rounds A B A B of a measurement, fewer if slow ({DEFAULTS['rounds']})"
    )
    process.add_argument("--decode-tokens", type=int, help="tokens to decode, over all rounds (a segment)")
    process.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="processor: seconds in which this process really ran, for a machine that others keep busy; use one thread (wall)",
    )
    process.add_argument("--minutes", type=float, help=f"begin nothing that would end later ({DEFAULTS['minutes']:g})")
    parser.add_argument("--output", default="benchmark_output", help="folder of the results (benchmark_output)")
    return parser


def benchmark(arguments: argparse.Namespace) -> None:
    for name, value in (QUICK if arguments.quick else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    check(arguments)
    check_output(arguments.output)
    config = load_config(arguments.preset)
    settings = Settings(
        config=config,
        models=tuple(name for name in PEERS if name in arguments.models),
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads or torch.get_num_threads(),
        rounds=arguments.rounds,
        decode_tokens=arguments.decode_tokens or config.segment_length,
        optimizer=arguments.optimizer,
        clock=arguments.clock,
        cuda_graphs=arguments.cuda_graphs,
    )
    bench = Benchmark(settings, arguments.minutes, say=lambda line: print(line, file=sys.stderr, flush=True))
    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    throughput: dict[str, dict] = {}

    def keep() -> dict:
        """Everything measured so far, also in a file: an interrupted run leaves what it has."""
        results = summarize(bench.results(command)) | {"throughput": throughput}
        write_text(output / "benchmark.json", json.dumps(results, indent=1) + "\n")
        return results

    try:
        measure_asked(bench, arguments, keep)
        if "announced" in arguments.what:
            measure_announced(bench, throughput, keep)
    finally:
        write(keep(), output)


def measure_asked(bench: Benchmark, arguments: argparse.Namespace, keep: Callable[[], object]) -> None:
    """All that `--what` names but the announced figures, each kept as soon as it is there."""
    asked = set(arguments.what)
    if "train" in asked:
        for length in arguments.lengths or measure.TRAINING_LENGTHS:
            bench.training(length)
            keep()
    if "cold" in asked:
        bench.cold_start()
        keep()
    for length, prefills, decodes in reading_plan(asked, arguments.lengths):
        bench.reading(length, prefill_rounds=None if prefills else 0, decodes=decodes)
        keep()
    if "memory" in asked:
        lengths = [max(arguments.lengths)] if arguments.quick else arguments.lengths
        for length in lengths or measure.TRAINING_MEMORY_LENGTHS:
            bench.training_memory(length, MEMORY_VARIANTS)
            keep()
        for length in lengths or measure.READING_MEMORY_LENGTHS:
            bench.reading_memory(length)
            keep()


def reading_plan(asked: set[str], lengths: list[int] | None) -> list[tuple[int, bool, bool]]:
    """Lengths to read, each with whether prefill and decoding after it are measured."""
    prefill_lengths = (lengths or measure.PREFILL_LENGTHS) if "prefill" in asked else ()
    decode_lengths = (lengths or measure.DECODE_LENGTHS) if "decode" in asked else ()
    return [
        (length, length in prefill_lengths, length in decode_lengths)
        for length in sorted({*prefill_lengths, *decode_lengths})
    ]


def measure_announced(bench: Benchmark, throughput: dict[str, dict], keep: Callable[[], object]) -> None:
    """The announced figures of this preset, and into `throughput`, of others, the results by batch and length."""
    asked = bench.settings
    bench.settings = replace(asked, models=(OURS, FULL))
    bench.training(ANNOUNCED_LENGTH)
    keep()
    bench.reading(ANNOUNCED_LENGTH, prefill_rounds=1)
    keep()
    bench.training_memory(ANNOUNCED_LENGTH, [("own", False)])
    keep()
    bench.settings = replace(asked, models=(OURS,))
    for length in ANNOUNCED_CONTEXT_GB:
        bench.reading_memory(length)
        keep()
    bench.settings = asked
    for preset, shapes in THROUGHPUT.items():
        settings = replace(
            asked, config=load_config(preset), models=(OURS, FULL), optimizer="none", rounds=2, decode_tokens=16
        )
        other = Benchmark(settings, minutes=bench.minutes_left(), say=bench.say)
        for batch_size, length in shapes:
            other.training(length, batch_size)
            other.reading(length, batch_size, prefill_rounds=1)
            # Announced figures and targets are for another preset.
            found = summarize(other.results(f"throughput of {preset}"))
            throughput[preset] = found | {"announced": [], "targets": []}
            keep()


def load_config(name: str) -> BwrDncConfig:
    return read_config(Path(name) if Path(name).is_dir() else preset_path(name))


def check(arguments: argparse.Namespace) -> None:
    if arguments.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {arguments.device!r}, but must be cpu or cuda")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device; use cpu")
    if arguments.cuda_graphs and not arguments.device.startswith("cuda"):
        raise ValueError(f"--cuda-graphs needs --device cuda, but that is {arguments.device!r}")
    for name in ("rounds", "minutes", "threads", "decode_tokens"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    if arguments.lengths and min(arguments.lengths) < 2:
        raise ValueError(f"--lengths holds {min(arguments.lengths)}, but a training step needs at least 2 tokens")


def write(results: dict, output: Path) -> None:
    """The report and the picture."""
    is_drawn = False
    try:
        is_drawn = draw(results, output / "benchmark.png")
    except ImportError:
        print("matplotlib is not installed, so there is no picture (pip install matplotlib)", file=sys.stderr)
    text = markdown(results, "benchmark.png" if is_drawn else None)
    for preset, found in results["throughput"].items():
        text += f"\n# Throughput of {preset}\n\n" + markdown(found).split("\n", 2)[2].lstrip()
    write_text(output / "benchmark.md", text)
    print(text)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    run(build_parser(), benchmark)
