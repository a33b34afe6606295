"""What was measured, as JSON, as Markdown tables and as pictures. Only the drawing functions need matplotlib."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from ..staging import write_text
from .inspection import INK, PAPER

# Ours first; the same color and order in every picture.
POLICY_COLORS = {
    "memory": "#1f6f8b",
    "full": "#2b2d42",
    "window": "#aeb8c2",
    "equal_slot_window": "#e9a23b",
    "random": "#c8455a",
}
MORE_COLORS = ("#6a994e", "#8e6c8a", "#b08968", "#48bfe3", "#adb5bd", "#9d0208", "#606c38")
GRID_COLORS = ("#c8455a", "#f4e3c1", "#1f6f8b")


def write_report(results: dict, folder: str | Path) -> list[Path]:
    """
    Write `results.json`, `results.md`, and, where matplotlib is installed, a picture per measurement into a folder; returns the files.

    Args:
        results: `title`, `facts` (a mapping of what a reader must know, such as the command), and `measurements`: a mapping of
            names to records, lists of flat mappings with a `policy` each, and perhaps `least` and `greatest` of several seeds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "results.json", folder / "results.md"]
    write_text(written[0], json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    parts = [f"# {results['title']}", "\n".join(f"* {name}: {value}" for name, value in results["facts"].items())]
    for name, records in results["measurements"].items():
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{table(records)}")
        if records and importlib.util.find_spec("matplotlib") is not None:
            picture = folder / f"{name}.png"
            draw(records, picture, name.replace("_", " "))
            written.append(picture)
            parts.append(f"![{name}]({picture.name})")
    write_text(written[1], "\n\n".join(parts) + "\n")
    return written


def table(records: Sequence[dict]) -> str:
    """Records as a Markdown table: points down, policies across."""
    if not records:
        return "Nothing was measured: all lengths are beyond the limit of full attention."
    if "state_bytes" in records[0]:
        return _table_of_budgets(records)
    across = list(dict.fromkeys(record["policy"] for record in records))
    down = [name for name in ("slots", "pairs", "length", "depth", "kind", "start", "stop") if name in records[0]]
    value = "perplexity" if "perplexity" in records[0] else "exact"
    cells = {tuple(record[name] for name in down) + (record["policy"],): record[value] for record in records}
    points = list(dict.fromkeys(tuple(record[name] for name in down) for record in records))
    lines = [f"| {' | '.join([*down, *across])} |", f"|{'---:|' * (len(down) + len(across))}"]
    for point in points:
        values = [cells.get((*point, policy)) for policy in across]
        shown = ["–" if number is None else f"{number:.3f}" for number in values]
        lines.append(f"| {' | '.join([*map(named, point), *shown])} |")
    unit = "Perplexity by position." if value == "perplexity" else "Share of answers exactly right."
    return f"{unit}\n\n" + "\n".join(lines)


def _table_of_budgets(records: Sequence[dict]) -> str:
    lines = [
        "| policy | slots | state, MB | facts exactly right | their tokens | perplexity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        slots = "" if record["policy"] in ("full", "window") else f"{record['slots']:,}"
        numbers = f"{record['exact']:.3f} | {record['token']:.3f} | {record['perplexity']:.3f}"
        lines.append(f"| {record['policy']} | {slots} | {record['state_bytes'] / 1e6:.1f} | {numbers} |")
    answers = records[0]["answers"]
    return f"Share of {answers} facts in the text, and perplexity of its second half.\n\n" + "\n".join(lines)


def draw(records: Sequence[dict], path: str | Path, title: str) -> None:
    """A picture of a measurement: curves over length or position, or a map per policy over depth or pairs."""
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(record["policy"] for record in records))
    axes_of_maps = {"depth": ("length", "depth"), "kind": ("length", "kind"), "slots": ("pairs", "slots")}
    kind = next((name for name in axes_of_maps if name in records[0]), None)
    if "state_bytes" in records[0]:
        figure = Figure(figsize=(11, 4.6), dpi=150, facecolor=PAPER, layout="constrained")
        _draw_budgets(figure, records, policies)
    elif kind is None:
        figure = Figure(figsize=(8, 4.6), dpi=150, facecolor=PAPER, layout="constrained")
        _draw_curves(figure.subplots(), records, policies)
    else:
        width = max(3.1, 0.6 * len({record[axes_of_maps[kind][0]] for record in records}))
        figure = Figure(figsize=(width * len(policies) + 1, 3.6), dpi=150, facecolor=PAPER, layout="constrained")
        _draw_maps(figure, records, policies, *axes_of_maps[kind])
    figure.suptitle(title, color=INK, fontsize=12)
    figure.savefig(path)


def color_of(policy: str, policies: Sequence[str]) -> str:
    others = [name for name in policies if name not in POLICY_COLORS]
    return POLICY_COLORS.get(policy) or MORE_COLORS[others.index(policy) % len(MORE_COLORS)]


def named(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def shown(policy: str) -> str:
    """The name of a policy in a picture."""
    return policy.removeprefix("score:").replace("_", " ")


def _draw_line(axes, across: list, values: list, policy: str, policies: Sequence[str]) -> None:
    width, order = (2.6, 3) if policy == "memory" else (1.6, 2)
    color, label = color_of(policy, policies), shown(policy)
    axes.plot(across, values, "o-", markersize=4, color=color, label=label, linewidth=width, zorder=order)


def _draw_curves(axes, records: Sequence[dict], policies: Sequence[str]) -> None:
    is_loss = "perplexity" in records[0]
    point = "pairs" if "pairs" in records[0] else "length"
    for policy in policies:
        mine = [record for record in records if record["policy"] == policy]
        across = [(record["start"] + record["stop"]) / 2 if is_loss else record[point] for record in mine]
        values = [record["loss"] if is_loss else record["exact"] for record in mine]
        _draw_line(axes, across, values, policy, policies)
        if "least" in mine[0]:
            ends = [[record[name] for record in mine] for name in ("least", "greatest")]
            axes.fill_between(across, *ends, color=color_of(policy, policies), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(
        "position (tokens)" if is_loss else {"pairs": "pairs in a row", "length": "length (tokens)"}[point], color=INK
    )
    axes.set_ylabel("loss (nats per token)" if is_loss else "answers exactly right", color=INK)
    if not is_loss:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _draw_budgets(figure, records: Sequence[dict], policies: Sequence[str]) -> None:
    labels = {"exact": "facts exactly right", "perplexity": "perplexity of the second half"}
    for axes, value in zip(figure.subplots(1, 2), labels):
        for policy in policies:
            mine = sorted((r for r in records if r["policy"] == policy), key=lambda r: r["state_bytes"])
            across = [record["state_bytes"] / 1e6 for record in mine]
            _draw_line(axes, across, [record[value] for record in mine], policy, policies)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("state (MB)", color=INK)
        axes.set_ylabel(labels[value], color=INK)
        axes.grid(alpha=0.25)
        _tidy(axes)
    figure.axes[0].set_ylim(-0.03, 1.03)
    figure.axes[1].legend(frameon=False, fontsize=8)


def _draw_maps(figure, records: Sequence[dict], policies: Sequence[str], across: str, down: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("grid", GRID_COLORS)
    columns = sorted({record[across] for record in records})
    rows = list(dict.fromkeys(record[down] for record in records))
    rows = rows if down == "kind" else sorted(rows, reverse=down == "slots")
    for axes, policy in zip(figure.subplots(1, len(policies), squeeze=False)[0], policies):
        grid = [[float("nan")] * len(columns) for _ in rows]
        for record in records:
            if record["policy"] == policy:
                grid[rows.index(record[down])][columns.index(record[across])] = record["exact"]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap=colors, aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    ink = INK if 0.2 < value < 0.8 else PAPER
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(len(columns)), map(named, columns), fontsize=7)
        axes.set_yticks(range(len(rows)), map(named, rows), fontsize=7)
        axes.set_xlabel(across, color=INK, fontsize=9)
        axes.set_title(shown(policy), color=INK, fontsize=10)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(down, color=INK, fontsize=9)
        _tidy(axes)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="answers exactly right")


def _tidy(axes) -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
