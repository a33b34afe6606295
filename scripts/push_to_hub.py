"""Publish a model folder on the Hugging Face Hub, after checking that it loads for strangers.

Examples:
  python -m scripts.push_to_hub --model smollm2-bwr-dnc --repo owner/smollm2-bwr-dnc --dry-run staged   (uploads nothing)
  python -m scripts.push_to_hub --model smollm2-bwr-dnc --repo owner/smollm2-bwr-dnc
"""

import argparse
import tempfile

from huggingface_hub.utils import validate_repo_id

from modeling_bwr_dnc.conversion.hub_folder import stage_model_folder, upload_model_folder
from scripts.command_line import check_output, run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.push_to_hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder to publish")
    parser.add_argument("--repo", required=True, help="owner/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument(
        "--dry-run", metavar="FOLDER", help="upload nothing; leave in FOLDER exactly what would be uploaded"
    )
    return parser


def push_to_hub(arguments: argparse.Namespace) -> None:
    validate_repo_id(arguments.repo)
    if arguments.dry_run is not None:
        check_output(arguments.dry_run)
        _list(stage_model_folder(arguments.model, arguments.dry_run))
        print(f"nothing was uploaded; {arguments.dry_run} holds what {arguments.repo} would get")
        return
    with tempfile.TemporaryDirectory() as staging:
        _list(stage_model_folder(arguments.model, staging))
        print(f"uploaded to {upload_model_folder(staging, arguments.repo, arguments.private)}")


def _list(files) -> None:
    for path in files:
        print(f"{path.stat().st_size:>14,}  {path.name}")


if __name__ == "__main__":
    run(build_parser(), push_to_hub)
