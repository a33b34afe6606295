"""What a benchmark's report says follows from the measurements, and says how they were taken."""

import pytest

from modeling_bwr_dnc.evaluation.benchmark_report import draw, markdown, slope, speed_ratio, summarize

COLD = {
    "what": "cold", "model": "llama", "length": 8, "batch_size": 1, "seconds": 2.0, "rounds": [2.0],
    "import_seconds": 1.0, "load_seconds": 0.5, "token_seconds": 0.5,
}  # fmt: skip


def made_up(seconds, *others, device="CPU"):
    """Results with the given seconds of a training step by model and length, and `others`."""
    entries = [
        {"what": "train", "model": model, "length": length, "batch_size": 1, "seconds": value, "rounds": [value] * 3,
         "gemm_share": 0.5}
        for (model, length), value in seconds.items()
    ]  # fmt: skip
    machine = {
        "commit": "0",
        "date": "2026-01-01 00:00 UTC",
        "processor": "x",
        "cores": 2,
        "memory_gib": 8,
        "device": device,
    }
    return {
        "command": "python", "machine": machine | {"threads": 2, "python": "3", "torch": "2", "transformers": "5"},
        "settings": {"models": ["bwr-dnc", "llama"], "dtype": "float32"}, "parameters": {},
        "limits": {"gemm_flops": 1e11, "bandwidth_bytes": 1e10}, "share_of_processors_used_by_others": 0.5,
        "measurements": [*entries, *others], "skipped": [],
    }  # fmt: skip


def test_ratios_slopes_and_verdicts_follow_from_the_measurements():
    seconds = {("bwr-dnc", 2048): 2.0, ("llama", 2048): 1.0, ("bwr-dnc", 8192): 8.0, ("llama", 8192): 16.0}
    results = summarize(made_up(seconds))
    assert speed_ratio(results, "train", 8192) == 2.0
    assert slope(results, "train", "bwr-dnc") == pytest.approx(1)
    assert slope(results, "train", "llama") == pytest.approx(2)
    verdicts = {row["figure"]: row["verdict"] for row in results["targets"]}
    assert verdicts["training tokens/s at 8,192"] == "holds"
    assert verdicts["training tokens/s at 2,048"] == "missed"
    assert verdicts["training tokens/s at 512"] == "not measured"
    assert "other processes took 50%" in markdown(results)


def reading(model="bwr-dnc", **more):
    return {
        "what": "memory", "model": model, "length": 64, "batch_size": 1, "variant": "reading", "seconds": 1.0,
        "rounds": [1.0], "peak_bytes": 1e9, "state_bytes": 1e6,
    } | more  # fmt: skip


@pytest.mark.parametrize(("device", "where"), [("CPU", "the process"), ("NVIDIA H100", "CUDA's allocator")])
def test_memory_is_reported_with_how_it_was_measured(device, where):
    report = markdown(summarize(made_up({}, reading(peak_includes_building=False), device=device)))
    assert f"Peak of {where} while a model reads or takes a step" in report
    assert "the others blocks of 1,024 tokens" in report and "includes building" not in report
    report = markdown(summarize(made_up({}, reading(peak_includes_building=True), device=device)))
    assert "The peak includes building the model" in report


@pytest.mark.parametrize(
    ("device", "title", "unit"),
    [
        ("CPU", "x, 2 threads, 2026-01-01", "peak memory of the process (GB)"),
        ("NVIDIA H100", "NVIDIA H100, 2026-01-01", "peak memory of CUDA's allocator (GB)"),
    ],
)
def test_a_picture_names_the_device(monkeypatch, device, title, unit):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: saved.append(self))
    assert draw(summarize(made_up({("llama", 64): 1.0}, reading(), device=device)), "unused.png")
    assert saved[0].get_suptitle().startswith(title)
    assert [axis.get_ylabel() for axis in saved[0].axes] == ["tokens per second", unit]


def test_no_picture_is_drawn_of_nothing(tmp_path):
    only_training = reading(variant="own loss, checkpointing on")
    results = summarize(made_up({}, COLD, only_training, reading(batch_size=2)))
    assert not draw(results, tmp_path / "benchmark.png") and not list(tmp_path.iterdir())


def test_the_start_of_a_process_is_of_seconds_that_passed():
    results = made_up({}, COLD)
    results["settings"]["clock"] = "processor"
    report = markdown(summarize(results))
    assert "(`--clock processor`), but for the start of a new process" in report
    assert "Seconds that passed, by whatever clock the rest was measured." in report
