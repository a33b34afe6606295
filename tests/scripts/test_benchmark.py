"""`scripts.benchmark` measures all it is asked for on a tiny model, and writes results that can be read and compared."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from modeling_bwr_dnc import BwrDncConfig, BwrDncForCausalLM
from modeling_bwr_dnc.evaluation import benchmark as measure
from modeling_bwr_dnc.evaluation import machine
from modeling_bwr_dnc.evaluation.benchmark import Benchmark
from modeling_bwr_dnc.evaluation.peers import (
    DEFAULT_PEERS,
    PEERS,
    build_llama,
    cache_nbytes,
    forward_flops,
    prefix_lengths,
)
from scripts import benchmark, cuda_smoke

PAIR = ("bwr-dnc", "llama")
SHARES = {"train": "gemm_share", "prefill": "gemm_share", "decode": "bandwidth_share"}


@pytest.fixture(autouse=True)
def process_settings():
    """A benchmark sets those of its process; give them back."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def small_config():
    return BwrDncConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, segment_length=8, num_sink_tokens=2, memory_slots=[12, 7, 3],
        layer_types=["sink_window_attention", "sink_window_attention", "state_bank_attention"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def preset(small_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    small_config.save_pretrained(folder)
    return folder


def run_benchmark(call, output, *arguments):
    code, text, errors = call(benchmark, *arguments, "--threads", 1, "--output", output)
    assert code == 0, errors
    return json.loads((output / "benchmark.json").read_text()), text


def test_results_hold_every_measurement_with_its_conditions(call, preset, tmp_path):
    results, text = run_benchmark(
        call, tmp_path, "--what", *SHARES, "--preset", preset, "--lengths", 24, 96, "--rounds", 2, "--models", *PAIR
    )
    for key in ("command", "machine", "limits", "parameters", "settings", "minutes"):
        assert results[key], key
    for key in ("processor", "commit", "date", "torch", "threads"):
        assert results["machine"][key], key
    assert results["settings"]["config"]["memory_slots"] == [12, 7, 3]
    assert not results["skipped"]
    expected = {(what, model, length) for what in SHARES for model in PAIR for length in (24, 96)}
    assert {(entry["what"], entry["model"], entry["length"]) for entry in results["measurements"]} == expected
    for entry in results["measurements"]:
        assert len(entry["rounds"]) == 2 and all(seconds > 0 for seconds in entry["rounds"])
        assert 0 < entry[SHARES[entry["what"]]] < 1
    ratios = {(row["what"], row["length"]) for row in results["ratios"]}
    assert ratios == {(what, length) for what in SHARES for length in (24, 96)}
    assert {row["what"] for row in results["slopes"]} == set(SHARES)
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    report = (tmp_path / "benchmark.md").read_text()
    assert report == text[: len(report)]
    for heading in ("## Training", "## Prefill", "## Decode"):
        assert heading in report


def test_memory_and_start_are_measured_in_new_processes(call, preset, tmp_path):
    options = ["--preset", preset, "--lengths", 40, "--rounds", 1, "--models", PAIR[0]]
    results, _ = run_benchmark(call, tmp_path, "--what", "memory", "cold", *options)
    assert not results["skipped"]
    memory = {entry["variant"]: entry for entry in results["measurements"] if entry["what"] == "memory"}
    assert len(memory) == 4 and all(entry["peak_bytes"] > 50e6 for entry in memory.values())
    assert memory["reading"]["state_bytes"] > 0
    (cold,) = (entry for entry in results["measurements"] if entry["what"] == "cold")
    assert cold["import_seconds"] + cold["load_seconds"] + cold["token_seconds"] < cold["seconds"]


def test_peers_of_other_kinds_are_measured_too(call, preset, tmp_path):
    results, _ = run_benchmark(
        call, tmp_path, "--what", *SHARES, "--preset", preset, "--lengths", 40, "--decode-tokens", 4
    )
    assert {entry["model"] for entry in results["measurements"]} == set(DEFAULT_PEERS)


def test_what_there_is_no_time_for_is_named(call, preset, tmp_path):
    results, text = run_benchmark(
        call, tmp_path, "--what", "train", "cold", "--preset", preset, "--lengths", 16, "--minutes", 1e-9
    )
    assert not results["measurements"]
    assert {(row["what"], row["model"]) for row in results["skipped"]} == {
        *(("train", name) for name in DEFAULT_PEERS), ("cold", "bwr-dnc"), ("cold", "llama"),
    }  # fmt: skip
    assert "the time limit was reached" in text


@pytest.fixture
def given_limits(monkeypatch):
    """The machine's limits are taken as given, which saves seconds."""
    monkeypatch.setattr(machine, "gemm_rate", lambda *_, **__: 1e11)
    monkeypatch.setattr(machine, "memory_bandwidth", lambda *_, **__: 1e10)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ValueError("a defect"), 2)])
def test_a_run_that_does_not_end_leaves_its_report(call, preset, tmp_path, monkeypatch, given_limits, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Benchmark, "reading", fail)
    options = ["--preset", preset, "--models", *PAIR, "--lengths", 16, "--rounds", 1, "--output", tmp_path]
    assert call(benchmark, "--what", "train", "prefill", *options)[0] == code
    assert "## Training" in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.png").is_file()


def test_a_picture_of_nothing_is_not_shown(call, preset, tmp_path, monkeypatch, given_limits):
    monkeypatch.setattr(Benchmark, "cold_start", lambda _: None)
    assert call(benchmark, "--what", "cold", "--preset", preset, "--output", tmp_path)[0] == 0
    assert "benchmark.png" not in (tmp_path / "benchmark.md").read_text()
    assert not (tmp_path / "benchmark.png").exists()


