"""The launch scripts, run with fakes of torchrun and Slurm: the exact commands that they start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.packaging.fakes import ROOT, FakeMachine, flags_after_module

PRETRAIN = "scripts/pretrain_gpt.sh"
SBATCH = "scripts/slurm_pretrain.sbatch"
DEFAULT = str(ROOT / "configs" / "gpt_stdlib.yaml")


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(folder=tmp_path / "machine")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with CP = 2 and a global batch size of 6, which 1, 2, 3 and 6 replicas divide."""
    path = tmp_path / "recipe with a space.yaml"
    data = tmp_path / "corpus"
    for suffix in (".bin", ".idx"):
        data.with_suffix(suffix).touch()
    path.write_text(
        f"context_parallel_size: 2\nglobal_batch_size: 6\nseq_length: 4096\ndata_path: [{data}]\n"
    )
    return path


def test_no_arguments_prepares_the_corpus_and_runs_the_default_recipe(tmp_path: Path) -> None:
    machine = FakeMachine(folder=tmp_path / "machine", plan="2 1 cpu")
    assert machine.run(PRETRAIN, cwd=tmp_path).returncode == 0
    prepare, plan, _ = machine.calls("python")
    assert prepare.arguments == ["-m", "megatron_lightseq", "prepare-data"]
    assert plan.arguments == [str(ROOT / "scripts" / "launch_plan.py"), DEFAULT]
    assert flags_after_module(machine.launch().arguments) == [DEFAULT]


def test_one_node_without_gpus(machine: FakeMachine, recipe: Path) -> None:
    done = machine.run(PRETRAIN, str(recipe))
    assert done.returncode == 0, done.stderr
    assert machine.launch().arguments == [
        *["--standalone", "--nproc-per-node", "2", "--max-restarts", "0", "--shutdown-timeout", "120"],
        *["-m", "megatron_lightseq", "pretrain", str(recipe)],
    ]
    assert not any("prepare-data" in call.arguments for call in machine.calls("python"))
    assert "starting 2 process(es) per node on 1 node(s)" in done.stdout


@pytest.mark.parametrize(
    ("num_gpus", "processes", "device"),
    [(1, 2, "cpu"), (2, 2, "gpu"), (5, 4, "gpu"), (8, 6, "gpu"), (16, 12, "gpu")],
)
def test_processes_follow_the_gpus_that_are_there(
    tmp_path: Path, recipe: Path, num_gpus: int, processes: int, device: str
) -> None:
    machine = FakeMachine(folder=tmp_path / "gpus", num_gpus=num_gpus)
    done = machine.run(PRETRAIN, str(recipe))
    assert done.returncode == 0, done.stderr
    call = machine.launch()
    assert call.value("--nproc-per-node") == str(processes)
    assert ("fewer than the ranks need" in done.stderr) == (device == "cpu")
    # On CPUs no process may see the odd GPU. On GPUs visibility is not changed.
    assert call.environment.get("CUDA_VISIBLE_DEVICES") == ("" if device == "cpu" else None)


def test_visible_devices_and_the_users_own_number_are_respected(tmp_path: Path, recipe: Path) -> None:
    machine = FakeMachine(folder=tmp_path / "gpus", num_gpus=8)
    hidden = machine.run(PRETRAIN, str(recipe), variables={"CUDA_VISIBLE_DEVICES": "3,5"})
    assert hidden.returncode == 0, hidden.stderr
    asked = machine.run(
        PRETRAIN,
        str(recipe),
        variables={"NPROC_PER_NODE": "4", "MAX_RESTARTS": "3", "SHUTDOWN_TIMEOUT": "90"},
    )
    assert asked.returncode == 0, asked.stderr
    first, second = machine.launches()
    assert (first.value("--nproc-per-node"), first.environment["CUDA_VISIBLE_DEVICES"]) == ("2", "3,5")
    assert (second.value("--nproc-per-node"), second.value("--max-restarts")) == ("4", "3")
    assert second.value("--shutdown-timeout") == "90"


