from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.training.reporting.metrics import (
    METRICS_NAME,
    Attempt,
    MetricsLog,
    SaveMetrics,
    TrainMetrics,
    ValidationMetrics,
    read_metrics,
    tags,
)
from megatron_lightseq.training.reporting.progress import (
    LiveDisplay,
    PlainDisplay,
    Progress,
    SilentDisplay,
    choose_display,
    count,
    describe_sizes,
    duration,
    verdict,
)
from megatron_lightseq.training.reporting.wandb_run import WandbRun

GOLDEN_TAGS = [
    "save/seconds",
    "train/consumed_samples",
    "train/exposed_communication",
    "train/grad_norm",
    "train/learning_rate",
    "train/load_balancing_loss",
    "train/loss",
    "train/memory_bytes",
    "train/mtp_loss",
    "train/skipped",
    "train/step_seconds",
    "train/tflops_per_rank",
    "train/tokens_per_second",
    "validation/loss",
    "validation/num_tokens",
]


def attempt(step: int, restart: int = 0) -> Attempt:
    return Attempt(step=step, restart=restart, began=0.0, world_size=1, host="here")


def metrics(step: int, **changes: float) -> TrainMetrics:
    values: dict[str, float] = {
        "loss": 2.34567,
        "grad_norm": 0.5,
        "learning_rate": 3e-3,
        "tokens_per_second": 12345.6,
        "step_seconds": 2.0,
        "tflops_per_rank": 0.1,
        "memory_bytes": 3 * 2**29,
        "exposed_communication": 0.1,
        "consumed_samples": 2 * step,
        "skipped": False,
    }
    return TrainMetrics(step=step, **{**values, **changes})  # type: ignore[arg-type]


def test_the_line() -> None:
    progress = Progress(SilentDisplay(), first_step=0, num_steps=100, log_interval=1)
    assert progress.line(metrics(40)) == (
        "step  40/100 | loss 2.3457 | grad norm 0.500 | lr 3.00e-03 | 12,346 tokens/s | 1.50 GiB | ETA 2m00s"
    )
    besides = progress.line(metrics(40, mtp_loss=3.5, load_balancing_loss=1.01))
    assert "| loss 2.3457 | mtp loss 3.5000 | load balancing 1.0100 | grad norm" in besides
    assert progress.line(metrics(40, skipped=True)).endswith("| step skipped: gradients not finite")


def test_time_left_is_by_the_median_step_and_not_by_the_first() -> None:
    progress = Progress(SilentDisplay(), first_step=0, num_steps=10, log_interval=1)
    progress.step(metrics(1, step_seconds=100.0))
    for step in (2, 3, 4):
        progress.step(metrics(step, step_seconds=1.0))
    progress.step(metrics(5, step_seconds=50.0))
    assert progress.line(metrics(5)).endswith("ETA 5s")


