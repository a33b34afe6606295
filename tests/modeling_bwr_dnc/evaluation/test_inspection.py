"""The table says what the memory report says, and the pictures show what the memory holds."""

import numpy as np
import pytest
import torch

from modeling_bwr_dnc import StateBankCache
from modeling_bwr_dnc.conversion import converted_config, transfer_weights
from modeling_bwr_dnc.evaluation import inspection
from modeling_bwr_dnc.evaluation.reading import read_tokens
from tests.tiny_sources import CONFIGS, byte_tokenizer, random_source


@pytest.fixture(scope="module")
def model():
    source = random_source(CONFIGS["llama"])
    return transfer_weights(source, converted_config(source.config, 8, 2, [16, 8, 4]))


@pytest.fixture(scope="module")
def cache(model):
    cache = StateBankCache(config=model.config)
    text = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n" * 3
    read_tokens(model, byte_tokenizer()(text, return_tensors="pt").input_ids, cache)
    return cache


def test_table_has_a_line_per_layer_with_the_reported_numbers(cache):
    lines = inspection.report_table(cache).splitlines()
    assert len(lines) == 2 + 3 and len({len(line) for line in lines}) == 1
    first = lines[2].split()
    report = [entry for entry in cache.memory_report() if entry["layer"] == 0]
    assert first[0] == "0" and first[1] == f"{report[0]['used']}/16" and first[2] == f"{report[0]['age']:,.0f}"


def test_pictures_are_written(cache, tmp_path):
    inspection.draw_memory(cache, tmp_path / "memory.png")
    inspection.draw_held_text(cache, byte_tokenizer(), tmp_path / "held_text.png")
    for name in ("memory.png", "held_text.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_map_is_coloured_where_slots_are_held_and_nowhere_else(cache):
    held = cache.tokens()
    window_start, seen = cache.rows[0].window_start, cache.rows[0].seen
    image = inspection._memory_map(cache, held, layers=[0, 1, 2], row=0, columns=seen)
    assert image.shape == (3 * 2, seen, 3)
    coloured = np.abs(image - inspection._rgb(inspection.PAPER)).max(-1) > 1e-6
    expected = np.zeros_like(coloured)
    expected[:, :2] = expected[:, window_start:] = True
    for slot in held:
        expected[slot["layer"] * 2 + slot["head"], slot["positions"]] = True
    assert np.array_equal(coloured, expected)


def test_shares_add_up_to_the_slots_held(cache):
    held = cache.tokens()
    share, token_ids = inspection._shares(held, cache.rows[0].window_start)
    assert share.sum() * 3 * 2 == pytest.approx(len(held))
    assert 0 <= share.min() and share.max() <= 1 + 1e-9
    known = {position: token for slot in held for position, token in zip(slot["positions"], slot["token_ids"])}
    assert all(token_ids[position] == known.get(position, -1) for position in range(len(token_ids)))


def test_best_passages_lie_where_most_is_held():
    share = np.zeros(300)
    share[[40, 41, 42, 150, 151, 290]] = 1
    passages = inspection._best_passages(share, 3, 10)
    assert [share[start:stop].sum() for start, stop in passages] == [3, 2, 1]


def test_unknown_tokens_are_one_run_of_dots():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer("a").input_ids, -1, -1, *tokenizer("b").input_ids]
    pieces = inspection._pieces(tokenizer, np.array(ids), np.array([0.5, 0, 0, 1.0]))
    assert pieces == [("a", 0.5), (" ··· ", 0.0), ("b", 1.0)]


def test_text_is_cut_at_line_breaks_and_at_the_width():
    assert inspection._wrap("ab\ncdef\t", 3) == ["ab", "\n", "cde", "f  ", "  "]


def views(cache, folder, row=0):
    yield lambda: inspection.report_table(cache, row)
    yield lambda: inspection.draw_memory(cache, folder / "memory.png", row)
    yield lambda: inspection.draw_held_text(cache, byte_tokenizer(), folder / "held_text.png", row)


@pytest.mark.parametrize(
    ("settings", "length", "reason"),
    [
        ({}, 10, "holds nothing in its slots yet: all 10 tokens .* a longer text"),
        ({"memory_slots": [0, 0, 0]}, 200, "has no slots, only sinks and a window, .* `memory_slots` above 0"),
        ({"layer_types": "window"}, 200, "has no slots, only sinks and a window, .* a layer with a bank"),
    ],
)
def test_memory_without_slots_has_no_table_and_no_picture(tmp_path, settings, length, reason):
    source = random_source(CONFIGS["llama"])
    budget = {"segment_length": 8, "num_sink_tokens": 2, "memory_slots": [16, 8, 4]}
    model = transfer_weights(source, converted_config(source.config, **budget | settings))
    cache = StateBankCache(config=model.config)
    read_tokens(model, torch.randint(257, (1, length)), cache)
    for view in views(cache, tmp_path):
        with pytest.raises(ValueError, match=reason):
            view()


def test_row_that_does_not_exist_is_refused(cache, tmp_path):
    for view in views(cache, tmp_path, row=3):
        with pytest.raises(ValueError, match="no row 3"):
            view()
