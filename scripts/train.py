"""Train a BWR-DNC model from scratch, as one YAML file says; any of its keys can be set on the command line.

Examples:
  python -m scripts.train --config configuration/bwr-dnc-tiny/training.yaml data.sources=book.txt
  python -m scripts.train --config configuration/bwr-dnc-tiny/training.yaml data.sources=book.txt --resume   (after a stop)
  python -m scripts.train --config configuration/bwr-dnc-60m/training.yaml data.sources=book.txt training.report_to=tensorboard
  accelerate launch scripts/train.py --config configuration/bwr-dnc-60m/training.yaml data.sources=book.txt
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    # Started as a file: the repository, not its scripts, is where imports begin.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  (first, as with -m: it quiets libraries)

from modeling_bwr_dnc.training.recipe import read_recipe  # noqa: E402
from modeling_bwr_dnc.training.run import run_recipe  # noqa: E402
from scripts.command_line import run  # noqa: E402


class Parser(argparse.ArgumentParser):
    """Takes KEY=VALUE before, between and after the options."""

    def parse_args(self, args=None, namespace=None):
        return self.parse_intermixed_args(args, namespace)


def build_parser(name: str = "scripts.train", description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = Parser(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in training.output_dir, if any"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="keys to change, such as training.learning_rate=1e-4"
    )
    return parser


def train(arguments: argparse.Namespace, from_scratch: bool = True) -> None:
    recipe = read_recipe(arguments.config, arguments.overrides)
    result = run_recipe(recipe, from_scratch=from_scratch, resume=arguments.resume)
    print(f"{result.num_trained:,} of {result.num_parameters:,} parameters trained for {result.num_steps:,} steps")
    for name, loss in (("mean training loss", result.train_loss), ("held-out loss", result.eval_loss)):
        if loss is not None:
            print(f"{name} {loss:.4f}")
    print(f"written to {result.folder}")


if __name__ == "__main__":
    run(build_parser(), train)
