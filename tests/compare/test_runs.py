"""Systems that run on real ranks, with tiny sizes; no times are checked."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lightseq.cli.compare import run
from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.tools.compare.job import Job
from megatron_lightseq.tools.compare.launch import measure
from megatron_lightseq.tools.compare.link import BYTES_TOLERANCE, predicted_bytes
from megatron_lightseq.tools.compare.longest import longest_sequence
from megatron_lightseq.tools.compare.run import common_config, run_comparison
from megatron_lightseq.tools.compare.systems import FULL_RECOMPUTE, SYSTEMS
from megatron_lightseq.tools.compare.traffic import Traffic, watch_traffic
from megatron_lightseq.tools.ranks import Cluster, Host
from megatron_lightseq.tools.ranks.process import is_out_of_memory
from tests.harness.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Cluster(timeout_s=120)
THREE_HEADS = with_values(
    PretrainConfig(),
    num_layers=2,
    hidden_size=24,
    num_attention_heads=3,
    seq_length=64,
    lr=1e-2,
    **FULL_RECOMPUTE,
)
"""Three heads on two ranks: tensor parallelism has to pad."""


def job(system: str = "lightseq", config: PretrainConfig = THREE_HEADS, **more: object) -> Job:
    common = common_config(config, 2)
    return Job(system=system, common=common, world_size=2, steps=1, measure_ceiling=False, **more)


def test_padded_megatron_and_lightseq_have_the_same_losses() -> None:
    names = ("megatron-tp-sp", "lightseq", "megatron-tp-sp-stored", "lightseq-plain-recompute")
    found = run_comparison(
        job(), [SYSTEMS[name] for name in names], baseline="megatron-tp-sp", cluster=CLUSTER
    )
    assert found.agrees, found.disagreements or [row.problem for row in found.figures]
    rows = {row.system: row for row in found.figures}
    assert rows["lightseq"].losses[-1] < rows["lightseq"].losses[0], (
        "the model must learn, so that wrong gradients would be detected"
    )
    forwards = {name: row.attention_forwards for name, row in rows.items()}
    assert forwards == {
        "megatron-tp-sp": 4,  # two layers, each repeated by recomputation
        "megatron-tp-sp-stored": 2,
        "lightseq": 2,
        "lightseq-plain-recompute": 4,
    }
    ours = rows["lightseq"]
    assert ours.attention_bytes_sent == ours.scheduled_bytes_sent
    assert ours.bytes_sent > ours.attention_bytes_sent > 0
    assert (ours.peak_tensor_bytes or 0) > 0
    assert found.speedup(ours) is not None


def test_a_broken_job_is_reported_with_its_log() -> None:
    with_unknown_kernel = with_values(THREE_HEADS, cp_kernel="warp")
    result = measure(job(config=with_unknown_kernel), CLUSTER)
    assert result.ranks == ()
    assert "kernel 'warp'" in (result.failure or "")


def test_a_host_that_is_not_there_is_named() -> None:
    nowhere = Cluster(hosts=(Host(network_namespace="mls-nowhere"),), timeout_s=60)
    assert "mls-nowhere" in (measure(job(), nowhere).failure or "")


def test_a_stuck_job_is_ended() -> None:
    result = measure(job(), Cluster(timeout_s=0.01))
    assert (result.failure or "").startswith("rank ")


def test_longest_sequence_ends_at_the_limit() -> None:
    limited = job("megatron-tp-sp", memory_budget_bytes=48 << 20)
    lines: list[str] = []
    found = longest_sequence(
        limited, start=64, limit=64 * 512, halvings=1, cluster=CLUSTER, report=lines.append
    )
    assert found.fits >= 64
    assert found.too_long is not None, "memory must run out before the lengths to try do"
    assert found.too_long / found.fits in (1.5, pytest.approx(4 / 3))
    tried = [int(line.split()[1]) for line in lines]
    assert tried[-1] == (tried[-3] + tried[-2]) // 2, (
        "the last try is between the longest that fits and the shortest that does not"
    )


def test_running_out_of_memory_is_distinguished_from_other_failures() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: not enough memory")
    )
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def test_the_command_compares_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hidden-size=24", "--num-attention-heads=2", "--seq-length=64", "--steps=1"]
    status = run([*flags, "--systems", "megatron-tp-sp,ring,megatron-cp", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert status == 0
    assert "losses agree" in shown
    assert "is implemented in" in shown
    record = json.loads((tmp_path / "compare.json").read_text())
    assert [row["system"] for row in record["figures"]] == ["megatron-tp-sp", "ring", "megatron-cp"]


def collectives() -> tuple[dict[str, int], bool]:
    """Bytes that this rank sends, by kind of collective, and whether all patches were undone."""
    before = [vars(dist)[name] for name in ("all_reduce", "isend", "batch_isend_irecv")]
    rank, traffic, counts = dist.get_rank(), Traffic(), {}
    x = torch.ones(256)

    def count(name: str, start: int) -> None:
        counts[name] = traffic.bytes_sent - start

    with watch_traffic(traffic):
        for name, call in {
            "all_reduce": lambda: dist.all_reduce(x.clone()),
            "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(512), x),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(128), x.clone()),
            "broadcast": lambda: dist.broadcast(x.clone(), src=1),
        }.items():
            start = traffic.bytes_sent
            call()
            count(name, start)
        start = traffic.bytes_sent
        ops = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.empty(256), 1 - rank)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        count("batch", start)
        assert traffic.calls >= 5
        assert traffic.seconds > 0
    after = [vars(dist)[name] for name in ("all_reduce", "isend", "batch_isend_irecv")]
    return counts, before == after


def test_collectives_are_counted_by_hand() -> None:
    (first, restored), (second, _) = run_ranks(2, collectives)
    kilobyte = 1024  # 256 fp32; a ring over two ranks sends half of it per pass
    assert first == {
        "all_reduce": kilobyte,
        "all_gather": kilobyte,  # half of the 512 gathered
        "reduce_scatter": kilobyte,  # gloo's is an all-reduce
        "broadcast": 0,
        "batch": kilobyte,
    }
    assert second["broadcast"] == kilobyte
    assert restored


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.strip()}


def two_hosts(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    flags = [
        "--hidden-size=64",
        "--num-attention-heads=4",
        "--num-query-groups=2",
        "--seq-length=512",
        "--steps=1",
    ]
    own = {"LIGHTSEQ_SETUP": "0", "LIGHTSEQ_VENV": "none", "RATES": "1", "PYTHONPATH": str(ROOT)}
    own["OVERLAP"] = "--methods lightseq --seq-length 256 --repetitions 1"
    return subprocess.run(
        ["bash", str(ROOT / "scripts/compare_two_hosts.sh"), str(folder), *flags],
        env={**os.environ, **own, **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_two_hosts_count_what_the_schedule_says(tmp_path: Path) -> None:
    done = two_hosts(tmp_path, SYSTEMS="megatron-tp-sp,lightseq,zigzag")
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "two-hosts.json").read_text())["1"]
    for row in record["figures"]:
        assert abs(row["link_bytes_sent"] / predicted_bytes(row) - 1) <= BYTES_TOLERANCE
        assert row["scheduled_bytes_sent"] in (None, row["attention_bytes_sent"])
    (hidden,) = json.loads((tmp_path / "overlap-1.json").read_text())["rows"]
    assert hidden["on"]["bytes_sent"] == hidden["off"]["bytes_sent"] > 0
    assert not {name for name in namespaces() if name.startswith("mls-")}, "taken down again"


def test_two_hosts_are_skipped_without_the_tools(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "id"):
        (tools / name).symlink_to(
            Path("/usr/bin", name) if Path("/usr/bin", name).exists() else Path("/bin", name)
        )
    done = two_hosts(tmp_path, PATH=str(tools), RATES="10 1")
    assert done.returncode == 77
    assert "skipped 2 comparison(s): ip (package iproute2) is not installed" in done.stdout
