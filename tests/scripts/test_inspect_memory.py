"""`scripts.inspect_memory` prints the report, draws both pictures, and refuses in one line."""

import pytest

from scripts import generate, inspect_memory


@pytest.fixture
def state(call, tiny_model, document, tmp_path):
    arguments = ["--model", tiny_model, "--prompt-file", document, "--state", tmp_path / "state"]
    assert call(generate, *arguments, "--max-new-tokens", 2)[0] == 0
    return tmp_path / "state"


def test_prints_a_table_and_leaves_two_pictures(call_process, tiny_model, state, tmp_path):
    arguments = ["--model", tiny_model, "--state", state, "--output", tmp_path / "pictures"]
    done = call_process("inspect_memory", *arguments)
    assert done.returncode == 0, done.stderr
    assert "raw slots" in done.stdout and "16/16" in done.stdout
    for name in ("memory.png", "held_text.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_refused(assert_refused, call, tiny_model, state, tmp_path):
    model = ["--model", tiny_model]
    assert_refused("no state folder at", inspect_memory, *model, "--state", tmp_path / "nowhere")
    assert_refused("no model folder at", inspect_memory, "--model", tmp_path / "nowhere", "--state", state)
    assert_refused("nothing can be written", inspect_memory, *model, "--state", state, "--output", __file__)
    assert_refused("no row 4", inspect_memory, *model, "--state", state, "--output", tmp_path, "--row", 4)
    call(generate, *model, "--prompt", "short", "--max-new-tokens", 1, "--state", tmp_path / "short")
    short = ["--state", tmp_path / "short", "--output", tmp_path]
    assert_refused("holds nothing in its slots yet", inspect_memory, *model, *short)
    assert call(inspect_memory, *model, *short)[1] == ""
