"""A run of the benchmark keeps to its time."""

import pytest
import torch
import transformers

from modeling_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc.evaluation import benchmark, machine
from modeling_bwr_dnc.evaluation.benchmark import Benchmark, Settings


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


def test_what_a_child_took_tells_how_long_the_next_takes(new_bench, monkeypatch):
    limits = []

    def measured(*arguments, timeout):
        limits.append(timeout)
        return {"seconds": 1e-9, "wall_seconds": 10.0, "peak_bytes": 1, "state_bytes": 1}

    monkeypatch.setattr(benchmark, "in_fresh_process", measured)
    bench = new_bench()
    bench.reading_memory(512)
    bench.reading_memory(131072)
    # BWR-DNC may take all the time that is left, but would need more.
    assert skipped(bench) == [("memory", "bwr-dnc", 131072), ("memory", "llama", 131072)]
    assert benchmark.POINT_SECONDS < limits[0] <= 600 and limits[1] == benchmark.POINT_SECONDS
