"""A run of the benchmark keeps to its time, measures a point once, and goes on without what does not fit in memory."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers

from modeling_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc.evaluation import benchmark, machine
from modeling_bwr_dnc.evaluation.benchmark import WARM_UP_LENGTH, Benchmark, Settings, memory_of_reading
from modeling_bwr_dnc.evaluation.benchmark_report import summarize


@pytest.fixture
def new_bench(monkeypatch):
    """A benchmark of two tiny models, which takes the limits of the machine as given."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    monkeypatch.setattr(machine, "gemm_rate", lambda *_, **__: 1e11)
    monkeypatch.setattr(machine, "memory_bandwidth", lambda *_, **__: 1e10)
    config = BwrDncConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, segment_length=8, num_sink_tokens=2, memory_slots=[12, 7, 3],
    )  # fmt: skip

    def new(**settings) -> Benchmark:
        defaults = {"models": ("bwr-dnc", "llama"), "threads": threads, "rounds": 2, "decode_tokens": 4}
        return Benchmark(Settings(config, **defaults | settings), minutes=10, say=lambda _: None)

    yield new
    torch.set_flush_denormal(False)
    transformers.logging.set_verbosity(verbosity)


def skipped(bench: Benchmark) -> list[tuple[str, str, int]]:
    return [(row["what"], row["model"], row["length"]) for row in bench.results("")["skipped"]]


@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_a_prompt_that_was_read_for_decoding_alone_tells_how_long_the_next_takes(new_bench, monkeypatch, clock):
    bench = new_bench(clock=clock)
    # The time that passes is what the time limit is about, whatever the clock says.
    monkeypatch.setattr(Settings, "timed", lambda self, function: [function(), 1e-9][1])
    monkeypatch.setattr(benchmark, "POINT_SECONDS", 1e-6)
    bench.reading(16, prefill_rounds=0)
    assert not skipped(bench)
    bench.reading(32, prefill_rounds=0)
    assert skipped(bench) == [("prefill", "bwr-dnc", 32), ("prefill", "llama", 32)]


@pytest.fixture
def children(monkeypatch):
    """Limits of the children that were started; each says that it took ten seconds."""
    limits = []

    def measured(*_, timeout):
        limits.append(timeout)
        return {"seconds": 1e-9, "wall_seconds": 10.0, "peak_bytes": 1, "state_bytes": 1}

    monkeypatch.setattr(benchmark, "in_fresh_process", measured)
    return limits


def test_what_a_child_took_tells_how_long_the_next_takes(new_bench, children):
    bench = new_bench()
    bench.reading_memory(512)
    bench.reading_memory(131072)
    # BWR-DNC may take all the time that is left, but would need more.
    assert skipped(bench) == [("memory", "bwr-dnc", 131072), ("memory", "llama", 131072)]
    assert benchmark.POINT_SECONDS < children[0] <= 600 and children[1] == benchmark.POINT_SECONDS


def test_a_point_is_measured_once_and_stands_under_its_model(new_bench, children):
    bench = new_bench(models=("bwr-dnc", "llama", "sliding-window"))
    for models in (bench.settings.models, ("bwr-dnc", "llama")):
        bench.settings = replace(bench.settings, models=models)
        bench.training(16)
        bench.reading(16, prefill_rounds=0)
        bench.reading(16, prefill_rounds=1)
        bench.reading_memory(16)
    results = summarize(bench.results(""))
    points = [(entry["what"], entry["model"]) for entry in results["measurements"]]
    assert len(points) == len(set(points)) == 4 * 3 and len(children) == 3
    assert len(results["ratios"]) == 3 * 2
    assert results["settings"]["models"] == ["bwr-dnc", "llama", "sliding-window"]


def test_points_of_one_model_are_measured_again_beside_another(new_bench):
    """A ratio is of turns that were neighbours."""
    bench = new_bench(models=("bwr-dnc",))
    bench.training(16)
    alone = bench.results("")["measurements"]
    bench.settings = replace(bench.settings, models=("bwr-dnc", "llama"))
    bench.training(16)
    ours, _ = bench.results("")["measurements"]
    assert ours["rounds"] != alone[0]["rounds"]


def measure_reading(bench: Benchmark, monkeypatch, name: str, length: int, look: Callable) -> dict:
    """Memory of reading, in this process; `look` sees the model when it has been built."""
    real_model = Settings.model

    def model_of(settings: Settings, name: str):
        model = real_model(settings, name)
        look(model)
        return model

    monkeypatch.setattr(Settings, "model", model_of)
    return memory_of_reading(bench.settings, name, length)


@pytest.mark.skipif(sys.platform != "linux", reason="of a process's peak only Linux can be asked to forget it")
def test_memory_of_reading_leaves_out_what_building_took(new_bench, monkeypatch):
    peaks = []

    def take_memory(_) -> None:
        torch.ones(75_000_000)
        peaks.append(machine.peak_memory())

    found = measure_reading(new_bench(), monkeypatch, "bwr-dnc", 64, take_memory)
    assert found["peak_bytes"] < peaks[0] - 200e6 and not found["peak_includes_building"]


@pytest.mark.parametrize(("name", "blocks"), [("bwr-dnc", [2100]), ("llama", [1024, 1024, 52])])
def test_memory_of_reading_charges_no_peer_with_a_whole_prompt(new_bench, monkeypatch, name, blocks):
    lengths = []

    def watch(model) -> None:
        model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))

    measure_reading(new_bench(), monkeypatch, name, 2100, watch)
    assert lengths == [WARM_UP_LENGTH, *blocks]


@pytest.mark.parametrize("place", ["building", "warm-up", "turn"])
def test_a_model_that_does_not_fit_in_memory_is_skipped_alone(new_bench, monkeypatch, place):
    bench, real_model = new_bench(), Settings.model

    def too_large(*_) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    def model_of(settings: Settings, name: str):
        model = real_model(settings, name)
        if name == "llama" and place == "building":
            too_large()
        if name == "llama":
            # The first call is the warm-up.
            at = {"warm-up": 0, "turn": 1}[place]
            calls = iter(range(10))
            model.register_forward_pre_hook(lambda *_: too_large() if next(calls) == at else None)
        return model

    monkeypatch.setattr(Settings, "model", model_of)
    bench.training(16)
    bench.models.clear()
    bench.warm.clear()
    bench.reading(16)
    assert skipped(bench) == [("train", "llama", 16), ("prefill", "llama", 16)]
    found = bench.results("")["measurements"]
    assert [(entry["what"], entry["model"], len(entry["rounds"])) for entry in found] == [
        (what, "bwr-dnc", 2) for what in ("train", "prefill", "decode")
    ]


def test_other_errors_of_a_model_end_the_run(new_bench, monkeypatch):
    def fail(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(benchmark, "training_step", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        new_bench().training(16)
