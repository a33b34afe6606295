"""A report holds every number it was given, as JSON, as tables and as pictures."""

import json

import pytest

from modeling_bwr_dnc.evaluation.report import table, write_report

LENGTHS = [
    {"policy": policy, "length": length, "exact": value, "token": value}
    for policy, values in (("memory", (1.0, 0.987)), ("window", (0.5, 0.016)))
    for length, value in zip((256, 4096), values)
] + [{"policy": "full", "length": 256, "exact": 0.25, "token": 0.25}]
LOSS = [{"policy": "memory", "start": 0, "stop": 256, "loss": 3.0, "perplexity": 20.0855, "tokens": 255}]
GRID = [{"policy": "memory", "slots": s, "pairs": p, "exact": s / (s + p)} for s in (8, 16) for p in (4, 8)]
PAIRS = [{"policy": "full", "length": 512, "pairs": pairs, "exact": 8 / pairs} for pairs in (8, 16, 32)]
DEPTHS = [{"policy": "memory", "length": 1024, "depth": depth, "exact": depth} for depth in (0.0, 0.5, 1.0)]
KINDS = [{"policy": "memory", "length": 1024, "kind": kind, "exact": 0.5} for kind in ("name", "code")]

BUDGETS = [
    {"policy": policy, "slots": slots, "state_bytes": slots * 1000, "exact": 0.5, "token": 0.75, "answers": 8}
    | {"loss": 3.0, "perplexity": 20.0855}
    for policy in ("memory", "score:attention")
    for slots in (192, 768)
]


def test_table_puts_policies_side_by_side():
    assert table(LENGTHS).splitlines()[2:] == [
        "| length | memory | window | full |",
        "|---:|---:|---:|---:|",
        "| 256 | 1.000 | 0.500 | 0.250 |",
        "| 4,096 | 0.987 | 0.016 | – |",
    ]
    assert table(BUDGETS).splitlines()[-1] == "| score:attention | 768 | 0.8 | 0.500 | 0.750 | 20.085 |"
    assert table(KINDS).splitlines()[-2:] == ["| 1,024 | name | 0.500 |", "| 1,024 | code | 0.500 |"]
    assert "| 0 | 256 | 20.085 |" in table(LOSS) or "| 0 | 256 | 20.086 |" in table(LOSS)


def test_report_is_complete(tmp_path):
    measurements = {
        "lookup_by_length": LENGTHS,
        "loss_by_position": LOSS,
        "lookup_pairs_by_slots": GRID,
        "passkey": DEPTHS,
    } | {"by_pairs": PAIRS}
    results = {"title": "A model", "facts": {"seed": 1}, "measurements": measurements}
    files = write_report(results, tmp_path / "new" / "folder")
    assert json.loads(files[0].read_text()) == results
    text = files[1].read_text()
    assert text.startswith("# A model") and "* seed: 1" in text
    for name, path in zip(measurements, files[2:], strict=True):
        assert path.name == f"{name}.png" and f"({name}.png)" in text
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_numbers_and_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    files = write_report({"title": "A model", "facts": {}, "measurements": {"passkey": DEPTHS}}, tmp_path)
    assert [path.name for path in files] == ["results.json", "results.md"]
    assert "| 1,024 | 0.5 | 0.500 |" in files[1].read_text() and "png" not in files[1].read_text()


@pytest.mark.parametrize("records", [LENGTHS, GRID, DEPTHS, KINDS, PAIRS, BUDGETS])
def test_pictures_show_the_numbers(records, tmp_path):
    """Another number, another picture."""
    from modeling_bwr_dnc.evaluation.report import draw

    draw(records, tmp_path / "a.png", "title")
    draw([*records[:-1], records[-1] | {"exact": 0.7}], tmp_path / "b.png", "title")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
