"""What the measurements of `benchmark` say: ratios to Llama, growth with length, targets, announced figures, tables, pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_bwr_dnc.evaluation.machine import middle
from modeling_bwr_dnc.evaluation.peers import FULL, OURS, PEERS, READ_BLOCK_LENGTH

OWN_LOSS_CHECKPOINTED, OWN_LOSS = "own loss, checkpointing on", "own loss, checkpointing off"
CHUNKED_ON_BOTH = "chunked loss, checkpointing off"
COLORS = {
    OURS: "#c8455a",
    FULL: "#22252b",
    "llama-onednn": "#8a8f99",
    "sliding-window": "#1f6f8b",
    "mamba2": "#e9a23b",
}
TITLES = {"train": "training", "prefill": "prefill", "decode": "decode"}


@dataclass(frozen=True)
class Claim:
    """A figure that something was to reach; `found` is None where it was not measured."""

    figure: str
    bound: float
    at_least: bool
    found: float | None
    unit: str = "x"

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        holds = self.found >= self.bound if self.at_least else self.found <= self.bound
        return "holds" if holds else "missed"

    def as_dict(self) -> dict:
        bound = f"{'>=' if self.at_least else '<='} {self.bound:g}{self.unit}"
        return {"figure": self.figure, "bound": bound, "found": self.found, "verdict": self.verdict}


def find(results: dict, what: str, model: str, length: int, batch_size: int = 1, variant: str | None = None):
    """The measurement, or None."""
    for entry in results["measurements"]:
        key = (entry["what"], entry["model"], entry["length"], entry["batch_size"], entry.get("variant"))
        if key == (what, model, length, batch_size, variant):
            return entry
    return None


def speed_ratio(results: dict, what: str, length: int, batch_size: int = 1, model: str = OURS) -> float | None:
    """
    How many times the tokens per second of Llama a model reaches: the median over the rounds, each a pair of neighbours.

    Decoding counts by the mean over all tokens: a median would leave out the one round that consolidates.
    """
    mine, full = (find(results, what, name, length, batch_size) for name in (model, FULL))
    if mine is None or full is None:
        return None
    if what == "decode":
        return full["mean_seconds"] / mine["mean_seconds"]
    return middle([b / a for a, b in zip(mine["rounds"], full["rounds"])])


def memory_ratio(results: dict, length: int, variant: str) -> float | None:
    """Peak memory of BWR-DNC as a share of Llama's."""
    mine, full = (find(results, "memory", name, length, variant=variant) for name in (OURS, FULL))
    return None if mine is None or full is None else mine["peak_bytes"] / full["peak_bytes"]


def slope(results: dict, what: str, model: str) -> float | None:
    """
    Exponent of cost over length: of the seconds of a step or a prompt, or of a token decoded after it. Least squares through
    logarithms, batches of one; None with fewer than two lengths.
    """
    points = [
        (entry["length"], entry.get("mean_seconds", entry["seconds"]))
        for entry in results["measurements"]
        if (entry["what"], entry["model"], entry["batch_size"]) == (what, model, 1)
    ]
    if len({length for length, _ in points}) < 2:
        return None
    logarithms = np.log(np.array(points))
    return float(np.polyfit(logarithms[:, 0], logarithms[:, 1], 1)[0])


def _long_against_short(results: dict, field: str, per_token: bool) -> float | None:
    """A figure of reading 131,072 tokens in a fresh process, against 16,384."""
    short, long = (find(results, "memory", OURS, length, variant="reading") for length in (16384, 131072))
    if short is None or long is None:
        return None
    return long[field] / short[field] / (8 if per_token else 1)