def test_plain_lines_come_at_the_interval_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = Progress(PlainDisplay(stream), first_step=0, num_steps=7, log_interval=3)
    for step in range(1, 8):
        progress.step(metrics(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]


def test_a_table_is_aligned() -> None:
    stream = io.StringIO()
    Progress(PlainDisplay(stream), first_step=0, num_steps=1, log_interval=1).table(
        [("a", "1"), ("long", "2")]
    )
    assert stream.getvalue() == "a     1\nlong  2\n"


def test_the_live_line_is_one_line_and_notes_stay_above() -> None:
    stream = io.StringIO()
    display = LiveDisplay(stream, first_step=0, num_steps=5, force=True)
    progress = Progress(display, first_step=0, num_steps=5, log_interval=100)
    progress.note("saved [checkpoint]")
    for step in range(1, 6):
        progress.step(metrics(step))
    progress.close()
    text = stream.getvalue()
    assert "saved [checkpoint]" in text, "brackets are no markup"
    assert "step 5/5 | loss 2.3457" in text


def test_a_live_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    display = LiveDisplay(stream, first_step=0, num_steps=5, force=True)
    progress = Progress(display, first_step=0, num_steps=5, log_interval=1)
    progress.step(metrics(5))
    progress.close()
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert any("step 5/5" in line and line.rstrip().endswith("…") for line in lines)
    assert not any("ETA" in line for line in lines)


@pytest.mark.parametrize(
    ("setting", "rank", "terminal", "expected"),
    [
        ("auto", 0, True, LiveDisplay),
        ("auto", 0, False, PlainDisplay),
        ("plain", 0, True, PlainDisplay),
        ("live", 0, False, LiveDisplay),
        ("off", 0, True, SilentDisplay),
        ("live", 1, True, SilentDisplay),
    ],
)
def test_which_display(setting: str, rank: int, terminal: bool, expected: type) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    display = choose_display(setting, rank=rank, first_step=0, num_steps=3, stream=stream)
    display.close()
    assert type(display) is expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.2, "1s"),
        (59, "59s"),
        (60, "1m00s"),
        (75.2, "1m16s"),
        (3599, "59m59s"),
        (7300, "2h01m"),
        (-1, "0s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_verdicts() -> None:
    assert verdict(1.9, 3.3) == (
        "loss 1.90 is below the corpus' unigram entropy of 3.30 nats: the model reads context"
    )
    assert "is not below" in verdict(3.4, 3.3)
    assert "is not known" in verdict(3.4, None)


def test_numbers_for_people() -> None:
    assert [count(n) for n in (12, 3400, 2_612_345, 7e9)] == ["12", "3.4 k", "2.6 M", "7.0 G"]
    assert describe_sizes(tp=2, pp=1, cp=4, dp=1) == "TP 2 x CP 4"
    assert describe_sizes(tp=1) == "no parallelism"


# ---- metrics --------------------------------------------------------------------------------------------------


def test_tags_are_the_documented_ones() -> None:
    assert tags() == GOLDEN_TAGS


def test_tensorboard_files_hold_every_tag(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(folder=None, tensorboard=tmp_path)
    log.write(metrics(1))
    log.write(metrics(2, loss=1.5, mtp_loss=2.5, load_balancing_loss=1.0))  # other steps have no such points
    log.write(ValidationMetrics(step=2, loss=1.6, num_tokens=10))
    log.write(SaveMetrics(step=2, seconds=0.5))
    log.write(attempt(0))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == GOLDEN_TAGS
    assert [(event.step, event.value) for event in events.Scalars("train/loss")][1] == (2, 1.5)
    assert [(event.step, event.value) for event in events.Scalars("train/mtp_loss")] == [(2, 2.5)]


class FakeWandb(ModuleType):
    """Records what is called, as wandb's run does it."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self._fails = fails

    def _record(self, name: str, value: Any) -> None:
        if name == self._fails:
            raise RuntimeError("no connection")
        self.calls.append((name, value))

    def init(self, **options: Any) -> FakeWandb:
        self._record("init", options)
        return self

    def define_metric(self, name: str, **options: Any) -> None:
        self._record("define_metric", (name, options))

    def log(self, values: Any) -> None:
        self._record("log", values)

    def finish(self) -> None:
        self._record("finish", None)


WANDB = with_values(PretrainConfig(), wandb_project="long", wandb_exp_name="first", seq_length=8192)


def test_weights_and_biases_get_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLog(folder=None, tensorboard=None, wandb=WandbRun(WANDB))
    log.write(attempt(0))
    log.write(metrics(1))
    log.write(SaveMetrics(step=1, seconds=0.5))
    log.close()
    names, values = zip(*fake.calls, strict=True)
    assert names == ("init", "define_metric", "log", "log", "finish")
    assert (values[0]["project"], values[0]["name"], values[0]["config"]["seq_length"]) == (
        "long",
        "first",
        8192,
    )
    assert values[1] == ("*", {"step_metric": "step"})
    assert values[2]["step"] == 1
    assert values[2]["train/loss"] == metrics(1).loss
    assert "train/mtp_loss" not in values[2]
    assert values[3] == {"save/seconds": 0.5, "step": 1}


def test_weights_and_biases_end_no_run_but_must_begin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails="log"))
    log = MetricsLog(folder=None, tensorboard=None, wandb=WandbRun(WANDB))
    log.write(metrics(1))
    log.close()
    assert "Weights & Biases: RuntimeError: no connection: metrics are lost" in caplog.text
    for absent in (FakeWandb(fails="init"), None):  # None: the import fails
        monkeypatch.setitem(sys.modules, "wandb", absent)
        with pytest.raises(ConfigError, match=r"wandb_project long .* set WANDB_MODE=offline"):
            WandbRun(WANDB)


def test_metrics_round_trip(tmp_path: Path) -> None:
    log = MetricsLog(folder=tmp_path, tensorboard=None)
    written = [metrics(1), ValidationMetrics(step=1, loss=3.0, num_tokens=4), metrics(2)]
    for entry in written:
        log.write(entry)
    assert read_metrics(tmp_path / METRICS_NAME) == written, "lines are on disk before the log is closed"
    log.close()


def test_a_resumed_run_forgets_steps_behind_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(folder=tmp_path, tensorboard=None)
    for step in range(1, 6):
        log.write(metrics(step))
    log.close()
    path = tmp_path / METRICS_NAME
    with path.open("a") as stream:
        stream.write('{"kind": "train", "step": 6, "lo')  # killed in the middle of a line
    resumed = MetricsLog(folder=tmp_path, tensorboard=None, resumed_step=3)
    resumed.write(attempt(3, restart=1))
    resumed.write(metrics(4, loss=9.0))
    resumed.close()
    assert [(m.step, m.loss) for m in read_metrics(path)] == [
        (1, 2.34567),
        (2, 2.34567),
        (3, 2.34567),
        (4, 9.0),
    ]
    lines = path.read_text().splitlines()
    assert lines.pop(5) == '{"kind": "train", "step": 6, "lo'
    assert [json.loads(line)["kind"] for line in lines] == ["train"] * 5 + ["attempt", "train"]


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\x00\xfe\n",
        b"[]\n3\nnull\n",
        b'{"kind": "other", "step": 2}\n',
        b'{"kind": ["train"]}\n',
        b'{"kind": "train", "step": 2}\n',
        b'{"kind": "validation", "step": null, "loss": 1.0, "num_tokens": 1}\n',
        b'{"kind": "validation", "step": 2, "loss": "x", "num_tokens": 1}\n',
        b'{"kind": "validation", "step": 2, "loss": 1.0, "num_tokens": 1, "more": 1}\n',
        b'{"kind": "attempt", "step": 0, "restart": 0, "began": "now", "world_size": 1, "host": 3}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_damaged_line_is_skipped(tmp_path: Path, damage: bytes) -> None:
    log = MetricsLog(folder=tmp_path, tensorboard=None)
    log.write(metrics(1))
    with (tmp_path / METRICS_NAME).open("ab") as stream:
        stream.write(damage)
    log.write(metrics(2))
    assert [m.step for m in read_metrics(tmp_path / METRICS_NAME)] == [1, 2]


def test_a_full_disk_costs_metrics_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(folder=tmp_path, tensorboard=None)
    log.write(metrics(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: FullFile())
        log.write(metrics(2))
        log.write(metrics(3))
    with (tmp_path / METRICS_NAME).open("a") as stream:
        stream.write('{"half of a li')  # as far as the disk has taken it
    log.write(metrics(4))
    assert [m.step for m in read_metrics(tmp_path / METRICS_NAME)] == [1, 4]
    assert caplog.text.count("No space left on device: metrics are lost; training goes on") == 1


class FullFile(io.BytesIO):
    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_report_folder_that_cannot_be_made_costs_metrics_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = MetricsLog(folder=tmp_path / "file" / "report", tensorboard=None)
    log.write(metrics(1))
    log.close()
    assert read_metrics(tmp_path / "file" / "report" / METRICS_NAME) == []


def test_a_fresh_run_does_not_inherit_old_metrics(tmp_path: Path) -> None:
    log = MetricsLog(folder=tmp_path, tensorboard=None)
    log.write(metrics(1))
    log.write(attempt(0))
    log.close()
    assert read_metrics(tmp_path / METRICS_NAME) == []


def test_ranks_without_a_folder_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(folder=None, tensorboard=None)
    log.write(metrics(1))
    log.close()
    assert log.path is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("progress", ["plain", "live"])
@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_output_that_nobody_reads_ends_no_run(progress: str, code: int) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(code, os.strerror(code))

    display = choose_display(progress, rank=0, first_step=0, num_steps=3, stream=Gone())
    display.note("a line")
    display.update(1, "step 1", due=True)
    display.close()


CLOSED_PIPE = """
import sys
from megatron_lightseq.training.job.exit import CleanExit
from megatron_lightseq.training.reporting.progress import choose_display
import torch

end = CleanExit()
sys.stdin.read()
display = choose_display("plain", rank=0, first_step=0, num_steps=1)
for _ in range(3):
    display.note("x" * 100_000)
print("y" * 100_000)
end.status = 0
"""


def test_a_closed_pipe_ends_no_process_and_no_status_tells_of_it() -> None:
    import subprocess

    command = [sys.executable, "-c", CLOSED_PIPE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.communicate(timeout=100)
    assert process.returncode == 0


def test_rich_is_loaded_for_live_lines_only() -> None:
    import subprocess

    code = (
        "import sys, megatron_lightseq.training.reporting.progress as p\n"
        "p.choose_display('plain', rank=0, first_step=0, num_steps=1)\n"
        "assert not any(m.split('.')[0] in ('rich', 'torch', 'matplotlib') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
