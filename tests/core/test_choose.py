from __future__ import annotations

import pytest

from megatron_lightseq.errors import ConfigError, LayoutError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    NETWORKS,
    Chooser,
    Direction,
    Network,
    Problem,
    TensorShape,
    rank_methods,
    reason,
)
from megatron_lightseq.schedule.choose import candidates, exchange_messages
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.schedule.network import transfer_times
from megatron_lightseq.tools.lengths import draw

NVLINK, TWO_LEVELS = Network.parse("nvlink"), Network.parse("nvlink+100gbps")
FIXED = {
    "contiguous": ["lightseq", "ring", "all_gather", "ulysses", "usp", "usp:2", "usp:4"],
    "zigzag": [
        "zigzag",
        "all_gather",
        "mesh",
        "mesh:2x4",
        "mesh:2x8",
        "mesh:3x8",
        "mesh:4x2",
        "ulysses",
        "usp",
        "usp:2",
    ],
    "striped": ["ring", "mesh"],
}


def shape(groups: int) -> TensorShape:
    return TensorShape(num_heads=32, num_query_groups=groups)


def fits(method: str, cp_size: int) -> bool:
    name, _, sizes = method.partition(":")
    if name == "balanced":
        return True
    sizes = sizes.removesuffix("-balanced")
    if "x" in sizes:
        rows, columns = map(int, sizes.split("x"))
        return rows * columns == cp_size
    return not sizes or cp_size % int(sizes) == 0


@pytest.mark.parametrize("groups", [32, 8, 4, 1])
@pytest.mark.parametrize("network", [NVLINK, TWO_LEVELS], ids=lambda network: network.name)
@pytest.mark.parametrize("cp_size", [2, 3, 4, 8, 16, 24])
def test_auto_is_never_far_behind_the_best_fixed_method(cp_size: int, network: Network, groups: int) -> None:
    seq_length = cp_size * 4096
    chooser = Chooser(cp_size, seq_length)
    best = min(
        sum(
            chooser.predict(method, layout, direction, shape(groups), network).seconds
            for direction in Direction
        )
        for layout, methods in FIXED.items()
        for method in methods
        if fits(method, cp_size)
    )
    assert chooser.rank(shape(groups), network)[0].seconds <= 1.05 * best


BALANCED = [f"balanced:{steps}x{percent}" for steps in (4, 6, 8, 12) for percent in (100, 105, 125, 150, 170)]


@pytest.mark.parametrize("tokens", [2048, 32768])
@pytest.mark.parametrize("name", ["wlb", "longalign", "chat"])
@pytest.mark.parametrize("cp_size", [2, 3, 8])
def test_auto_is_never_behind_on_packed_documents(cp_size: int, name: str, tokens: int) -> None:
    """The whole grid: python scripts/measure_schedules.py packed."""
    mask = Mask.documents(draw(name, cp_size * tokens, 0))
    chooser = Chooser(cp_size, cp_size * tokens, mask)
    fixed = {
        **{layout: [*methods] for layout, methods in FIXED.items() if layout != "striped"},
        "contiguous": [*FIXED["contiguous"], *BALANCED, "balanced", "usp:2-balanced", "usp:4-balanced"],
    }
    for groups in (32, 4):
        best = min(
            sum(chooser.predict(method, layout, way, shape(groups), NVLINK).seconds for way in Direction)
            for layout, methods in fixed.items()
            for method in methods
            if fits(method, cp_size)
        )
        assert chooser.rank(shape(groups), NVLINK)[0].seconds <= 1.02 * best


def test_the_choice_depends_on_heads_and_network() -> None:
    def first(groups: int, network: Network) -> str:
        return rank_methods(16, shape(groups), 16 * 8192, network=network)[0].name

    assert first(32, NVLINK) != first(32, TWO_LEVELS)
    assert first(32, TWO_LEVELS) != first(1, TWO_LEVELS)


def test_the_reason_gives_the_figures_of_the_best_two() -> None:
    choices = rank_methods(8, shape(8), 8 * 4096, network=TWO_LEVELS)
    text = reason(choices)
    assert text.startswith(f"{choices[0].name} on the {choices[0].layout} layout: ")
    assert "Next best: " in text
    assert "MiB" in str(choices[0])
    assert reason(choices[:1]).endswith(" ms in kernels.")