def targets(results: dict) -> list[dict]:
    """Goals of the project, set for `bwr-dnc-120m` on a CPU, in float32 and with two threads."""

    def share(what: str, length: int, name: str) -> float | None:
        entry = find(results, what, OURS, length)
        return None if entry is None else entry[name]

    def best_decode_share() -> float | None:
        shares = [e["bandwidth_share"] for e in results["measurements"] if (e["what"], e["model"]) == ("decode", OURS)]
        return max(shares) if shares else None

    cold = speed_ratio(results, "cold", 8)
    claims = [
        Claim("training tokens/s at 8,192", 1.5, True, speed_ratio(results, "train", 8192)),
        Claim(
            "training peak memory at 8,192, checkpointing on", 0.6, False, memory_ratio(results, 8192, OWN_LOSS_CHECKPOINTED)
        ),
        Claim("the same, checkpointing off", 0.75, False, memory_ratio(results, 8192, OWN_LOSS)),
        Claim("the same, chunked loss on both", 1.05, False, memory_ratio(results, 8192, CHUNKED_ON_BOTH)),
        Claim("training tokens/s at 512", 0.95, True, speed_ratio(results, "train", 512)),
        Claim("training tokens/s at 2,048", 0.95, True, speed_ratio(results, "train", 2048)),
        Claim("prefill tokens/s at 32,768", 4.0, True, speed_ratio(results, "prefill", 32768)),
        Claim("decode tokens/s after 8,192", 1.39, True, speed_ratio(results, "decode", 8192)),
        Claim("decode tokens/s after 32,768", 3.0, True, speed_ratio(results, "decode", 32768)),
        Claim("decode tokens/s after 512", 0.95, True, speed_ratio(results, "decode", 512)),
        Claim(
            "cost per token, reading 131,072 against 16,384", 1.05, False, _long_against_short(results, "seconds", True)
        ),
        Claim(
            "peak memory, reading 131,072 against 16,384", 1.1, False, _long_against_short(results, "peak_bytes", False)
        ),
        Claim("share of the GEMM rate, training at 2,048", 0.7, True, share("train", 2048, "gemm_share"), ""),
        Claim("share of the memory bandwidth, decode (best length)", 0.6, True, best_decode_share(), ""),
        Claim("import, load and first token", 1.05, False, None if cold is None else 1 / cold),
    ]  # fmt: skip
    return [claim.as_dict() for claim in claims]


# What BWR-DNC was announced with, against a transformer of the same size.
ANNOUNCED_LENGTH = 8192
ANNOUNCED_CONTEXT_GB = {2048: 1.8, 8192: 2.3, 32768: 3.1, 131072: 4.2}


def announced(results: dict) -> list[dict]:
    def peak_gb(length: int) -> float | None:
        entry = find(results, "memory", OURS, length, variant="reading")
        return None if entry is None else entry["peak_bytes"] / 1e9

    claims = [
        Claim("training tokens/s", 1.5, True, speed_ratio(results, "train", ANNOUNCED_LENGTH)),
        Claim("training memory", 0.74, False, memory_ratio(results, ANNOUNCED_LENGTH, OWN_LOSS)),
        Claim("generation tokens/s", 1.39, True, speed_ratio(results, "decode", ANNOUNCED_LENGTH)),
    ]
    claims += [
        Claim(f"memory at a context of {length:,}", bound, False, peak_gb(length), " GB")
        for length, bound in ANNOUNCED_CONTEXT_GB.items()
    ]
    return [claim.as_dict() for claim in claims]


def summarize(results: dict) -> dict:
    """`results` with ratios, slopes and verdicts."""
    ratios = []
    for entry in results["measurements"]:
        if entry["model"] == FULL or entry["what"] == "memory":
            continue
        value = speed_ratio(results, entry["what"], entry["length"], entry["batch_size"], entry["model"])
        if value is not None:
            key = {name: entry[name] for name in ("what", "model", "length", "batch_size")}
            ratios.append(key | {"times_llama": value})
    slopes = [
        {"what": what, "model": model, "slope": slope(results, what, model)}
        for what in TITLES
        for model in results["settings"]["models"]
        if slope(results, what, model) is not None
    ]
    return results | {"ratios": ratios, "slopes": slopes, "targets": targets(results), "announced": announced(results)}


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def markdown(results: dict, picture: str | None = None) -> str:
    """A report; `results` come from `summarize`."""
    parts = ["# Benchmark", _conditions(results)]
    if picture is not None:
        parts.append(f"![tokens per second and memory over length]({picture})")
    for what, title in TITLES.items():
        parts += _speed_section(results, what, title)
    parts += _memory_section(results) + _cold_section(results)
    if results["slopes"]:
        rows = [[row["what"], row["model"], f"{row['slope']:.2f}"] for row in results["slopes"]]
        parts += [
            "## Growth with length",
            "Exponent of the time of a step, of a prompt, or of one decoded token over length (1 is linear in the first two, 0 is "
            "constant in the last).",
            table(["", "model", "exponent"], rows),
        ]
    for name, title, note in (
        (
            "announced",
            "What it was announced with",
            f"At 120 million parameters. The announcement names no length for the first three, taken here at {ANNOUNCED_LENGTH:,}, "
            "and no model for the others.",
        ),
        ("targets", "Targets", "Set for `bwr-dnc-120m` on a CPU, in float32 and with two threads."),
    ):
        rows = [
            [row["figure"], row["bound"], "" if row["found"] is None else f"{row['found']:.2f}", row["verdict"]]
            for row in results[name]
        ]
        if any(row["found"] is not None for row in results[name]):
            parts += [f"## {title}", note, table(["figure", "bound", "found", "verdict"], rows)]
    if results["skipped"]:
        rows = [
            [f"{row['what']} {row.get('note', '')}", row["model"], f"{row['length']:,}", str(row["batch_size"]), row["reason"]]
            for row in results["skipped"]
        ]  # fmt: skip
        parts += ["## Not measured", table(["", "model", "length", "batch", "reason"], rows)]
    return "\n\n".join(parts) + "\n"


