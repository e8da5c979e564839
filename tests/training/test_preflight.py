from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_lightseq.config import Machine, PretrainConfig, keys, resolve, with_values
from megatron_lightseq.errors import ConfigError, PeerFailureError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import build
from megatron_lightseq.training.job.join import facts
from megatron_lightseq.training.job.preflight import agree, compare, config_fingerprint, describe

CPU = torch.device("cpu")


def preflight(*reports: dict[str, str] | None, timeout_s: float = 5.0) -> list[Exception | None]:
    """The error that each rank raises. A report of None stands for a rank that never starts."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=5), wait_for_workers=False)
    outcomes: list[Exception | None] = [None] * len(reports)

    def run(rank: int, report: dict[str, str]) -> None:
        client = dist.TCPStore(
            "127.0.0.1", server.port, None, False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        try:
            agree(client, report, rank=rank, world_size=len(reports), timeout_s=timeout_s)
        except (ConfigError, PeerFailureError) as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(i, r)) for i, r in enumerate(reports) if r is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


def test_equal_ranks_agree() -> None:
    assert preflight(*[{"torch": "2.13", "lr": "0.1"}] * 4) == [None] * 4


def test_the_table_names_key_value_and_ranks() -> None:
    usual = {"torch": "2.13", "cp_method": '"lightseq"', "lr": "0.1"}
    odd = {**usual, "cp_method": '"ring"'}
    errors = preflight(usual, usual, odd, usual)
    assert all(isinstance(error, ConfigError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    lines = str(errors[0]).splitlines()
    assert lines[0].startswith(
        "The ranks disagree before the first step: all ranks must run the same versions"
    )
    assert [line.split() for line in lines[1:]] == [
        ["key", "value", "ranks"],
        ["cp_method", '"lightseq"', "0-1,", "3"],
        ['"ring"', "2"],
    ]


def test_a_key_that_only_one_version_has_is_a_difference() -> None:
    table = compare([{"a": "1"}, {"a": "1", "new": "2"}])
    assert "(absent)" in table
    assert "new" in table


def test_a_rank_that_does_not_come_is_named() -> None:
    errors = preflight({"a": "1"}, {"a": "1"}, None, timeout_s=0.5)
    for error in errors[:2]:
        assert isinstance(error, PeerFailureError)
        assert str(error) == "rank 2 did not report within 0 s of the start"


def _other(value: object) -> object:
    """Another value of the same kind, not necessarily a sensible one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "more")
    return "other" if value is None else f"{value}x"


@pytest.mark.parametrize("key", keys())
def test_every_configuration_key_is_compared(key: str) -> None:
    from megatron_lightseq.config import to_flat

    config = PretrainConfig()
    changed = with_values(config, **{key: _other(to_flat(config)[key])})
    assert describe(config) != describe(changed)
    assert key in compare([describe(config), describe(changed)])
    assert config_fingerprint(config) != config_fingerprint(changed)


def test_versions_kernel_and_schedules_are_compared() -> None:
    config = with_values(PretrainConfig(), context_parallel_size=2, data_path=("x",))
    known = facts(resolve(config, Machine()), CPU, "reference")
    assert known["kernel"] == "reference"
    assert {"python", "torch", "megatron_core", "megatron_lightseq", "device", "num_threads"} <= known.keys()
    ring = facts(resolve(with_values(config, cp_method="ring"), Machine()), CPU, "reference")
    for direction in ("forward", "backward"):
        assert known[f"{direction} schedule"] != ring[f"{direction} schedule"]


def test_compared_schedules_have_the_masks_that_run() -> None:
    """A window makes tiles empty, so its schedule differs from a causal one. Every kind of layer is compared."""
    config = with_values(
        PretrainConfig(), context_parallel_size=4, data_path=("x",), window_size=(511, 0), num_layers=5
    )
    layout, window = SequenceLayout.contiguous(4), Mask.window(511, 0)

    def fingerprint(mask: Mask, direction: str) -> str:
        return build(
            "lightseq", layout, mask=mask, direction=direction, seq_length=config.training.seq_length
        ).fingerprint

    known = facts(resolve(config, Machine()), CPU, "reference")
    mixed = facts(resolve(with_values(config, window_attn_skip_freq=3), Machine()), CPU, "reference")
    for direction in ("forward", "backward"):
        assert fingerprint(window, direction) != fingerprint(Mask.causal(), direction)
        assert known[f"{direction} schedule"] == fingerprint(window, direction)
        assert mixed[f"{direction} schedule of layers 1-2, 4-5"] == fingerprint(window, direction)
        assert mixed[f"{direction} schedule of layers 3"] == fingerprint(Mask.causal(), direction)