def test_ranking_keeps_to_the_shards_that_are_there() -> None:
    choices = rank_methods(8, shape(8), 8 * 4096, layouts=["striped"])
    assert {choice.layout for choice in choices} == {"striped"}
    odd = rank_methods(3, shape(8), 9)  # zigzag would need a multiple of 6
    assert {choice.layout for choice in odd} == {"contiguous"}
    with pytest.raises(LayoutError, match="seq_length 10 over cp_size 3"):
        rank_methods(3, shape(8), 10)


def test_candidates_are_methods_that_can_run() -> None:
    for cp_size in (1, 2, 5, 12, 16):
        for layout in ("contiguous", "zigzag", "striped"):
            problem = Problem(
                layout=SequenceLayout(layout, cp_size),
                mask=Mask.causal(),
                seq_length=2 * cp_size,
                shape=shape(4),
                network=TWO_LEVELS,
            )
            names = candidates(problem)
            assert all(fits(name, cp_size) for name in names)
            assert len(names) == len(set(names))


def test_ports_are_shared_and_cards_are_the_nodes() -> None:
    network = Network(
        name="n", link_bytes_per_s=10.0, ranks_per_node=2, nic_bytes_per_s=5.0, nic_latency_s=1.0
    )
    inside = transfer_times([(0, 1, 10)], [0.0, 0.0, 0.0, 0.0], network)
    assert inside == [1.0, 1.0, 0.0, 0.0]
    one = transfer_times([(0, 2, 10)], [0.0] * 4, network)
    assert one == [3.0, 0.0, 3.0, 0.0]  # 10 bytes at 5, and the latency
    two = transfer_times([(0, 2, 10), (1, 3, 10)], [0.0, 0.5, 0.0, 0.0], network)
    assert two == [5.0, 5.5, 5.0, 5.5]  # both cards carry 20 bytes; rank 1 starts late
    assert set(NETWORKS) >= {"nvlink", "nvlink+100gbps"}


def test_a_network_may_be_written_down() -> None:
    text = "link=100GB/s, latency=5us, ranks_per_node=4, nic=100Gbit/s, nic_latency=0.01ms"
    assert Network.parse(text) == Network(
        name=text,
        link_bytes_per_s=100e9,
        link_latency_s=pytest.approx(5e-6),
        ranks_per_node=4,
        nic_bytes_per_s=12.5e9,
        nic_latency_s=pytest.approx(1e-5),
    )
    assert Network.parse("link=1Gbit/s").link_bytes_per_s == 125e6


@pytest.mark.parametrize(
    "text",
    [
        "token ring",
        "",
        "link=450",  # no unit
        "link=450us",
        "link=-1GB/s",
        "link=0GB/s",
        "latency=5us",
        "link=1GB/s, link=2GB/s",
        "link=1GB/s, ranks_per_node=2.5",
        "link=1GB/s, color=3",
    ],
)
def test_an_unknown_network_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"network '{text}'.*nvlink.*link=450GB/s"):
        Network.parse(text)


def test_concurrent_rings_share_the_card() -> None:
    ring = TWO_LEVELS.of_one_ring(4)
    assert (ring.ranks_per_node, ring.nic_bytes_per_s) == (2, 12.5e9 / 4)
    assert TWO_LEVELS.of_one_ring(16).ranks_per_node == 1
    assert NVLINK.of_one_ring(4) == NVLINK


@pytest.mark.parametrize("direction", Direction)
def test_exchanged_bytes_balance(direction: Direction) -> None:
    """If heads divide evenly, every rank sends (u - 1) / u of its share in both exchanges."""
    problem = Problem(
        layout=SequenceLayout.contiguous(8),
        mask=Mask.causal(),
        seq_length=8 * 16,
        direction=direction,
        shape=TensorShape(num_heads=8, num_query_groups=8),
    )
    there, back = exchange_messages(problem, HeadCut.of(problem.shape, 4))
    for messages in (there, back):
        sent = {rank: sum(size for src, _, size in messages if src == rank) for rank in range(8)}
        assert len(set(sent.values())) == 1
        assert all(src // 4 == dst // 4 for src, dst, _ in messages)
