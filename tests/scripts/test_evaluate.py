"""`scripts.evaluate` measures with all controls, writes its report, and refuses in one line."""

import json

import pytest

from modeling_bwr_dnc.evaluation.policies import CONTROLS
from modeling_bwr_dnc.evaluation.recall import memory_of
from scripts import evaluate
from scripts.command_line import load_model


def test_writes_numbers_tables_and_pictures(call, tiny_model, document, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path / "results", "--measures", "loss", "needle"]
    arguments += ["--lengths", 180, 200, "--depths", 0.5, "--rows", 1, "--full-limit", 190, "--kind", "code"]
    code, _, errors = call(evaluate, *arguments, "--text", document)
    assert code == 0, errors
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    loss, needle = results["measurements"]["loss_by_position"], results["measurements"]["needle_code"]
    assert {record["policy"] for record in loss} == {record["policy"] for record in needle} == set(CONTROLS)
    assert all(record["loss"] > 0 for record in loss)
    assert max(record["length"] for record in needle if record["policy"] == "full") == 180
    assert "python -m scripts.evaluate" in results["facts"]["command"]
    for name in ("results.md", "loss_by_position.png", "needle_code.png"):
        assert (tmp_path / "results" / name).stat().st_size > 0


def test_facts_asked_from_forks_of_one_reading(call, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path, "--measures", "facts", "--lengths", 700, "--rows", 2]
    code, _, errors = call(evaluate, *arguments, "--policies", "memory", "window")
    assert code == 0, errors
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    for records in measured["facts"], measured["facts_by_kind"]:
        assert {record["policy"] for record in records} == {"memory", "window"}
        assert all(record["answers"] == 2 and 0 <= record["exact"] <= 1 for record in records)
    assert "| 700 | passkey |" in (tmp_path / "results.md").read_text()


def test_a_task_in_words_is_asked_by_the_tokenizer_of_the_model(tiny_model, tmp_path):
    model, tokenizer = load_model(str(tiny_model))
    options = ["--model", str(tiny_model), "--output", str(tmp_path), "--measures", "accuracy", "--lengths", "300"]
    arguments = evaluate.build_parser().parse_args([*options, "--task", "needle_text"])
    task = evaluate.chosen_task(arguments, model, tokenizer)
    assert "Question:" in tokenizer.decode(task.row(0)["input_ids"])
    # A model that learned the task as bytes is asked in bytes.
    arguments.model = str(tmp_path)
    (tmp_path / evaluate.TASK_FILE).write_text(json.dumps({"task": "needle_text", "options": {}}))
    assert evaluate.chosen_task(arguments, model, tokenizer).tokenizer is None


def test_a_new_process_answers_as_this_one_does(call, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path, "--measures", "sessions", "facts", "--lengths", 700]
    code, printed, errors = call(evaluate, *arguments, "--rows", 1, "--policies", "memory", "--memory-slots", 12, 4, 0)
    assert code == 0, errors
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    assert [record.pop("same") for record in measured["sessions"]] == [1.0] * 8
    assert measured["sessions"] == measured["facts"] and "8 of 8 answers are" in printed


def test_facts_and_loss_against_bytes(call, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path, "--measures", "budgets", "--lengths", 700, "--rows", 1]
    policies = ["memory", "raw", "score:attention", "full"]
    code, printed, errors = call(evaluate, *arguments, "--budgets", 14, 28, "--policies", *policies)
    assert code == 0, errors
    records = json.loads((tmp_path / "results.json").read_text())["measurements"]["budgets_at_700"]
    assert [(record["policy"], record["slots"]) for record in records] == [
        *((policy, 14) for policy in policies),
        *((policy, 28) for policy in policies[:-1]),
    ]
    # 14 slots are 8/4/2 where the model has 16/8/4: as many bytes as 14 raw ones, and read differently.
    assert records[0]["state_bytes"] == records[1]["state_bytes"] and records[0]["loss"] != records[1]["loss"]
    small, large = (next(r for r in records if (r["policy"], r["slots"]) == ("memory", slots)) for slots in (14, 28))
    assert small["state_bytes"] < large["state_bytes"] < records[3]["state_bytes"]
    # Of full attention keys and values are counted, and nothing else that a bank holds.
    config = load_model(str(tiny_model))[0].config
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert records[3]["state_bytes"] % per_token == 0 and abs(records[3]["state_bytes"] / per_token - 700) < 20
    assert all(record["answers"] == 8 for record in records)
    assert "policy memory, slots 28" in printed and "| raw | 14 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "budgets_at_700.png").stat().st_size > 0


