"""Plots: data in, PNG out. matplotlib is imported when something is drawn, and needs no display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lightseq.schedule.ir import DATAFLOW, Move, Tile
from megatron_lightseq.schedule.schedule import Schedule
from megatron_lightseq.schedule.simulate import simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _GREY, _FAINT = "#1f2430", "#7a8290", "#e7e9ee"
_LOSS, _MEAN, _ENTROPY, _VALID = "#9db8dd", "#1f5fa8", "#c2571a", "#2f8f5b"
_MOVE_COLOURS = {"k": "#8b93a1", "q": "#6a4fb0", "result": "#c2571a"}
_BAR = 0.56
"""Height of a bar, as a fraction of its lane."""
_DPI = 160


def draw_loss(metrics: Sequence[Any], entropy: float | None, path: Path | str) -> None:
    """Plot the loss by step, its running mean, validation losses, and the unigram entropy as a line to beat.

    Args:
        metrics: TrainMetrics and ValidationMetrics (objects with ``step`` and ``loss``), in order of steps.
        entropy: unigram entropy in nats per token, or None if it is not known.
        path: PNG file to write.
    """
    checks = [m for m in metrics if hasattr(m, "num_tokens")]
    steps = [m for m in metrics if not hasattr(m, "num_tokens")]
    figure, axes = _figure(8.0, 4.5)
    x, y = [m.step for m in steps], [m.loss for m in steps]
    axes.plot(x, y, color=_LOSS, linewidth=1.0, label="training, every step")
    if len(y) > 20:
        axes.plot(x, _running_mean(y, max(5, len(y) // 25)), color=_MEAN, linewidth=2.0, label="running mean")
    if checks:
        axes.plot(
            [m.step for m in checks],
            [m.loss for m in checks],
            color=_VALID,
            marker="o",
            markersize=5,
            linewidth=1.2,
            label="validation",
        )
    if entropy is not None:
        axes.axhline(entropy, color=_ENTROPY, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"unigram entropy {entropy:.2f} (token frequencies only)",
            xy=(1.0, entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
            color=_ENTROPY,
            fontsize=9,
        )
    _label_last(axes, x, y)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="y", color=_FAINT)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    _save(figure, path)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """At every position, the mean of the last ``width`` values, or of as many as there are."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def _label_last(axes: Axes, x: Sequence[int], y: Sequence[float]) -> None:
    if not x:
        return
    tail = y[-10:]
    mean = sum(tail) / len(tail)
    axes.annotate(
        f"{mean:.2f}",
        xy=(x[-1], mean),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=_MEAN,
        fontsize=11,
        fontweight="bold",
        annotation_clip=False,
    )


# ---- schedules ------------------------------------------------------------------------------------------------


