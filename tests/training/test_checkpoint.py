from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.errors import CheckpointError
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.manifest import MANIFEST_NAME, Manifest, record_files
from tests.harness.ranks import run_ranks
from tests.training import saved_runs
from tests.training.hostile import payloads
from tests.training.saved_runs import SAVED_AT, Outcome, refusal, resume, train_and_save

VARIANT = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.05,
    "multi_latent_attention": True,
    "num_query_groups": None,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 10,
    "mtp_num_layers": 1,
}
"""A model with every feature that a plain decoder lacks."""

BITWISE = {
    "fp32": (1, {}),
    "bf16": (1, {"bf16": True}),
    "sgd": (1, {"optimizer": "sgd"}),
    "cp2 dropout": (2, {"context_parallel_size": 2, "hidden_dropout": 0.1}),
    "distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "distributed optimizer, cp2, bf16": (
        2,
        {"use_distributed_optimizer": True, "context_parallel_size": 2, "bf16": True},
    ),
    "distributed optimizer, overlapped": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "tp2 sp dropout": (  # dropout masks come from Megatron's own random states
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "hidden_dropout": 0.1},
    ),
    "pp2 interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "experts ep2 cp2, latent, multi-token, distributed optimizer": (
        2,
        {
            **VARIANT,
            "expert_model_parallel_size": 2,
            "context_parallel_size": 2,
            "use_distributed_optimizer": True,
        },
    ),
}


@pytest.mark.parametrize("name", BITWISE)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, name: str) -> None:
    world_size, overrides = BITWISE[name]
    whole = run_ranks(world_size, train_and_save, overrides, str(tmp_path))
    resumed = run_ranks(world_size, resume, overrides, str(tmp_path))
    for rank in range(world_size):
        assert resumed[rank].started_at == SAVED_AT
        assert resumed[rank].consumed_samples == 4 * SAVED_AT
        assert resumed[rank].losses == whole[rank].losses[SAVED_AT:]
        assert resumed[rank].grad_norms == whole[rank].grad_norms[SAVED_AT:]
        assert resumed[rank].learning_rates == whole[rank].learning_rates[SAVED_AT:]
        assert resumed[rank].next_random == whole[rank].next_random


