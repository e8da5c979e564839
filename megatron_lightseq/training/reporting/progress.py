"""What a person sees during a run: a header, a line that updates in place or one line per step, and a summary."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, Any, Protocol

from megatron_lightseq.training.reporting.lasting_stream import LastingStream
from megatron_lightseq.training.reporting.metrics import TrainMetrics

_RATE_WINDOW = 20
_WIDTH_FOR_BAR = 132


class Display(Protocol):
    """Where progress lines are shown."""

    def update(self, step: int, line: str, *, due: bool) -> None:
        """Show the state after a step; ``due`` says whether log_interval asks for a line."""

    def note(self, line: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Restore the terminal."""


class PlainDisplay:
    """Whole lines, for log files."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def update(self, step: int, line: str, *, due: bool) -> None:
        """Write the line if it is due."""
        if due:
            self.note(line)

    def note(self, line: str) -> None:
        """Write the line."""
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to do."""


class LiveDisplay:
    """One line with a progress bar, redrawn in place; notes scroll above it."""

    def __init__(self, stream: IO[str], *, first_step: int, num_steps: int, force: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(file=stream, force_terminal=True if force else None, highlight=False)
        text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        bar = [BarColumn(bar_width=16)] if console.width >= _WIDTH_FOR_BAR else []
        self._progress = Progress(*bar, text, console=console, refresh_per_second=4)
        self._task = self._progress.add_task(
            "waiting for the first step", total=num_steps, completed=first_step
        )
        self._progress.start()

    def update(self, step: int, line: str, *, due: bool) -> None:
        """Redraw the line at its next refresh."""
        del due  # a live line is always up to date
        self._progress.update(self._task, completed=step, description=line)

    def note(self, line: str) -> None:
        """Print above the live line."""
        self._progress.console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop redrawing; the last line stays on the screen."""
        self._progress.stop()


class SilentDisplay:
    """Shows nothing: ranks other than 0, and ``--progress off``."""

    def update(self, step: int, line: str, *, due: bool) -> None:
        """Do nothing."""

    def note(self, line: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def choose_display(
    progress: str, *, rank: int, first_step: int, num_steps: int, stream: IO[str] | None = None
) -> Display:
    """The display for the ``progress`` setting; ``auto`` is live on a terminal and plain elsewhere."""
    lasting: Any = LastingStream(sys.stdout if stream is None else stream)
    if rank != 0 or progress == "off":
        return SilentDisplay()
    if progress == "live" or (progress == "auto" and lasting.isatty()):
        return LiveDisplay(lasting, first_step=first_step, num_steps=num_steps, force=progress == "live")
    return PlainDisplay(lasting)


class Progress:
    """Turns metrics into lines."""

    def __init__(self, display: Display, *, first_step: int, num_steps: int, log_interval: int) -> None:
        self._display = display
        self._first_step = first_step
        self._num_steps = num_steps
        self._log_interval = log_interval
        self._recent: deque[float] = deque(maxlen=_RATE_WINDOW)

    def step(self, metrics: TrainMetrics) -> None:
        """Show one finished step."""
        if metrics.step > self._first_step + 1:  # the first step also plans, allocates and compiles
            self._recent.append(metrics.step_seconds)
        due = metrics.step % self._log_interval == 0 or metrics.step == self._num_steps
        self._display.update(metrics.step, self.line(metrics), due=due)

    def line(self, metrics: TrainMetrics) -> str:
        """One line: step, loss, auxiliary losses, grad norm, learning rate, tokens/s, memory, time left."""
        width = len(str(self._num_steps))
        left = statistics.median(self._recent or [metrics.step_seconds]) * (self._num_steps - metrics.step)
        parts = [
            f"step {metrics.step:>{width}}/{self._num_steps}",
            f"loss {metrics.loss:.4f}",
            *_auxiliary(metrics),
            f"grad norm {metrics.grad_norm:.3f}",
            f"lr {metrics.learning_rate:.2e}",
            f"{metrics.tokens_per_second:,.0f} tokens/s",
            f"{metrics.memory_bytes / 2**30:.2f} GiB",
            f"ETA {duration(left)}",
        ]
        return " | ".join(parts) + (" | step skipped: gradients not finite" if metrics.skipped else "")

    def note(self, line: str) -> None:
        """Show a line that stays."""
        self._display.note(line)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values, one pair per line."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self._display.note(f"{name:<{width}}  {value}")

    def close(self) -> None:
        """Leave the terminal in order."""
        self._display.close()


def _auxiliary(metrics: TrainMetrics) -> list[str]:
    losses = (("mtp loss", metrics.mtp_loss), ("load balancing", metrics.load_balancing_loss))
    return [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]


class Stopwatch:
    """Measures the time since it was made or last read."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def duration(seconds: float) -> str:
    """``75.2`` as ``1m15s``."""
    whole = max(0, math.ceil(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def verdict(loss: float, entropy: float | None) -> str:
    """What the final loss means, compared with the entropy of the corpus' token frequencies."""
    if entropy is None:
        return f"final loss {loss:.2f} nats per token; this corpus' unigram entropy is not known"
    if loss < entropy:
        return f"loss {loss:.2f} is below the corpus' unigram entropy of {entropy:.2f} nats: the model reads context"
    return (
        f"loss {loss:.2f} is not below the corpus' unigram entropy of {entropy:.2f} nats: so far the model has learned "
        "nothing beyond token frequencies; train for longer"
    )


def count(number: float) -> str:
    """``3412345`` as ``3.4 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def describe_sizes(**sizes: Any) -> str:
    """``TP 2 x CP 2``, without factors of one."""
    parts = [f"{name.upper()} {size}" for name, size in sizes.items() if size > 1]
    return " x ".join(parts) or "no parallelism"