def draw_schedule(schedule: Schedule, path: Path | str) -> None:
    """Draw which rank computes what at which time: a lane for every rank, bars for tiles, arrows for transfers.

    The length of a bar is the work of its tiles, and its colour is that of the rank that owns the queries; work for
    another rank is darker and framed. Hatching marks tiles on the diagonal of the mask. An arrow starts where its
    step begins and ends where the next step begins, since transfers run concurrently with the tiles of their step.
    The unit of time is one whole tile: one rank's queries against one rank's keys.

    Args:
        schedule: any valid schedule.
        path: PNG file to write.
    """
    played = simulate(schedule)
    num_ranks = schedule.layout.cp_size
    span = max(played.makespan_s, 1e-9)
    width, height = max(8.0, min(19.0, 2.4 + 1.9 * span)), 2.1 + 0.66 * num_ranks
    figure, axes = _figure(width, height)
    canvas = _Canvas(axes=axes, colours=_rank_colours(num_ranks), inches_per_unit=(width - 1.4) / span)
    pair_s = (num_ranks / schedule.seq_length) ** 2  # as simulate counts by default
    for t, step in enumerate(schedule.steps):
        for rank in range(num_ranks):
            start = played.steps[t][rank][0]
            for owner, tiles in _by_owner(schedule, step.tiles[rank]):
                length = sum(map(schedule.areas, tiles)) * pair_s
                canvas.bar(rank, owner, tiles, start, length)
                start += length
        ends = [row[0] for row in played.steps[t + 1]] if t + 1 < len(schedule.steps) else [span] * num_ranks
        for (payload_kind, src, dst), _ in _merge_moves(schedule, step.moves).items():
            canvas.arrow(payload_kind, src, dst, played.steps[t][src][0], ends[dst])
        _step_label(axes, t, [row[0] for row in played.steps[t]], ends)
    _frame(axes, num_ranks, span)
    _titles(
        axes,
        schedule,
        f"{played.busy:.0%} busy, {played.makespan_s:.3g} tiles long (ideal {played.ideal_s:.3g})",
    )
    _legend(axes, schedule, width, height)
    _save(figure, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Canvas:
    """Draws bars and arrows in the coordinates (time, rank)."""

    axes: Axes
    colours: list[Any]
    inches_per_unit: float

    def bar(self, rank: int, owner: int, tiles: Sequence[Tile], start: float, length: float) -> None:
        """Tiles that one rank computes in a row for one owner."""
        helped = owner != rank
        diagonal = all(tile.q == tile.k for tile in tiles)
        gap = min(0.03 / self.inches_per_unit, length / 3)
        self.axes.barh(
            rank,
            length - gap,
            left=start + gap / 2,
            height=_BAR,
            color=self.colours[owner] if helped else _tint(self.colours[owner], 0.45),
            edgecolor=_INK if helped else self.colours[owner],
            linewidth=1.4 if helped else 0.9,
            hatch="////" if diagonal else None,
            zorder=3,
        )
        room = (length - gap) * self.inches_per_unit
        text, size = _fit_label(tiles, room)
        if text:
            self.axes.text(
                start + length / 2,
                rank,
                text,
                ha="center",
                va="center",
                fontsize=size,
                color="white" if helped else _INK,
                fontweight="bold" if helped else "normal",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
                if diagonal
                else None,
                zorder=5,
            )

    def arrow(self, kind: str, src: int, dst: int, begin: float, end: float) -> None:
        """One transfer, or several of a kind between the same two ranks."""
        down = 1 if dst > src else -1
        self.axes.annotate(
            "",
            xy=(end, dst - down * _BAR / 2),
            xytext=(begin + 0.12 * (end - begin), src + down * _BAR / 2),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.16,head_length=0.3",
                "color": _MOVE_COLOURS[kind],
                "linewidth": 1.1 if len(self.colours) <= 8 else 0.8,
                "alpha": 0.9 if len(self.colours) <= 8 else 0.65,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=2 if abs(dst - src) > 1 else 4,
        )


def _by_owner(schedule: Schedule, tiles: Sequence[Tile]) -> list[tuple[int, list[Tile]]]:
    """The tiles of one rank and step, grouped by the owner of their queries; diagonal tiles are separate groups."""
    groups: dict[tuple[int, bool], list[Tile]] = {}
    for tile in tiles:
        groups.setdefault((schedule.layout.owner[tile.q], tile.q == tile.k), []).append(tile)
    return [(owner, group) for (owner, _), group in groups.items()]


def _merge_moves(schedule: Schedule, moves: Sequence[Move]) -> dict[tuple[str, int, int], int]:
    """The number of moves of each kind from each rank to each other rank."""
    flow = DATAFLOW[schedule.direction]
    merged: dict[tuple[str, int, int], int] = {}
    for move in moves:
        kind = "q" if move.payload == flow.q_input else "k" if move.payload == flow.k_input else "result"
        merged[kind, move.src, move.dst] = merged.get((kind, move.src, move.dst), 0) + 1
    return merged


def _fit_label(tiles: Sequence[Tile], room_in: float) -> tuple[str, float]:
    """A label for the tiles that fits into ``room_in`` inches, with its font size; empty if none fits."""
    queries = sorted({chunk for tile in tiles for chunk in tile.q_chunks})
    keys = sorted({chunk for tile in tiles for chunk in tile.k_chunks})
    whole_block = sum(tile.queries * tile.keys for tile in tiles) == len(queries) * len(keys)
    short = f"q{_ranges(queries)}\u00b7k{_ranges(keys)}" if whole_block else " ".join(map(str, tiles))
    for size in (9.0, 7.5):
        if len(short) * size * 0.0086 < room_in:
            return short, size
    return "", 0.0


def _ranges(numbers: Sequence[int]) -> str:
    """``[6, 7]`` as ``6-7``, ``[1, 6]`` as ``1,6``."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def _step_label(axes: Axes, t: int, starts: Sequence[float], ends: Sequence[float]) -> None:
    """Write the step's number above its bars, and draw a line if all ranks begin it together."""
    axes.text(
        (max(starts) + max(ends)) / 2, -0.62, f"step {t}", ha="center", va="bottom", fontsize=8, color=_GREY
    )
    if t and max(starts) - min(starts) < 1e-9:
        axes.axvline(min(starts), color=_FAINT, linewidth=1.0, zorder=0)


def _frame(axes: Axes, num_ranks: int, span: float) -> None:
    for rank in range(num_ranks):
        axes.barh(rank, span, height=_BAR, color="#f6f7f9", edgecolor="none", zorder=1)
    axes.set_ylim(num_ranks - 0.4, -0.75)
    axes.set_xlim(-0.01 * span, 1.015 * span)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time, in whole tiles", color=_GREY, fontsize=9)


def _titles(axes: Axes, schedule: Schedule, figures: str) -> None:
    layout = schedule.layout
    axes.set_title(
        f"{schedule.method} {schedule.direction} on {layout.cp_size} ranks: {figures}",
        loc="left",
        fontsize=12,
        fontweight="bold",
        color=_INK,
        pad=12,
    )


def _legend(axes: Axes, schedule: Schedule, width: float, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    flow = DATAFLOW[schedule.direction]
    names = {
        "k": str(flow.k_input),
        "q": str(flow.q_input),
        "result": "/".join(str(payload) for payload in (flow.q_result, flow.k_result) if payload is not None),
    }
    used = {key[0] for step in schedule.steps for key in _merge_moves(schedule, step.moves)}
    owner = schedule.layout.owner
    helps = any(
        owner[t.q] != rank for s in schedule.steps for rank, tiles in enumerate(s.tiles) for t in tiles
    )
    handles: list[Any] = [Patch(facecolor="#c9ced8", edgecolor=_GREY, label="own queries")]
    if helps:
        label = "for another rank, in its colour"
        handles.append(Patch(facecolor=_GREY, edgecolor=_INK, linewidth=1.4, label=label))
    handles.append(Patch(facecolor="white", edgecolor=_GREY, hatch="////", label="diagonal"))
    handles += [
        Line2D([], [], color=_MOVE_COLOURS[kind], label=f"{names[kind]} moves")
        for kind in names
        if kind in used
    ]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.62 / height),
        ncols=len(handles) if width > 9 else 3,
        frameon=False,
        fontsize=9,
    )


def _rank_colours(num_ranks: int) -> list[Any]:
    """One colour per rank, dark enough for white text, with different colours for neighbours."""
    import colorsys

    from matplotlib import colormaps

    if num_ranks <= 10:
        return [colormaps["tab10"](rank)[:3] for rank in range(num_ranks)]
    return [colorsys.hls_to_rgb(rank / num_ranks, (0.36, 0.48)[rank % 2], 0.52) for rank in range(num_ranks)]


def _tint(colour: Any, keep: float) -> tuple[float, ...]:
    """The colour blended with white; ``keep`` is the share of the colour."""
    return tuple(1.0 - keep * (1.0 - channel) for channel in colour)


# ---- common ---------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure that needs neither a display nor pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.spines["left"].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def _save(figure: Figure, path: Path | str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
