from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule import Schedule, build
from megatron_lightseq.training.reporting import plots
from megatron_lightseq.training.reporting.metrics import ValidationMetrics
from tests.training.test_progress import metrics


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects figures instead of writing files."""
    kept: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, _path: kept.append(figure))
    return kept


def schedule(method: str, cp_size: int, direction: str = "forward") -> Schedule:
    layout = SequenceLayout("zigzag" if method == "zigzag" else "contiguous", cp_size)
    return build(method, layout, direction=direction, seq_length=128 * cp_size)


def bars(figure: Any) -> list[Any]:
    """The rectangles of tiles: (rank, start, length)."""
    return [
        (round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width())
        for bar in figure.axes[0].patches
        if bar.get_zorder() == 3
    ]


@pytest.mark.parametrize("method", ["lightseq", "zigzag", "ring"])
@pytest.mark.parametrize("cp_size", [2, 3, 4, 5, 8, 16])
def test_bars_hold_all_the_work_and_do_not_overlap(figures: list[Any], method: str, cp_size: int) -> None:
    drawn = schedule(method, cp_size)
    plots.draw_schedule(drawn, "unused.png")
    found = bars(figures[0])
    pairs = sum(drawn.work.values()) * (cp_size / drawn.seq_length) ** 2
    gaps = 0.03 * len(found)
    assert sum(length for _, _, length in found) == pytest.approx(pairs, abs=gaps)
    for rank in range(cp_size):
        lane = sorted((start, start + length) for r, start, length in found if r == rank)
        assert lane
        assert all(end <= start for (_, end), (start, _) in pairwise(lane))


def test_title_tells_the_busy_fraction(figures: list[Any]) -> None:
    plots.draw_schedule(schedule("ring", 8), "unused.png")
    plots.draw_schedule(schedule("lightseq", 8), "unused.png")
    titles = [figure.axes[0].get_title(loc="left") for figure in figures]
    assert titles[0] == "ring forward on 8 ranks: 53% busy, 7.5 tiles long (ideal 4)"
    assert titles[1] == "lightseq forward on 8 ranks: 100% busy, 4 tiles long (ideal 4)"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_arrow_for_every_pair_of_ranks_that_talks_in_a_step(figures: list[Any], direction: str) -> None:
    drawn = schedule("lightseq", 5, direction)
    plots.draw_schedule(drawn, "unused.png")
    from matplotlib.colors import to_hex
    from matplotlib.text import Annotation

    arrows = [a for a in figures[0].axes[0].texts if isinstance(a, Annotation) and a.arrow_patch is not None]
    kinds = {"q": "q", "qdo": "q", "kv": "k"}
    expected = {
        (t, kinds.get(move.payload, "result"), move.src, move.dst)
        for t, step in enumerate(drawn.steps)
        for move in step.moves
    }
    drawn_kinds = Counter(to_hex(arrow.arrow_patch.get_edgecolor()) for arrow in arrows)
    assert drawn_kinds == Counter(plots._MOVE_COLOURS[kind] for _, kind, _, _ in expected)
    assert len(drawn_kinds) == 3


def test_help_has_the_colour_of_the_helped(figures: list[Any]) -> None:
    drawn = schedule("lightseq", 3)
    plots.draw_schedule(drawn, "unused.png")
    colours = plots._rank_colours(3)
    helped = {
        (rank, drawn.layout.owner[tile.q])
        for step in drawn.steps
        for rank, tiles in enumerate(step.tiles)
        for tile in tiles
        if drawn.layout.owner[tile.q] != rank
    }
    full = {
        (round(bar.get_y() + bar.get_height() / 2), colours.index(bar.get_facecolor()[:3]))
        for bar in figures[0].axes[0].patches
        if bar.get_zorder() == 3 and bar.get_facecolor()[:3] in colours
    }
    assert full == helped
    assert helped


def test_colours_of_many_ranks_differ() -> None:
    for num_ranks in (1, 2, 10, 11, 16, 64):
        assert len(set(plots._rank_colours(num_ranks))) == num_ranks


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([6, 7], "6-7"), ([1, 6], "1,6"), ([1, 2, 3], "1-3")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert plots._ranges(numbers) == text


def test_loss_curve_validation_and_entropy_are_drawn(figures: list[Any]) -> None:
    history: list[Any] = [metrics(step, loss=5.0 - step / 20) for step in range(1, 41)]
    history += [
        ValidationMetrics(step=20, loss=4.2, num_tokens=8),
        ValidationMetrics(step=40, loss=3.1, num_tokens=8),
    ]
    plots.draw_loss(history, 3.3, "unused.png")
    axes = figures[0].axes[0]
    curves = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(curves["training, every step"]) == [m.loss for m in history[:40]]
    assert list(curves["validation"]) == [4.2, 3.1]
    assert any(list(line.get_ydata()) == [3.3, 3.3] for line in axes.lines)
    assert any("unigram entropy 3.30" in text.get_text() for text in axes.texts)


def test_running_mean() -> None:
    assert plots._running_mean([4.0, 2.0, 6.0, 0.0], 2) == [4.0, 3.0, 4.0, 3.0]


@pytest.mark.parametrize("history", [[], [metrics(1)]])
def test_short_histories_can_be_drawn(tmp_path: Path, history: list[Any]) -> None:
    plots.draw_loss(history, None, tmp_path / "new" / "loss.png")
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_becomes_a_png(tmp_path: Path) -> None:
    plots.draw_schedule(schedule("lightseq", 4), tmp_path / "schedule.png")
    data = (tmp_path / "schedule.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def test_matplotlib_is_imported_when_drawing_only() -> None:
    module = "megatron_lightseq.training.reporting.plots"
    code = f"import sys, {module}; assert not {{'matplotlib', 'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
