"""What README and model card show, runs. A small model stands in for the one that `make demo` leaves."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from modeling_bwr_dnc.conversion import convert_checkpoint
from tests.tiny_sources import SIZES, save_source

REPOSITORY = Path(__file__).parent.parent
CARD = "model_cards/smollm2-135m-instruct-bwr-dnc.md"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 8192})
    folder = tmp_path_factory.mktemp("readme")
    convert_checkpoint(save_source(folder / "source", config), folder / "model", prove=False)
    return folder / "model"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", CARD])
def test_python_examples_run(name, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(name)
    assert len(blocks) >= 3
    program = "\n".join(blocks)
    assert "demo_output/model" in program
    exec(compile(program.replace("demo_output/model", str(model_folder)), name, "exec"), {"__name__": "example"})


def test_readme_begins_with_the_two_commands():
    beginning = (REPOSITORY / "README.md").read_text(encoding="utf-8")[:300]
    assert "make demo" in beginning and "make test" in beginning


@pytest.mark.parametrize("files", ["README.md", "model_cards/**/*.md", "tokenization/**/*.md", "scripts/*.py"])
def test_command_lines_that_are_shown_are_understood(files):
    text = "\n".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob(files)).replace("\\\n", " ")
    lines = re.findall(r'^ *python -m scripts\.(\w+)((?:"[^"]*"|[^"\n])*)$', text, re.MULTILINE)
    assert lines
    for name, line in lines:
        # Behind three spaces stands what the line is for.
        words = shlex.split(re.split(r" {3,}[a-z(]", line)[0])
        parser = importlib.import_module(f"scripts.{name}").build_parser()
        parser.parse_args([word for word in words if word != "..."])


@pytest.mark.parametrize("name", ["README.md", CARD])
def test_files_and_scripts_that_are_named_exist(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for script in set(re.findall(r"scripts\.(\w+)", text)):
        assert (REPOSITORY / "scripts" / f"{script}.py").is_file(), script
    for path in set(re.findall(r"`((?:modeling_bwr_dnc|configuration|tokenization|model_cards)/[\w./-]*)`", text)):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("name", [CARD, "model_cards/TEMPLATE.md"])
def test_cards_have_the_metadata_of_the_hub(name):
    data = ModelCard.load(REPOSITORY / name).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.base_model and "custom_code" in data.tags