RESHARD = {
    "tp2 x cp2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    "tp2+sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "cp3": (3, {"context_parallel_size": 3}),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run on one rank with two checkpoints; do not change its folder, copy it."""
    root = tmp_path_factory.mktemp("single")
    return root, run_ranks(1, train_and_save, {}, str(root), (2, SAVED_AT))[0]


@pytest.mark.parametrize("name", RESHARD)
def test_a_checkpoint_of_one_rank_resumes_on_other_layouts(single: tuple[Path, Outcome], name: str) -> None:
    root, whole = single
    world_size, overrides = RESHARD[name]
    for outcome in run_ranks(world_size, resume, overrides, str(root)):
        assert outcome.losses == pytest.approx(whole.losses[SAVED_AT:], rel=1e-5)
        assert outcome.losses[0] == pytest.approx(whole.losses[SAVED_AT], rel=1e-6)
        assert outcome.grad_norms == pytest.approx(whole.grad_norms[SAVED_AT:], rel=1e-4)


def test_a_checkpoint_of_four_ranks_resumes_on_one(tmp_path: Path) -> None:
    overrides = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    whole = run_ranks(4, train_and_save, overrides, str(tmp_path))[0]
    single = run_ranks(1, resume, {}, str(tmp_path))[0]
    assert single.losses == pytest.approx(whole.losses[SAVED_AT:], rel=1e-5)


def test_distributed_optimizer_state_resumes_on_another_layout(tmp_path: Path) -> None:
    sharded = {"use_distributed_optimizer": True}
    whole = run_ranks(2, train_and_save, sharded, str(tmp_path))[0]
    other = run_ranks(2, resume, {**sharded, "tensor_model_parallel_size": 2}, str(tmp_path))[0]
    assert other.losses == pytest.approx(whole.losses[SAVED_AT:], rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_distributed_optimizer": True}, {"bf16": True}])
def test_experts_of_two_ranks_resume_on_one(tmp_path: Path, more: dict[str, Any]) -> None:
    """Expert parallelism uses a separate optimizer for experts."""
    apart = {"expert_model_parallel_size": 2, "context_parallel_size": 2}
    whole = run_ranks(2, train_and_save, {**VARIANT, **more, **apart}, str(tmp_path))[0]
    single = run_ranks(1, resume, {**VARIANT, **more}, str(tmp_path))[0]
    assert single.started_at == SAVED_AT
    tolerance = 5e-3 if "bf16" in more else 1e-5
    assert single.losses == pytest.approx(whole.losses[SAVED_AT:], rel=tolerance)
    assert single.grad_norms == pytest.approx(whole.grad_norms[SAVED_AT:], rel=10 * tolerance)


def test_experts_of_one_rank_resume_on_two(tmp_path: Path) -> None:
    apart = {"expert_model_parallel_size": 2, "context_parallel_size": 2}
    for more in ({}, {"use_distributed_optimizer": True}):
        root = str(tmp_path / str(len(more)))
        whole = run_ranks(1, train_and_save, {**VARIANT, **more}, root)[0]
        for resumed in run_ranks(2, resume, {**VARIANT, **more, **apart}, root):
            assert resumed.losses == pytest.approx(whole.losses[SAVED_AT:], rel=1e-5)


def test_without_optimizer_state_the_run_differs(single: tuple[Path, Outcome]) -> None:
    """Shows that the comparison above can fail: without the optimizer's state, the second step differs."""
    root, whole = single
    outcome = run_ranks(1, resume, {"no_load_optim": True}, str(root))[0]
    assert outcome.losses[0] == whole.losses[SAVED_AT]
    assert outcome.losses[1] != pytest.approx(whole.losses[SAVED_AT + 1], rel=1e-4)


def test_without_random_state_dropout_differs(tmp_path: Path) -> None:
    overrides = {"hidden_dropout": 0.1}
    whole = run_ranks(1, train_and_save, overrides, str(tmp_path))[0]
    outcome = run_ranks(1, resume, {**overrides, "no_load_rng": True}, str(tmp_path))[0]
    assert outcome.losses[0] != pytest.approx(whole.losses[SAVED_AT], rel=1e-6)


def test_finetune_takes_the_weights_only(single: tuple[Path, Outcome]) -> None:
    root, whole = single
    outcome = run_ranks(1, resume, {"finetune": True}, str(root))[0]
    assert (outcome.started_at, outcome.consumed_samples) == (0, 0)
    assert len(outcome.losses) == saved_runs.STEPS
    assert outcome.losses[0] < whole.losses[0], "it starts from trained weights"


def test_a_resumed_run_follows_its_own_learning_rate(tmp_path: Path, single: tuple[Path, Outcome]) -> None:
    """Megatron's schedule and torch's optimizer would both silently use the checkpoint's learning rate."""
    changed = {"lr": 6e-3, "lr_decay_style": "linear", "lr_decay_iters": 8}
    expected = run_ranks(1, train_and_save, changed, str(tmp_path))[0].learning_rates[SAVED_AT:]
    assert expected != single[1].learning_rates[SAVED_AT:]
    assert run_ranks(1, resume, changed, str(single[0]))[0].learning_rates == expected
    _, (message,) = run_ranks(1, resume_with_log, changed, str(single[0]))[0]
    assert "lr_decay_style is cosine in the checkpoint and linear here" in message
    assert "max_lr is 0.003 in the checkpoint and 0.006 here" in message


@pytest.mark.parametrize("changed", [{"adam_beta1": 0.5}, {"adam_eps": 1e-2}, {"weight_decay": 5.0}])
@pytest.mark.parametrize("overrides", [{}, {"bf16": True}, {"use_distributed_optimizer": True}])
def test_a_resumed_run_follows_its_own_optimizer_settings(
    tmp_path: Path, overrides: dict[str, Any], changed: dict[str, float]
) -> None:
    whole = run_ranks(1, train_and_save, overrides, str(tmp_path))[0]
    outcome = run_ranks(1, resume, {**overrides, **changed}, str(tmp_path))[0]
    assert outcome.losses[0] == whole.losses[SAVED_AT]
    assert outcome.losses[1] != whole.losses[SAVED_AT + 1]


# ---- damage ---------------------------------------------------------------------------------------------------


def damaged_copy(root: Path, target: Path) -> Path:
    shutil.copytree(root, target)
    return target / f"iter_{SAVED_AT:07d}"


def resume_with_log(overrides: dict[str, Any], root: str) -> tuple[int, list[str]]:
    """The iteration resumed from, and the log messages."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("megatron_lightseq")
    package.addHandler(handler)
    try:
        return resume(overrides, root).started_at, records
    finally:
        package.removeHandler(handler)


def _files(root: Path) -> list[str]:
    return [record.name for record in Manifest.read(root / f"iter_{SAVED_AT:07d}").files]


def test_the_manifest_covers_every_file(single: tuple[Path, Outcome]) -> None:
    folder = single[0] / f"iter_{SAVED_AT:07d}"
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert present == {*_files(single[0]), "manifest.json"}
    assert {".metadata", "common.pt", "metadata.json", "__0_0.distcp", "random/rank_00000.pt"} <= present


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_in_any_file_falls_back_to_the_checkpoint_before(
    single: tuple[Path, Outcome], tmp_path: Path, harm: str
) -> None:
    for index, name in enumerate([*_files(single[0]), "manifest.json"]):
        root = tmp_path / str(index)
        path = damaged_copy(single[0], root) / name
        data = bytearray(path.read_bytes())
        data[len(data) * 2 // 3] ^= 4
        if harm == "flip":
            path.write_bytes(data)
        elif harm == "cut":
            os.truncate(path, len(data) - 1)
        else:
            path.unlink()
        started_at, messages = run_ranks(1, resume_with_log, {}, str(root))[0]
        assert started_at == 2
        assert any(name in message and f"iter_{SAVED_AT:07d}" in message for message in messages), messages


def test_strict_load_refuses_a_damaged_newest_checkpoint(
    single: tuple[Path, Outcome], tmp_path: Path
) -> None:
    path = damaged_copy(single[0], tmp_path / "copy") / "common.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    message = run_ranks(2, refusal, {"strict_load": True}, str(tmp_path / "copy"))[1]
    assert message.startswith("checkpoint iter_0000003: common.pt is damaged (SHA-256 differs): every file")
    assert message.endswith("Remove --strict-load to fall back to the previous one.")


def test_damage_seen_by_one_rank_is_acted_upon_by_all(single: tuple[Path, Outcome], tmp_path: Path) -> None:
    """The ranks hash different files, but must come to the same verdict."""
    path = damaged_copy(single[0], tmp_path / "copy") / "metadata.json"
    path.write_bytes(path.read_bytes() + b" ")
    outcomes = run_ranks(3, resume, {"context_parallel_size": 3}, str(tmp_path / "copy"))
    assert [outcome.started_at for outcome in outcomes] == [2, 2, 2]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    message = run_ranks(1, refusal, {}, str(tmp_path))[0]
    assert message.startswith(f"no intact checkpoint in {tmp_path}: --load must name a folder")


def test_another_order_of_samples_is_warned_about(single: tuple[Path, Outcome]) -> None:
    started_at, messages = run_ranks(1, resume_with_log, {"train_iters": 50}, str(single[0]))[0]
    assert started_at == SAVED_AT
    expected = (
        "train_iters * global_batch_size is 20 in the checkpoint and 200 here: training samples come in a "
    )
    expected += "different order, from sample 12 on"
    assert any(expected in message for message in messages), messages
    assert run_ranks(1, resume_with_log, {}, str(single[0]))[0] == (SAVED_AT, [])


# ---- other models, hostile files ------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_names_the_keys(single: tuple[Path, Outcome]) -> None:
    overrides = {"hidden_size": 64, "num_query_groups": 4}
    message = run_ranks(1, refusal, overrides, str(single[0]))[0]
    assert "hidden_size is 32 in the checkpoint and 64 here" in message
    assert "num_query_groups is 2 in the checkpoint and 4 here" in message
    assert "num_layers" not in message


ROPE = {"rotary_base": 500000.0, "rotary_percent": 0.5}


def test_new_rope_parameters_are_for_finetuning(single: tuple[Path, Outcome]) -> None:
    """Context extension changes them. Resuming with them is refused: weights would silently change their meaning."""
    message = run_ranks(1, refusal, ROPE, str(single[0]))[0]
    assert "rotary_base is 10000.0 in the checkpoint and 500000.0 here, rotary_percent is 1.0" in message
    assert message.endswith(
        "or start from its weights alone with --finetune, which may change RoPE and add adapters."
    )
    started_at, (said,) = run_ranks(1, resume_with_log, {**ROPE, "finetune": True}, str(single[0]))[0]
    assert started_at == 0
    assert "rotary_base is 10000.0 in the checkpoint and 500000.0 here" in said
    assert said.endswith("training continues with the values of this run")
    other = {**ROPE, "finetune": True, "swiglu": False}
    refused = run_ranks(1, refusal, other, str(single[0]))[0]
    assert "swiglu is True in the checkpoint and False here: a checkpoint fits only the model" in refused
    assert "rotary" not in refused


@pytest.mark.parametrize("finetune", [False, True])
def test_a_new_window_is_reported(single: tuple[Path, Outcome], finetune: bool) -> None:
    changed = {"window_size": (7, 0), "window_attn_skip_freq": 2, "finetune": finetune}
    started_at, (said,) = run_ranks(1, resume_with_log, changed, str(single[0]))[0]
    assert started_at == (0 if finetune else SAVED_AT)
    assert "window_attn_skip_freq is None in the checkpoint and 2 here" in said
    assert "window_size is None in the checkpoint and [7, 0] here: training continues" in said


def test_the_same_window_is_not(tmp_path: Path) -> None:
    window = {"window_size": (7, 0)}
    run_ranks(1, train_and_save, window, str(tmp_path))
    assert run_ranks(1, resume_with_log, window, str(tmp_path))[0] == (SAVED_AT, [])


def test_another_softmax_is_another_model(single: tuple[Path, Outcome]) -> None:
    message = run_ranks(1, refusal, {"softmax_type": "off-by-one"}, str(single[0]))[0]
    assert "softmax_type is None in the checkpoint and off-by-one here" in message


def test_a_checkpoint_of_another_optimizer_names_the_keys(single: tuple[Path, Outcome]) -> None:
    message = run_ranks(1, refusal, {"optimizer": "sgd"}, str(single[0]))[0]
    assert "optimizer is adam in the checkpoint and sgd here" in message
    assert message.endswith("or --no-load-optim.")
    outcome = run_ranks(1, resume, {"optimizer": "sgd", "no_load_optim": True}, str(single[0]))[0]
    assert outcome.losses[0] == single[1].losses[SAVED_AT]


@pytest.mark.parametrize("name", [".metadata", "common.pt", "random/rank_00000.pt"])
def test_hostile_files_with_a_matching_manifest_are_refused(
    single: tuple[Path, Outcome], tmp_path: Path, name: str
) -> None:
    """The manifest guards against accidents. An attacker who writes hostile files can also write a manifest."""
    for case in ("os.system-4", "exec-in-dict-2", "INST", "dotted"):
        root, canary = tmp_path / case, tmp_path / "canary"
        folder = damaged_copy(single[0], root)
        (folder / name).write_bytes(dict(payloads(canary))[case])
        manifest = Manifest.read(folder)
        files = tuple(record_files(folder, [record.name for record in manifest.files]))
        (folder / MANIFEST_NAME).write_text(replace(manifest, files=files).dumps())
        message = run_ranks(1, refusal, {}, str(root))[0]
        assert "a checkpoint is data and may not contain code" in message
        assert not canary.exists()


def load_with_extra_state(root: str) -> str:
    """Simulates a Transformer Engine layer for which the file contains a pickle."""
    from megatron_lightseq.training.checkpoint import loading as checkpoint

    read = checkpoint._read_state

    def hostile(folder: Path, template: dict[str, Any]) -> dict[str, Any]:
        state = read(folder, template)
        state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.ones(9, dtype=torch.uint8)
        return state

    checkpoint._read_state = hostile
    try:
        return refusal({}, root)
    finally:
        checkpoint._read_state = read


def test_a_pickle_for_a_module_is_refused(single: tuple[Path, Outcome]) -> None:
    message = run_ranks(1, load_with_extra_state, str(single[0]))[0]
    assert message.startswith(
        "decoder.layers.0.mlp.linear_fc1._extra_state holds a pickle: a checkpoint is data"
    )


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    message = run_ranks(1, save_twice_without_room, str(tmp_path))[0]
    assert "rank 0: OSError: [Errno 27] File too large: every rank must be able to write its part" in message
    assert message.endswith("older checkpoints are untouched.")
    assert CheckpointDirectory(root=tmp_path).clean() == [], "no files may be left on the full disk"
    outcome = run_ranks(1, resume, {}, str(tmp_path))[0]
    assert outcome.started_at == 1


def save_twice_without_room(root: str) -> str:
    """The second save runs into a file size limit, which fails like a full disk."""
    import resource
    import signal

    from megatron_lightseq.training.checkpoint.saving import save_checkpoint
    from megatron_lightseq.training.checkpoint.state import Position

    with saved_runs.built({}) as training:
        save_checkpoint(training, Path(root), Position(iteration=1, consumed_samples=4))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            save_checkpoint(training, Path(root), Position(iteration=2, consumed_samples=8))
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise AssertionError("there was room")


@pytest.mark.parametrize(
    "overrides", [{}, {"bf16": True}, {"use_distributed_optimizer": True}, {"optimizer": "sgd"}]
)
def test_a_run_stopped_before_its_first_step_resumes(tmp_path: Path, overrides: dict[str, Any]) -> None:
    whole = run_ranks(1, train_and_save, overrides, str(tmp_path), (0,))[0]
    resumed = run_ranks(1, resume, overrides, str(tmp_path))[0]
    assert resumed.started_at == 0
    assert resumed.losses == whole.losses


def test_stored_weights_are_what_was_trained(tmp_path: Path) -> None:
    """If parameters are still being gathered (overlap_param_gather), a save must wait for them."""
    overlapped = {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    whole = run_ranks(2, train_and_save, overlapped, str(tmp_path))[0]
    weights_only = {"no_load_optim": True}
    outcome = run_ranks(1, resume, weights_only, str(tmp_path))[0]
    assert outcome.losses[0] == pytest.approx(whole.losses[SAVED_AT], rel=1e-5)
    assert torch.isfinite(torch.tensor(outcome.losses)).all()