def test_tasks_budgets_and_scores(call, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path, "--measures", "accuracy", "pairs", "--task", "lookup"]
    arguments += ["--lengths", 64, "--rows", 1, "--option", "num_queries=2", "--pairs", 4, 8, "--slots", 4]
    code, _, errors = call(evaluate, *arguments, "--score", "attention", "--memory-slots", 8, 0, 0)
    assert code == 0, errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert {record["policy"] for record in results["measurements"]["lookup_by_length"]} == {
        *CONTROLS,
        "score:attention",
    }
    assert {record["pairs"] for record in results["measurements"]["lookup_pairs_by_slots"]} == {4, 8}
    assert "slots 8/0/0" in results["facts"]["memory"]


def test_what_was_measured_outlives_a_later_failure(assert_refused, tiny_model, document, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path, "--text", document, "--lengths", 150, "--rows", 1]
    # The loss needs 150 tokens, which the text has; the facts have no room in them.
    assert_refused("has no room for", evaluate, *arguments, "--measures", "loss", "facts", "--policies", "memory")
    assert json.loads((tmp_path / "results.json").read_text())["measurements"]["loss_by_position"][0]["loss"] > 0


def test_what_was_measured_outlives_an_interruption(call, tiny_model, tmp_path, monkeypatch):
    reads = []

    def interrupted_at_the_third(*arguments):
        reads.append(arguments)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return memory_of(*arguments)

    monkeypatch.setattr("modeling_bwr_dnc.evaluation.recall.memory_of", interrupted_at_the_third)
    arguments = ["--model", tiny_model, "--output", tmp_path, "--measures", "facts", "--lengths", 700, "--rows", 2]
    code, _, errors = call(evaluate, *arguments, "--policies", "window", "memory")
    assert code == 130, errors
    measured = json.loads((tmp_path / "results.json").read_text())["measurements"]
    assert {record["policy"] for record in measured["facts"]} == {"window"} and len(measured["facts_by_kind"]) == 8


def test_a_text_too_short_for_the_last_length_is_refused_before_the_first_is_read(
    assert_refused, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("modeling_bwr_dnc.evaluation.recall.memory_of", lambda *_: pytest.fail("read"))
    arguments = ["--model", tiny_model, "--output", tmp_path, "--measures", "facts", "--policies", "memory"]
    assert_refused("but a length of 9000000 needs", evaluate, *arguments, "--lengths", 700, 9_000_000)


def test_bad_input_is_refused(assert_refused, tiny_model, document, tmp_path):
    arguments = ["--model", tiny_model, "--output", tmp_path / "out"]
    assert_refused("no model folder at", evaluate, "--model", tmp_path / "nowhere", "--output", tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "results.json").write_text("{}")
    assert_refused("the results of an earlier run", evaluate, "--model", tiny_model, "--output", tmp_path / "used")
    assert_refused("the text has", evaluate, *arguments, "--text", document, "--lengths", 5000, "--measures", "loss")
    pinned = ["--measures", "loss", "facts", "--policies", "pinned"]
    assert_refused("measure only facts or sessions", evaluate, *arguments, *pinned)
    assert_refused("choose a --task", evaluate, *arguments, "--measures", "accuracy")
    wrong = ["--measures", "accuracy", "--task", "lookup", "--option", "colour=3"]
    assert_refused("has no setting 'colour'", evaluate, *arguments, *wrong)
    assert_refused("has no pairs", evaluate, *arguments, "--measures", "pairs", "--task", "copy", "--lengths", 40)
    assert_refused("`kind` is 'smell'", evaluate, *arguments, "--measures", "needle", "--kind", "smell")
    assert_refused("must be at least", evaluate, *arguments, "--rows", 0)
    assert_refused("--slots is -1", evaluate, *arguments, "--slots", 8, -1)
    assert_refused("nothing can be written", evaluate, "--model", tiny_model, "--output", document)
    lookup = ["--measures", "accuracy", "--task", "lookup"]
    many = "`num_pairs` of the task 'lookup' is 'many', but must be a whole number"
    assert_refused(many, evaluate, *arguments, *lookup, "--option", "num_pairs=many")
    assert_refused("`length` is 14, but must be at least 26", evaluate, *arguments, *lookup, "--lengths", 14)
    assert_refused("no model folder at", evaluate, "--model", tmp_path / "nowhere", "--output", tmp_path, *lookup)
