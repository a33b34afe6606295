"""Looking into a StateBank: a table of what it holds, a picture of it, and a picture of the text it still knows.

Only the drawing functions need matplotlib. Shapes: `R` rows of the map, one per layer and key/value head, `P` source
positions, `K` columns of a picture.
"""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_bwr_dnc.state_bank import StateBankCache

LEVEL_NAMES = ("raw", "2x", "4x")
LEVEL_COLORS = ("#1f6f8b", "#e9a23b", "#c8455a")
WINDOW_COLOR = "#aeb8c2"
SINK_COLOR = "#2b2d42"
INK = "#22252b"
PAPER = "#fbfaf7"


def report_table(cache: StateBankCache, row: int = 0) -> str:
    """`cache.memory_report()` of one row as a table: a line per layer, and for each level the slots used, the mean age in
    tokens, the mean usage and the mean salience.

    Raises:
        ValueError: if the memory has no slots, or holds nothing in them yet.
    """
    _held_slots(cache, row)
    report = [entry for entry in cache.memory_report() if entry["row"] == row]
    header = ["layer"]
    for name in LEVEL_NAMES:
        header += [f"{name} slots", "age", "usage", "salience"]
    lines = [header]
    for layer in sorted({entry["layer"] for entry in report}):
        cells = [str(layer)]
        for entry in sorted((e for e in report if e["layer"] == layer), key=lambda e: e["level"]):
            cells += [f"{entry['used']}/{entry['capacity']}", f"{entry['age']:,.0f}"]
            cells += [f"{entry['usage']:.4f}", f"{entry['salience']:+.4f}"]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])