def test_quick_takes_memory_at_the_longest_length(call, tmp_path, monkeypatch, given_limits):
    lengths = []
    monkeypatch.setattr(Benchmark, "training_memory", lambda _, length, variants: lengths.append(length))
    monkeypatch.setattr(Benchmark, "reading_memory", lambda _, length: lengths.append(length))
    assert call(benchmark, "--quick", "--what", "memory", "--lengths", 1024, 256, "--output", tmp_path)[0] == 0
    assert lengths == [1024, 1024]


def test_announced_figures_are_kept_as_they_come(call, preset, tmp_path, monkeypatch, given_limits):
    kept = []

    def measured(*_, **__):
        kept.append({entry["what"] for entry in json.loads((tmp_path / "benchmark.json").read_text())["measurements"]})
        return {"seconds": 1.0, "wall_seconds": 1.0, "peak_bytes": 2, "state_bytes": 1}

    monkeypatch.setattr(measure, "in_fresh_process", measured)
    monkeypatch.setattr(benchmark, "ANNOUNCED_LENGTH", 24)
    monkeypatch.setattr(benchmark, "ANNOUNCED_CONTEXT_GB", {32: 1.0})
    monkeypatch.setattr(benchmark, "THROUGHPUT", {str(preset): ((2, 16), (4, 16))})
    options = ["--preset", preset, "--decode-tokens", 2, "--rounds", 1, "--output", tmp_path]
    assert call(benchmark, "--what", "announced", *options)[0] == 0
    # Two children for the memory of training, one for that of reading.
    assert kept == [set(SHARES), set(SHARES), {*SHARES, "memory"}]
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(results["settings"]["models"]) == set(DEFAULT_PEERS)
    assert len(results["throughput"][str(preset)]["measurements"]) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "bwr-dnc-3m"], "no preset is called 'bwr-dnc-3m'"),
        (["--quick", "--lengths", "1"], "at least 2 tokens"),
        (["--quick", "--rounds", "0"], "--rounds is 0"),
        (["--quick", "--minutes", "nan"], "--minutes is nan"),
        (["--quick", "--device", "nonsense"], "must be cpu or cuda"),
        (["--quick", "--output", __file__], "nothing can be written"),
    ],
)
def test_what_cannot_be_measured_is_refused(assert_refused, arguments, words):
    assert_refused(words, benchmark, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_without_a_device(assert_refused):
    assert_refused("no CUDA device", benchmark, "--quick", "--device", "cuda")
    assert_refused("no CUDA device", cuda_smoke)
    assert_refused("--cuda-graphs needs --device cuda", benchmark, "--quick", "--cuda-graphs")


# What the shares and ratios are computed from


@pytest.mark.parametrize("layer_type", ["sink_window_attention", "state_bank_attention"])
def test_entries_counted_are_those_that_the_model_holds(small_config, layer_type):
    model = BwrDncForCausalLM(small_config).eval()
    layer, num_segments = small_config.layer_types.index(layer_type), 12
    counted = prefix_lengths(small_config, layer, num_segments)
    with torch.no_grad():
        for segment in range(num_segments):
            ids = torch.zeros(1, segment * small_config.segment_length + 1, dtype=torch.int64)
            cache = model(ids, use_cache=True).past_key_values
            assert counted[segment] == cache.layers[layer].state.num_prefix()
    assert counted[-1] == 2 + (22 if layer_type == "state_bank_attention" else 0)


@pytest.mark.parametrize(("name", "num_layers_attending"), [("llama", 2), ("bwr-dnc", 1)])
def test_operations_counted_are_those_that_run(name, num_layers_attending):
    """
    Against torch's own counter, where nothing is left out but half of the causal attention that it counts; of BWR-DNC's last layer,
    its memory aside, nothing is computed that one logit does not need, but the attention of a block.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = BwrDncConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        layer_types=["sink_window_attention"] * 2,
    )  # fmt: skip
    model, num_tokens = PEERS[name].build(config).eval(), 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, num_tokens, dtype=torch.int64), use_cache=False, logits_to_keep=1)
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    attention = num_layers_attending * 4 * 32 * num_tokens * (num_tokens + 1) / 2
    assert forward_flops(PEERS[name], model, config, num_tokens, 1) == products + attention


def test_llama_by_our_products_is_llama():
    config = BwrDncConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    logits = []
    for name in ("llama", "llama-onednn"):
        torch.manual_seed(0)
        logits.append(PEERS[name].build(config)(torch.arange(40)[None]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_all_models_have_about_the_same_number_of_parameters():
    config = AutoConfig.from_pretrained(benchmark.preset_path("bwr-dnc-120m"))
    with torch.device("meta"):
        counts = {name: peer.build(config).num_parameters() for name, peer in PEERS.items()}
    assert all(abs(count / counts["llama"] - 1) < 0.03 for count in counts.values()), counts


def test_state_of_llama_is_its_keys_and_values():
    config = BwrDncConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    cache = build_llama(config)(torch.zeros(3, 10, dtype=torch.int64), use_cache=True).past_key_values
    assert cache_nbytes(cache) == 2 * 2 * 3 * 32 * 10 * 4
    # What a sliding window shows of a block that it was read in.
    cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:, :, -4:], cache.layers[0].values[:, :, -4:]
    assert cache_nbytes(cache) == (2 * 2 * 3 * 32 * 10 * 4) // 2 + 2 * 2 * 3 * 32 * 4 * 2
