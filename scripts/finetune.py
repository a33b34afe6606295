"""Fine-tune a BWR-DNC model, wholly or by LoRA, QLoRA, or its memory parameters alone, as one YAML file says.

Examples:
  python -m scripts.finetune --config configuration/finetuning.yaml model=smollm2-bwr-dnc data.sources=book.txt
  python -m scripts.finetune --config configuration/finetuning.yaml model=smollm2-bwr-dnc data.sources=book.txt method=full
  python -m scripts.finetune --config configuration/finetuning.yaml model=smollm2-bwr-dnc data.sources=book.txt method=qlora
  accelerate launch scripts/finetune.py --config configuration/finetuning.yaml model=smollm2-bwr-dnc data.sources=book.txt
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    # Started as a file: the repository, not its scripts, is where imports begin.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts import train  # noqa: E402
from scripts.command_line import run  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    return train.build_parser("scripts.finetune", __doc__)


def finetune(arguments: argparse.Namespace) -> None:
    train.train(arguments, from_scratch=False)


if __name__ == "__main__":
    run(build_parser(), finetune)
