"""Look into a saved memory: a table of what every layer holds, and pictures of it and of the text it still knows.

Example:
  python -m scripts.generate --model smollm2-bwr-dnc --prompt-file book.txt --state memory
  python -m scripts.inspect_memory --model smollm2-bwr-dnc --state memory --output pictures
"""

import argparse
from pathlib import Path

from modeling_bwr_dnc.evaluation.inspection import draw_held_text, draw_memory, report_table
from scripts.command_line import check_output, load_model, load_state, run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.inspect_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of the model that wrote the memory")
    parser.add_argument("--state", required=True, help="folder of the memory (scripts.generate --state)")
    parser.add_argument("--output", default=".", help="folder for memory.png and held_text.png (the current one)")
    parser.add_argument("--row", type=int, default=0, help="row to look at, if the memory holds a batch (0)")
    return parser


def inspect_memory(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    model, tokenizer = load_model(arguments.model, "cpu")
    cache = load_state(arguments.state, model)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    print(report_table(cache, arguments.row))
    draw_memory(cache, output / "memory.png", arguments.row)
    draw_held_text(cache, tokenizer, output / "held_text.png", arguments.row)
    print(f"\npictures: {output / 'memory.png'}, {output / 'held_text.png'}")


if __name__ == "__main__":
    run(build_parser(), inspect_memory)
