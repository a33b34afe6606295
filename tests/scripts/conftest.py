import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_bwr_dnc.conversion import convert_checkpoint
from scripts.command_line import run
from tests.tiny_sources import save_source

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_source):
    """Folder of a small converted model: window and slots have room for 46 tokens."""
    folder = tiny_source.parent / "converted"
    convert_checkpoint(tiny_source, folder, segment_length=8, num_sink_tokens=2, memory_slots=[16, 8, 4])
    return folder


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife.\n" * 3)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's command in this process; returns `(exit code, stdout, stderr)`."""

    def call_script(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        command = getattr(script, script.__name__.rpartition(".")[2])
        capsys.readouterr()
        try:
            run(script.build_parser(), command)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call_script


@pytest.fixture
def call_process():
    """Run `python -m scripts.<name>` as a user does, with as many threads as here: with others, sums differ in the last bit."""

    def call_script(name, *arguments, **options):
        command = [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, **options)

    return call_script


@pytest.fixture
def assert_refused(call):
    """The command ends with exit code 2 and one line on stderr that holds `words`."""

    def assert_one_line(words, script, *arguments):
        code, _, errors = call(script, *arguments)
        assert code == 2, errors
        assert words in errors and "Traceback" not in errors
        assert len(errors.strip().splitlines()) == 1

    return assert_one_line
