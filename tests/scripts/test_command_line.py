"""What all command lines share: errors and interruptions are one line, and outputs are tried before the work."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from scripts.command_line import check_least, check_output, run


@pytest.mark.parametrize(
    ("raise_it", "code", "words"),
    [
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), 130, "interrupted"),
        (lambda: (_ for _ in ()).throw(SafetensorError("file too large")), 2, "file too large"),
        (lambda: (_ for _ in ()).throw(StrictDataclassError("a field:\n  of the wrong type")), 2, "a field: of the"),
        (lambda: (_ for _ in ()).throw(ModuleNotFoundError(name="seaborn")), 2, "pip install seaborn"),
        (lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")), 2, "No space left"),
    ],
)
def test_whatever_stops_a_command_is_one_line(monkeypatch, capsys, raise_it, code, words):
    monkeypatch.setattr("sys.argv", ["scripts.example"])
    with pytest.raises(SystemExit) as stop:
        run(argparse.ArgumentParser("scripts.example"), lambda arguments: raise_it())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(lines) == 1
    assert lines[0].startswith("scripts.example: ") and words in lines[0]


def test_an_output_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("", "new", "new/deep"):
        check_output(tmp_path / place)
    for place in ("file", "file/below"):
        with pytest.raises(ValueError, match="is a file"):
            check_output(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_value_of_an_option_is_compared_with_its_least():
    arguments = argparse.Namespace(rows=1, lengths=[8, 2], share=float("nan"))
    check_least(arguments, rows=1, lengths=2)
    for least in ({"rows": 2}, {"lengths": 3}, {"share": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            check_least(arguments, **least)


@pytest.mark.parametrize("command", [["-m", "scripts.train_task"], ["scripts/finetune.py"]])
def test_libraries_are_quiet_while_they_are_imported(command):
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, *command, "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.startswith("usage: scripts.")