def _conditions(results: dict) -> str:
    machine, settings, limits = results["machine"], results["settings"], results["limits"]
    others = results["share_of_processors_used_by_others"]
    lines = [
        f"`{results['command']}`",
        f"Commit {machine['commit']}, {machine['date']}. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; device {machine['device']}, {settings['dtype']}, {machine['threads']} threads; Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        f"Measured limits of the machine: {limits['gemm_flops'] / 1e9:.0f} GFLOP/s in matrix products, "
        f"{limits['bandwidth_bytes'] / 1e9:.1f} GB/s of memory.",
    ]
    if settings.get("clock") == "processor":
        lines.append(
            "Seconds are those in which the process really ran, not those that passed (`--clock processor`), but for the "
            "start of a new process."
        )
    if results["parameters"]:
        lines.append(
            "Parameters: " + ", ".join(f"{name} {count:,}" for name, count in results["parameters"].items()) + "."
        )
    if others is not None and others > 0.05:
        lines.append(
            f"**The machine was shared: other processes took {others:.0%} of its processor time.** Ratios come from alternating "
            "runs and suffer less than absolute numbers, which mean little; measure again on a quiet machine."
        )
    return "\n\n".join(lines)


def _speed_section(results: dict, what: str, title: str) -> list[str]:
    entries = [entry for entry in results["measurements"] if entry["what"] == what]
    if not entries:
        return []
    models = [name for name in results["settings"]["models"] if any(entry["model"] == name for entry in entries)]
    share = "bandwidth_share" if what == "decode" else "gemm_share"
    rows = []
    for length, batch_size in sorted({(entry["length"], entry["batch_size"]) for entry in entries}):
        row = [f"{length:,} x {batch_size}"]
        for name in models:
            entry = find(results, what, name, length, batch_size)
            if entry is None:
                row.append("")
                continue
            ratio = speed_ratio(results, what, length, batch_size, name)
            once = " once" if len(entry["rounds"]) == 1 else ""
            times = "" if ratio is None or name == FULL else f" ({ratio:.2f}x{once})"
            row.append(f"{tokens_per_second(entry):,.1f}{times}, {entry[share]:.0%}")
        rows.append(row)
    limit = "memory bandwidth" if what == "decode" else "rate of matrix products"
    step = {"train": "a step", "prefill": "a prompt", "decode": "decoding after a prompt"}[what]
    note = (
        f"Tokens per second of {step} of length x batch, times that of Llama in brackets (median of the rounds, or once), share of the "
        f"machine's measured {limit}."
    )
    if what == "decode":
        longest = [f"{e['longest_token_seconds'] * 1e3:.0f} ms" for e in entries if e["model"] == OURS]
        fewest = min(entry["tokens"] for entry in entries)
        note += f" Means over {fewest} tokens or more, a segment holds one consolidation; the share is that of the median token."
        if longest:
            note += (
                f" Longest single token of {OURS}, consolidation included: {', '.join(longest)} (in order of length)."
            )
    return [f"## {title.capitalize()}", note, table(["length x batch", *models], rows)]


