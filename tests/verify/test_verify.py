"""The parity matrix: a short version end to end, and cells that must fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_lightseq.cli.verify import run
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.schedule import METHODS
from megatron_lightseq.tools.verify.cells import BF16, CELLS, Tolerance, select
from megatron_lightseq.tools.verify.gradients import Piece, assemble
from megatron_lightseq.tools.verify.parity import TrainedStep, Verdict, budget, compare

SHORT = (
    r"^cp2 (lightseq|mesh|rsa|auto)$|^tp2 sp cp2 ulysses$|^pp2 interleaved cp2 mesh$|cp4 usp"
    r"|^shared expert|^experts ep4|^latent cp2 lightseq$|^multi-token cp2 striped$"
    r"|^bf16 all experts|^window cp4 ring|^sinks tp2|^packed cp3 lightseq|^padded cp2|^packed gpt-2"
    r"|^documents by a dense mask, cp2 lightseq$|^experts, loss by sequence|^evaluated first, cp2 lightseq$"
)
"""Cells of at most 4 processes that cover every kind of transport and every other parallelism once."""


def lightseq(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_lightseq", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_the_short_matrix_passes() -> None:
    done = lightseq("--processes", "4", "--cells", SHORT)
    cells = [line for line in done.stdout.splitlines() if line[:4] in ("PASS", "FAIL")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cells) == len(select(SHORT, 4)) >= 8
    assert all(line.startswith("PASS") for line in cells)
    assert f"{len(cells)} of {len(cells)} cells passed" in done.stdout


def test_wrong_cells_fail_and_the_next_ones_still_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.verify.seeded_faults"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert lines["other weights"].startswith("False|(")
    assert lines["other average"].startswith("False|(")
    assert lines["impossible"].startswith("False|None|")
    expected = (
        "ConfigError: cp_method lightseq, cp_layout zigzag, context_parallel_size 2: method 'lightseq' on"
    )
    assert expected in lines["impossible"]
    assert "num_attention_heads must be a multiple" in lines["no reference"], "rank 1 must not wait for it"
    assert lines["right"].startswith("True|(")


def test_the_matrix_is_large_and_named() -> None:
    assert len(CELLS) >= 40
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert max(cell.world_size for cell in CELLS) == 8
    used = {cell.values.get("cp_method") for cell in CELLS}
    names = {cell.name for cell in CELLS}
    assert names >= {f"cp{size} {method}" for size in (2, 3, 4) for method in METHODS}
    assert {cell.model.get("num_experts") for cell in CELLS} == {None, 4}
    assert any("mtp_num_layers" in cell.model and "multi_latent_attention" in cell.model for cell in CELLS)
    assert used >= {"lightseq", "ring", "zigzag", "all_gather", "mesh", "ulysses", "usp", "rsa", "auto"}


def test_nothing_to_verify_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--cells 'nowhere'.*no cell is left.*--list"):
        select("nowhere", 8)
    with pytest.raises(ConfigError, match="it is a regular expression"):
        select("(", 8)
    with pytest.raises(ConfigError, match="context_parallel_size: the cells set this themselves"):
        run(["--context-parallel-size", "2"])
    assert run(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CELLS)


# --- putting gradients together, and comparing them -------------------------------------------------------------------


def piece(gradient: torch.Tensor, **values: object) -> Piece:
    plain = Piece(
        name="w",
        replica=0,
        num_replicas=2,
        tensor_rank=0,
        num_tensor_ranks=2,
        dim=None,
        sections=(),
        gradient=gradient,
    )
    return replace(plain, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dim", "sections"), [(0, (8,)), (1, (8,)), (0, (4, 4)), (0, (2, 2, 4)), (1, (6, 2))]
)
def test_pieces_make_the_whole(dim: int, sections: tuple[int, ...]) -> None:
    whole = torch.randn(8, 8)
    blocks = [block.chunk(2, dim=dim) for block in whole.split(sections, dim=dim)]
    cut = [
        piece(
            torch.cat([block[rank] for block in blocks], dim=dim),
            tensor_rank=rank,
            dim=dim,
            sections=tuple(size // 2 for size in sections),
            replica=r,
        )
        for r in (0, 1)
        for rank in (1, 0)
    ]
    (found,) = assemble(cut).values()
    assert len(found) == 2
    assert all(torch.equal(gradient, whole) for gradient in found)
    with pytest.raises(AssertionError, match="w: "):
        assemble(cut[1:])


def outcome(*replicas: dict[str, torch.Tensor], loss: float = 4.0, grad_norm: float = 2.0) -> TrainedStep:
    names = {name for replica in replicas for name in replica}
    gradients = {name: [replica[name] for replica in replicas if name in replica] for name in names}
    return TrainedStep(loss=loss, grad_norm=grad_norm, gradients=gradients)


def verdict(got: TrainedStep) -> Verdict:
    return compare(got, outcome({"a": torch.ones(4), "b": torch.full((4,), 2.0)}), Tolerance())


def test_distances_are_relative_and_of_the_furthest_parameter() -> None:
    right = {"a": torch.ones(4), "b": torch.full((4,), 2.0)}
    assert verdict(outcome(right, right)).passed
    off = {**right, "a": torch.tensor([1.0, 1.0, 1.0, 1.2])}
    far = verdict(outcome(right, off))
    assert (far.parameter, far.passed) == ("a", False)
    assert far.gradient == pytest.approx(0.1)
    assert not verdict(outcome(right, loss=4.001)).passed
    assert not verdict(outcome(right, grad_norm=2.001)).passed
    assert not verdict(replace(outcome(right), mtp_loss=4.0)).passed, "the reference has none"


@pytest.mark.parametrize(
    "wrong", [{"a": torch.ones(4)}, {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)}]
)
def test_a_missing_or_additional_parameter_fails(wrong: dict[str, torch.Tensor]) -> None:
    assert verdict(outcome(wrong)).gradient == float("inf")


def test_nan_fails() -> None:
    for name in ("a", "b"):  # whichever comes first
        right = {"a": torch.ones(4), "b": torch.full((4,), 2.0)}
        assert not verdict(outcome({**right, name: torch.full((4,), float("nan"))})).passed
    assert not verdict(outcome({"a": torch.ones(4), "b": torch.full((4,), 2.0)}, loss=float("nan"))).passed


def test_in_bf16_the_error_may_be_twice_that_of_megatron() -> None:
    exact = outcome({"a": torch.ones(4), "b": torch.full((4,), 2.0)}, loss=4.0)
    rounded = outcome({"a": torch.full((4,), 1.01), "b": torch.full((4,), 2.0)}, loss=4.004)
    allowed = budget(rounded, exact, BF16)
    assert allowed.gradient == pytest.approx(0.02 + BF16.gradient, rel=1e-4)
    assert allowed.loss == pytest.approx(0.002 + BF16.loss, rel=1e-4)
    assert allowed.grad_norm == BF16.grad_norm
    for factor, passes in ((1.019, True), (0.981, True), (1.022, False)):
        cell = outcome({"a": torch.full((4,), factor), "b": torch.full((4,), 2.0)}, loss=4.002)
        assert compare(cell, exact, allowed).passed is passes


@pytest.mark.parametrize("rank", [0, 1])
def test_launched_ranks_leave_the_store_together(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0's process may host the store, so it must not end while another rank waits for the next cell."""
    from types import SimpleNamespace

    from megatron_lightseq.tools.verify import ranks
    from megatron_lightseq.training.job import leave

    events: list[object] = []
    walk = SimpleNamespace(
        store="store",
        cells=(),
        follow=lambda: events.append("follow"),
        lead=lambda: events.append("lead") or (),
    )
    monkeypatch.setattr(ranks, "launched_ranks", lambda *_: walk)
    monkeypatch.setattr(leave, "leave_store", lambda store, **facts: events.append((store, facts)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert run([]) == 0
    assert events == [
        "follow" if rank else "lead",
        ("store", {"rank": rank, "world_size": 2, "store_host": 0}),
    ]
