"""A recipe is checked key by key and value by value before anything is done."""

import pytest

from modeling_bwr_dnc.training.recipe import read_recipe

RECIPE = """
model: bwr-dnc-tiny
data: {sources: book.txt}
training: {eval_strategy: no, learning_rate: 1e-3, max_steps: 5}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "training.yaml"
    path.write_text(RECIPE)
    return path


def test_values_are_what_they_look_like(path):
    recipe = read_recipe(path, ["training.save_strategy=no", "merge=false", "training.warmup_steps=3"])
    assert recipe.training["eval_strategy"] == recipe.training["save_strategy"] == "no"
    assert recipe.training["learning_rate"] == 1e-3 and recipe.merge is False
    assert [source.path for source in recipe.data.sources] == ["book.txt"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=[1]", "`model` .* must be text"),
        ("model=null", "does not say what `model` is"),
        ("model_settings=5", "`model_settings` .* must be a mapping"),
        ("data=5", "`data` is 5"),
        ("data.sequence_length=64.5", "`sequence_length` .* must be a whole number"),
        ("data.validation_fraction=many", "`validation_fraction` .* must be a number or null"),
        ("data.packing=maybe", "`packing` .* must be true or false"),
        ("data.sources=5", "a data source is 5"),
        ("data.sources=[{}]", "either a `path` or a `task`"),
        ("data.sources=[{path: a, task: b}]", "either a `path` or a `task`"),
        ("data.sources=[{path: a, wieght: 2}]", "did you mean 'weight'"),
        ("data.sources=[{path: a, weight: 0}]", "above 0"),
        ("data.sources=[{path: a, weight: .nan}]", "above 0"),
        ("data.sources=[{path: a, weight: many}]", "`weight` .* must be a number"),
        ("data.sources=[{path: [a]}]", "`path` .* must be text"),
        ("training=[1]", "`training` .* must be a mapping"),
        ("training.max_steps=1.5", "`max_steps` .* must be a whole number"),
        ("training.max_steps=true", "`max_steps` .* must be a whole number"),
        ("training.learning_rate=[1]", "`learning_rate` .* must be a number"),
        ("training.span_length=many", "`span_length` .* must be a whole number or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(path, override, words):
    with pytest.raises(ValueError, match=words):
        read_recipe(path, [override])


def test_a_file_that_is_no_text_is_refused(path):
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ValueError, match="training.yaml is not UTF-8"):
        read_recipe(path)