def tokens_per_second(entry: dict) -> float:
    tokens = entry["batch_size"] * (1 if entry["what"] == "decode" else entry["length"])
    return tokens / entry.get("mean_seconds", entry["seconds"])


def _memory_section(results: dict) -> list[str]:
    entries = [entry for entry in results["measurements"] if entry["what"] == "memory"]
    rows = []
    for variant, length in sorted({(entry["variant"], entry["length"]) for entry in entries}):
        for name in results["settings"]["models"]:
            entry = find(results, "memory", name, length, variant=variant)
            if entry is None:
                continue
            full = find(results, "memory", FULL, length, variant=variant)
            times = "" if full is None or name == FULL else f"{entry['peak_bytes'] / full['peak_bytes']:.2f}x"
            state = f"{entry['state_bytes'] / 1e6:,.1f}" if "state_bytes" in entry else ""
            rows.append([variant, f"{length:,}", name, f"{entry['peak_bytes'] / 1e9:.2f}", times, state])
    if not rows:
        return []
    note = (
        f"Peak of {_memory_measured(results)} while a model reads or takes a step, weights included. To read, {OURS} is "
        f"given the whole prompt, the others blocks of {READ_BLOCK_LENGTH:,} tokens, so that none is charged with what its "
        f"layers hold of a whole prompt for a moment. The time of a prefill is still that of one call, for {FULL} too."
    )
    if any(entry.get("peak_includes_building") for entry in entries):
        note += " The peak includes building the model: this system keeps one for the life of a process."
    header = ["each in a fresh process", "length", "model", "peak GB", "of Llama's", "state MB"]
    return ["## Memory", note, table(header, rows)]


def _memory_measured(results: dict) -> str:
    return "the process" if results["machine"]["device"] == "CPU" else "CUDA's allocator"


def _cold_section(results: dict) -> list[str]:
    entries = [entry for entry in results["measurements"] if entry["what"] == "cold"]
    names = ("import_seconds", "load_seconds", "token_seconds", "seconds")
    rows = [[entry["model"], *(f"{entry[name]:.2f}" for name in names)] for entry in entries]
    if not rows:
        return []
    return [
        "## Start of a new process, seconds",
        "Seconds that passed, by whatever clock the rest was measured.",
        table(["", "import", "load", "first token", "in all"], rows),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw(results: dict, path: str | Path) -> bool:
    """
    Save tokens per second of training, prefill and decoding, and peak memory of reading, over length.

    Returns whether there was any of it to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels: list[tuple] = [
        (what, title, "tokens per second", tokens_per_second, None) for what, title in TITLES.items()
    ]
    unit = f"peak memory of {_memory_measured(results)} (GB)"
    panels.append(("memory", "reading", unit, lambda entry: entry["peak_bytes"] / 1e9, "reading"))
    measured = {(entry["what"], entry.get("variant")) for entry in results["measurements"] if entry["batch_size"] == 1}
    panels = [panel for panel in panels if (panel[0], panel[4]) in measured]
    if not panels:
        return False
    figure = Figure(figsize=(3.75 * len(panels), 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (what, title, unit, height, variant) in zip(axes, panels):
        _draw_lines(axis, results, what, height, variant)
        axis.set(title=title, ylabel=unit, xlabel="length (tokens)")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    machine, others = results["machine"], results["share_of_processors_used_by_others"]
    shared = f", machine shared ({others:.0%} used by others)" if others is not None and others > 0.05 else ""
    on_cpu = machine["device"] == "CPU"
    device = f"{machine['processor']}, {machine['threads']} threads" if on_cpu else machine["device"]
    figure.suptitle(f"{device}, {machine['date'][:10]}{shared}", fontsize=10)
    figure.savefig(path)
    return True


def _draw_lines(axis, results: dict, what: str, height, variant: str | None = None) -> None:
    for name in (name for name in PEERS if name in results["settings"]["models"]):
        found = [
            entry
            for entry in results["measurements"]
            if (entry["what"], entry["model"], entry["batch_size"], entry.get("variant")) == (what, name, 1, variant)
        ]
        points = sorted((entry["length"], height(entry)) for entry in found)
        if points:
            axis.plot(*zip(*points), marker="o", label=name, color=COLORS[name])
