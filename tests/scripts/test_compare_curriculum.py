"""`scripts.compare_curriculum` trains every way from the same seeds, measures them alike, and tells when each reached a target."""

import json

from scripts import compare_curriculum
from scripts.compare_curriculum import seconds_to

QUICK = "--steps 4 --measure-every 2 --adapt-every 2 --rows 1 --tokens-per-batch 256 --first-length 32".split()


def test_ways_are_trained_and_measured_alike(call, tmp_path):
    output = tmp_path / "out"
    code, printed, errors = call(compare_curriculum, "--output", output, "--seeds", 3, "--targets", 0.0, 0.99, *QUICK)
    assert code == 0, errors
    trainings = json.loads((output / "results.json").read_text())["trainings"]
    assert [(training["way"], training["seed"]) for training in trainings] == [
        ("curriculum", 3), ("lengths", 3), ("none", 3),
    ]  # fmt: skip
    for training in trainings:
        assert [point["step"] for point in training["curve"]] == [2, 4]
        # Whatever a way trained on, it is measured on all five tasks.
        assert set(training["tasks"]) == {"copy", "lookup", "infill", "needle", "recall"}
    assert "| 0.99 | none | not reached |" in printed
    assert not any("| 0.0 |" in line and "not reached" in line for line in printed.splitlines())


def test_earlier_results_are_kept(assert_refused, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert_refused("results.json exists already; choose another", compare_curriculum, "--output", tmp_path, *QUICK)
    assert (tmp_path / "results.json").read_text() == "{}"


def test_a_target_is_reached_where_the_curve_first_is_that_high():
    curve = [{"step": 1, "seconds": 3.0, "accuracy": 0.2}, {"step": 2, "seconds": 7.0, "accuracy": 0.6}]
    assert seconds_to(0.5, curve) == 7.0
    assert seconds_to(0.2, curve) == 3.0
    assert seconds_to(0.7, curve) is None


def test_a_phase_shorter_than_two_segments_is_refused(assert_refused, tmp_path):
    arguments = ["--output", tmp_path / "out", *QUICK[:-1], 16]
    assert_refused("segment_length", compare_curriculum, *arguments)


def test_bad_input_is_refused_before_a_training(assert_refused, tmp_path):
    output = ["--output", tmp_path / "out"]
    for option in ("--steps", "--rows", "--measure-every", "--adapt-every", "--tokens-per-batch"):
        assert_refused(f"{option} is 0", compare_curriculum, *output, option, 0)
    assert_refused("--targets is nan", compare_curriculum, *output, "--targets", "nan")
    assert_refused("nothing can be written", compare_curriculum, "--output", __file__)