def draw_memory(cache: StateBankCache, path: str | Path, row: int = 0) -> None:
    """Save a picture of the memory of one row: where in the past the slots of each layer come from, and per layer and level
    how many there are, how old, how used and how salient.

    Raises:
        ValueError: if the memory has no slots, or holds nothing in them yet.
    """
    from matplotlib.figure import Figure

    held = _held_slots(cache, row)
    seen, report = cache.rows[row].seen, [entry for entry in cache.memory_report() if entry["row"] == row]
    layers = sorted({entry["layer"] for entry in report})
    figure = Figure(figsize=(16, max(5.0, 0.24 * len(layers) + 2.2)), dpi=130, facecolor=PAPER, layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=(6.2, 1, 1, 1, 1))

    image = _memory_map(cache, held, layers, row)
    axes[0].imshow(image, aspect="auto", interpolation="nearest", extent=(0, seen, len(layers) - 0.5, -0.5))
    axes[0].set_xlabel("position in the text (tokens)", color=INK)
    axes[0].set_ylabel("layer, and in it the key/value heads", color=INK)
    axes[0].set_title("where the memory comes from", fontsize=10, color=INK)
    _draw_slot_counts(axes[1], report, layers)
    for axis, (name, title) in zip(
        axes[2:], {"age": "mean age (tokens)", "usage": "mean usage", "salience": "mean salience (logit)"}.items()
    ):
        _draw_means(axis, report, name, title)
    for index, axis in enumerate(axes):
        axis.set_ylim(len(layers) - 0.5, -0.5)
        axis.set_yticks(range(len(layers)), layers if index == 0 else [""] * len(layers), fontsize=8)
        axis.set_facecolor(PAPER)
        axis.tick_params(length=0, colors=INK, labelsize=8)
        axis.spines[:].set_visible(False)
    _draw_legend(figure)
    megabytes = cache.nbytes / len(cache.rows) / 2**20
    figure.suptitle(
        f"StateBank after {seen:,} tokens: {_source_count(held):,} of them still in a slot of some head, {megabytes:.1f} MiB",
        fontsize=15, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.savefig(path)


def draw_held_text(cache: StateBankCache, tokenizer: PreTrainedTokenizerBase, path: str | Path, row: int = 0) -> None:
    """Save a picture of the text that the memory of one row still holds outside its window.

    Above, for every position the share of all layers and heads that hold it in a slot (a compressed slot counts by its
    share of the sources). Below, the passages held best, one from each third of the text; the darker a token, the larger
    its share; dots stand for tokens that no slot holds.

    Raises:
        ValueError: if the memory has no slots, or holds nothing in them yet.
    """
    from matplotlib.figure import Figure

    held = _held_slots(cache, row)
    window_start = cache.rows[row].window_start
    share, token_ids = _shares(held, window_start)
    passages = _best_passages(share, count=3, span=360)

    # Inches. Text is monospaced: its size follows from the width of a column.
    width, height, margin, gap = 18.0, 6.7, 0.55, 0.45
    passage_width = (width - 2 * margin - 2 * gap) / 3
    figure = Figure(figsize=(width, height), dpi=120, facecolor=PAPER)

    def axis_at(left: float, bottom: float, wide: float, high: float):
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    strip = axis_at(margin + 0.3, height - 2.05, width - 2 * margin - 0.3, 1.3)
    _draw_share_strip(strip, share, passages, cache.rows[row].seen)
    for index, (start, stop) in enumerate(passages):
        axis = axis_at(margin + index * (passage_width + gap), 0.25, passage_width, height - 3.0)
        pieces = _pieces(tokenizer, token_ids[start:stop], share[start:stop])
        _draw_passage(axis, pieces, passage_width, height - 3.0, f"tokens {start:,} to {stop:,}", share.max())
    figure.text(
        margin / width, 1 - 0.42 / height,
        f"The text still held: {np.count_nonzero(share):,} of the {window_start:,} tokens outside the window are in a slot of "
        f"at least one of {len({(slot['layer'], slot['head']) for slot in held})} heads",
        fontsize=15, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.savefig(path)


def _held_slots(cache: StateBankCache, row: int) -> list[dict]:
    if not 0 <= row < len(cache.rows):
        raise ValueError(f"the memory has {len(cache.rows)} rows; there is no row {row}")
    if not any(any(state.settings.memory_slots) for state in cache.states):
        raise ValueError(
            "the memory has no slots, only sinks and a window, so there is nothing to look into; read with `memory_slots` "
            "above 0 in a layer with a bank"
        )
    held = cache.tokens(row)
    if not held:
        raise ValueError(
            f"the memory holds nothing in its slots yet: all {cache.rows[row].seen} tokens that it has read are still in its "
            "sinks or its window; read a longer text"
        )
    return held


def _source_count(held: list[dict]) -> int:
    return len({position for slot in held for position in slot["positions"]})


def _memory_map(
    cache: StateBankCache, held: list[dict], layers: list[int], row: int, columns: int = 1100
) -> np.ndarray:
    """RGB picture [R, K, 3]: each cell is coloured by the levels that hold its positions, paler where few are held."""
    seen, window_start = cache.rows[row].seen, cache.rows[row].window_start
    num_sinks = min(cache.states[0].settings.num_sink_tokens, window_start)
    heads = 1 + max(slot["head"] for slot in held)
    columns = min(columns, seen)
    tokens_per_column = seen / columns
    weights = np.zeros((len(layers) * heads, columns, len(LEVEL_NAMES)))
    index = {layer: place for place, layer in enumerate(layers)}
    for slot in held:
        for position in slot["positions"]:
            weights[index[slot["layer"]] * heads + slot["head"], int(position / tokens_per_column), slot["level"]] += 1
    strength = np.sqrt(np.minimum(weights.sum(-1) / tokens_per_column, 1))[..., None]  # [R, K, 1]
    colors = np.array([_rgb(color) for color in LEVEL_COLORS])
    mixed = weights @ colors / np.maximum(weights.sum(-1), 1e-9)[..., None]
    image = strength * mixed + (1 - strength) * _rgb(PAPER)
    image[:, int(window_start / tokens_per_column) :] = _rgb(WINDOW_COLOR)
    image[:, : int(np.ceil(num_sinks / tokens_per_column))] = _rgb(SINK_COLOR)
    return image


def _rgb(color: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array(to_rgb(color))


def _draw_slot_counts(axis, report: list[dict], layers: list[int]) -> None:
    left = np.zeros(len(layers))
    for level, color in enumerate(LEVEL_COLORS):
        used = np.array([entry["used"] for entry in report if entry["level"] == level], dtype=float)
        axis.barh(range(len(layers)), used, left=left, color=color, height=0.72)
        left += used
    axis.set_title("slots per head", fontsize=10, color=INK)


def _draw_means(axis, report: list[dict], name: str, title: str) -> None:
    for level, color in enumerate(LEVEL_COLORS):
        entries = [entry for entry in report if entry["level"] == level]
        places = [place for place, entry in enumerate(entries) if entry["used"]]
        axis.plot(
            [entries[place][name] for place in places], places, color=color, marker="o", markersize=4, linewidth=1
        )
    axis.grid(axis="y", color="#e3e0d8", linewidth=0.6)
    axis.set_title(title, fontsize=10, color=INK)
    axis.locator_params(axis="x", nbins=3)


def _draw_legend(figure) -> None:
    from matplotlib.patches import Patch

    shown = [Patch(color=color, label=f"{name} slots") for name, color in zip(LEVEL_NAMES, LEVEL_COLORS)]
    shown += [Patch(color=WINDOW_COLOR, label="exact window"), Patch(color=SINK_COLOR, label="sinks")]
    shown.append(Patch(facecolor=PAPER, edgecolor="#d5d2c8", label="forgotten here"))
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)


def _shares(held: list[dict], num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """`(share, token_ids)`, both [P]: how much of all layers and heads holds a position, and its token (-1: unknown)."""
    share, token_ids = np.zeros(num_positions), np.full(num_positions, -1)
    banks = len({(slot["layer"], slot["head"]) for slot in held})
    for slot in held:
        for position, token_id in zip(slot["positions"], slot["token_ids"]):
            share[position] += 1 / len(slot["positions"]) / banks
            token_ids[position] = token_id
    return share, token_ids


def _best_passages(share: np.ndarray, count: int, span: int) -> list[tuple[int, int]]:
    """`(start, stop)` of the passages of `span` positions held best, one in each of `count` equal parts of the text."""
    count = max(1, min(count, len(share) // span))
    sums = np.concatenate([[0.0], np.cumsum(share)])
    passages = []
    for part in np.array_split(np.arange(len(share)), count):
        starts = np.arange(part[0], max(part[0], part[-1] + 1 - span) + 1)
        stops = np.minimum(starts + span, len(share))
        best = np.argmax(sums[stops] - sums[starts])
        passages.append((int(starts[best]), int(stops[best])))
    return passages


def _draw_share_strip(axis, share: np.ndarray, passages: list[tuple[int, int]], seen: int) -> None:
    width = max(1, len(share) // 900)
    means = share[: len(share) // width * width].reshape(-1, width).mean(1)
    axis.fill_between(np.arange(len(means)) * width, 100 * means, step="post", color=LEVEL_COLORS[0], linewidth=0)
    axis.axvspan(len(share), seen, color=WINDOW_COLOR, alpha=0.6, linewidth=0)
    axis.text((len(share) + seen) / 2, 0.96, "exact window", transform=axis.get_xaxis_transform(), rotation=90,
              ha="center", va="top", fontsize=8, color=INK)  # fmt: skip
    for start, stop in passages:
        axis.plot((start, stop), (0, 0), color=LEVEL_COLORS[2], linewidth=4, solid_capstyle="butt", clip_on=False)
    axis.set_xlim(0, seen)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("% of layers\nand heads", color=INK)
    axis.set_xlabel("position in the text (tokens); the passages marked red are shown below", fontsize=9, color=INK)
    axis.set_facecolor(PAPER)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8)


def _pieces(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray, share: np.ndarray) -> list[tuple[str, float]]:
    """`(text, share)` of each token; a run of unknown tokens becomes one piece of dots with share 0."""
    pieces, is_gap = [], False
    for token_id, weight in zip(token_ids.tolist(), share.tolist()):
        if token_id >= 0:
            pieces.append((tokenizer.decode([token_id]), weight))
        elif not is_gap:
            pieces.append((" ··· ", 0.0))
        is_gap = token_id < 0
    return pieces


def _draw_passage(
    axis, pieces: list[tuple[str, float]], width: float, height: float, title: str, full: float, columns: int = 78
) -> None:
    """Monospaced text on an axis of `width` x `height` inches, each piece on a background as dark as its share of `full`."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    font_size = 72 * width / columns / 0.602  # points; a letter of DejaVu Sans Mono is 0.602 of its size wide
    num_lines = int(72 * height / (1.55 * font_size))
    shades = LinearSegmentedColormap.from_list("held", [PAPER, "#cfe3e6", "#5ba3b0", LEVEL_COLORS[0]])
    axis.set_xlim(0, columns)
    axis.set_ylim(num_lines, 0)
    axis.axis("off")
    axis.set_title(title, loc="left", fontsize=9, color=LEVEL_COLORS[2])
    line = column = 0
    for text, weight in pieces:
        shade = weight / full
        for part in _wrap(text, columns):
            if part == "\n" or column + len(part) > columns:
                line, column = line + (column > 0), 0
            if line >= num_lines:
                return
            if part == "\n":
                continue
            axis.add_patch(Rectangle((column, line), len(part), 0.94, facecolor=shades(shade), linewidth=0))
            color = PAPER if shade > 0.75 else INK if weight else "#a9a59b"
            axis.text(column, line + 0.52, part, family="DejaVu Sans Mono", fontsize=font_size, color=color, va="center",
                      parse_math=False)  # fmt: skip
            column += len(part)


def _wrap(text: str, columns: int) -> list[str]:
    """`text` cut at its line breaks, which become parts of their own, and into parts of at most `columns` characters."""
    parts = []
    for index, stretch in enumerate(text.replace("\t", "    ").split("\n")):
        if index:
            parts.append("\n")
        clean = "".join(letter if letter.isprintable() else "·" for letter in stretch)
        parts += [clean[i : i + columns] for i in range(0, len(clean), columns)]
    return parts