def test_flags_arrive_literally_and_after_the_recipe(
    machine: FakeMachine, recipe: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    flags = [
        *[
            "--save",
            f"a folder; touch {canary}",
            "--load",
            f"$(touch {canary})",
            "--report-dir",
            f"`touch {canary}`",
        ],
        *["--tensorboard-dir", "a\nb\t*'\"\\", "--lr", "1e-3"],
    ]
    done = machine.run(PRETRAIN, str(recipe), *flags)
    assert done.returncode == 0, done.stderr
    # The last value of a key wins, so flags must come after the file that they override.
    assert flags_after_module(machine.launch().arguments) == [str(recipe), *flags]
    assert not canary.exists()


def test_flags_override_the_file_before_processes_are_counted(machine: FakeMachine, recipe: Path) -> None:
    done = machine.run(PRETRAIN, str(recipe), "--context-parallel-size", "4")
    assert done.returncode == 0, done.stderr
    assert machine.launch().value("--nproc-per-node") == "4"


def test_a_recipe_is_found_from_anywhere(machine: FakeMachine, recipe: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    assert machine.run(PRETRAIN, f"../{recipe.name}", cwd=elsewhere).returncode == 0
    assert flags_after_module(machine.launch().arguments) == [
        f"{elsewhere}/../{recipe.name}"
    ] or flags_after_module(machine.launch().arguments) == [str(recipe)]


def test_a_missing_recipe_is_named_with_those_that_exist(machine: FakeMachine) -> None:
    done = machine.run(PRETRAIN, "configs/gpt_stdlb.yaml")
    assert done.returncode == 1
    assert "there is no recipe configs/gpt_stdlb.yaml" in done.stderr
    assert "remedy: the recipes are: configs/" in done.stderr
    assert not machine.launches()


def test_a_bad_flag_ends_before_any_process_starts(machine: FakeMachine, recipe: Path) -> None:
    done = machine.run(PRETRAIN, str(recipe), "--contxt-parallel-size", "2")
    assert done.returncode == 2
    assert "--context-parallel-size" in done.stderr
    assert not machine.launches()


def test_help_needs_no_ranks(machine: FakeMachine) -> None:
    assert machine.run(PRETRAIN, "--help").returncode == 0
    assert machine.calls("python")[-1].arguments == ["-m", "megatron_lightseq", "pretrain", DEFAULT, "--help"]
    assert not machine.launches()


def test_without_an_environment_the_remedy_is_named(machine: FakeMachine) -> None:
    done = machine.run(PRETRAIN, variables={"LIGHTSEQ_VENV": str(machine.folder / "nothing")})
    assert done.returncode == 1
    assert "there is no environment at" in done.stderr
    assert "scripts/setup_env.sh" in done.stderr


EXPORTED = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "20000",
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_launch_variables(machine: FakeMachine, recipe: Path, name: str) -> None:
    assert machine.run(PRETRAIN, str(recipe)).returncode == 0
    assert machine.launch().environment[name] == EXPORTED[name]
    if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE":  # users may not change that one
        assert machine.run(PRETRAIN, str(recipe), variables={name: "mine"}).returncode == 0
        assert machine.launches()[1].environment[name] == "mine"


def test_threads_are_divided_among_processes(machine: FakeMachine, recipe: Path) -> None:
    assert machine.run(PRETRAIN, str(recipe)).returncode == 0
    cores = len(os.sched_getaffinity(0))
    assert machine.launch().environment["OMP_NUM_THREADS"] == str(max(1, cores // 2))


@pytest.mark.parametrize("name", [name for name in EXPORTED if name.startswith("TORCH_")])
def test_torch_still_reads_the_variable(name: str) -> None:
    """Exporting a variable that torch has removed or renamed would have no effect."""
    import torch

    package = Path(torch.__file__).parent
    readers = [
        package / "distributed" / "elastic" / "rendezvous" / "dynamic_rendezvous.py",
        *(package / "include" / "torch" / "csrc" / "distributed" / "c10d").glob("*.hpp"),
    ]
    assert any(name in reader.read_text() for reader in readers)


def slurm_variables(num_nodes: int) -> dict[str, str]:
    return {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[0-15]",
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "SLURM_JOB_ID": "123456",
    }


@pytest.mark.parametrize(("num_nodes", "global_batch"), [(1, 4), (2, 8), (16, 64)])
def test_slurm(tmp_path: Path, recipe: Path, num_nodes: int, global_batch: int) -> None:
    machine = FakeMachine(folder=tmp_path / "slurm", num_gpus=8, num_nodes=num_nodes)
    flags = ["--global-batch-size", str(global_batch), "--save", "a b;c"]
    done = machine.run(SBATCH, str(recipe), *flags, variables=slurm_variables(num_nodes), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (srun,) = machine.calls("srun")
    assert srun.arguments == ["--kill-on-bad-exit=1", "bash", PRETRAIN, str(recipe), *flags]
    call = machine.launch()
    meet = ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "node-0:23456"]
    expected = ["--standalone"] if num_nodes == 1 else [*meet, "--rdzv-id", "123456"]
    assert call.arguments == [
        *expected,
        *["--nproc-per-node", "8", "--max-restarts", "0", "--shutdown-timeout", "120"],
        *["-m", "megatron_lightseq", "pretrain", str(recipe), *flags],
    ]
    # Ranks on other nodes cannot be reached over the loopback interface.
    assert call.environment.get("GLOO_SOCKET_IFNAME") == ("lo" if num_nodes == 1 else None)


def test_slurm_refuses_a_folder_that_is_not_the_repository(machine: FakeMachine, tmp_path: Path) -> None:
    variables = {**slurm_variables(2), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = machine.run(SBATCH, variables=variables)
    assert done.returncode == 1
    assert "is not the repository" in done.stderr


def test_several_nodes_need_a_rendezvous(machine: FakeMachine, recipe: Path) -> None:
    done = machine.run(PRETRAIN, str(recipe), variables={"NNODES": "2"})
    assert done.returncode != 0
    assert "RDZV_ENDPOINT=HOST:PORT" in done.stderr


def test_cpu_nodes_must_share_a_replica_evenly(machine: FakeMachine, recipe: Path) -> None:
    variables = {"NNODES": "3", "RDZV_ENDPOINT": "node-0:1"}
    done = machine.run(PRETRAIN, str(recipe), variables=variables)
    assert done.returncode == 2
    assert "2 ranks (TP * PP * CP) on 3 nodes" in done.stderr
    assert "NPROC_PER_NODE" in done.stderr
