"""The cost model: its parts, what it predicts of published measurements, and the search that it ranks for."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib import image

from megatron_lightseq.cli import run
from megatron_lightseq.config import load_config
from megatron_lightseq.config.accounting import hardware_flops, layer_parameters, linear_flops, output_flops
from megatron_lightseq.config.flat import from_flat, with_values
from megatron_lightseq.config.rules import Machine
from megatron_lightseq.config.validate import TRAINING_RULES, violations
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.schedule import Network
from megatron_lightseq.tools.planner.cluster import Cluster, gpu_named, with_memory
from megatron_lightseq.tools.planner.cost import StepTime, predict_time
from megatron_lightseq.tools.planner.draw import pipeline_spans
from megatron_lightseq.tools.planner.published import published
from megatron_lightseq.tools.planner.rates import A100_CLUSTER, rates_of
from megatron_lightseq.tools.planner.request import Request
from megatron_lightseq.tools.planner.search import reasons, search

LLAMA_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "seq_length": 131072,
    "global_batch_size": 16,
    "bf16": True,
    "cp_method": "lightseq",
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def request_of(cluster: str | Cluster, **values: object) -> Request:
    made = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
    return Request(config=with_values(from_flat(LLAMA_8B), **values), cluster=made, vocab_size=128256)


def predicted(cluster: str | Cluster, **values: object) -> StepTime:
    return predict_time(request_of(cluster, **values))


def test_parts_of_flops_add_up() -> None:
    config = request_of("h100:8", context_parallel_size=8).config
    products = 6.0 * 131072 * 16 * 32 * 65536 * 32 * 256
    assert hardware_flops(config, 128256) - linear_flops(config, 128256) == pytest.approx(products)
    assert output_flops(config, 128256) == 6.0 * 131072 * 16 * 4096 * 128256
    assert layer_parameters(config, 1) == (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336, 0)
    experts = with_values(config, num_experts=8, moe_ffn_hidden_size=512)
    assert layer_parameters(experts, 1)[1] == 8 * 3 * 4096 * 512


def test_kernels_take_what_the_rates_say() -> None:
    found = predicted("h100:8", context_parallel_size=8)
    rates = rates_of(Cluster.parse("h100:8"))
    config = request_of("h100:8", context_parallel_size=8).config
    assert found.matrix_products == pytest.approx(linear_flops(config, 128256) / 8 / rates.linear_flops_per_s)
    attention = 16 * 32 * 14 * 32 * 128 * 131072**2 / 2 / 8  # 4 + 10 operations per pair, head and dimension
    assert found.attention == pytest.approx(attention / rates.tile_flops_per_s, rel=0.01)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert 0.3 < found.utilisation < 0.7


def test_what_costs_more_takes_longer() -> None:
    base = {"context_parallel_size": 8}
    kept, repeated = (
        predicted("h100:8", **base, keep_attention_on_recompute=keep).attention for keep in (True, False)
    )
    assert repeated == pytest.approx(kept * 18 / 14)
    slow = Cluster.of(gpu_named("h100"), 16, network=Network.parse("link=450GB/s,ranks_per_node=8,nic=2GB/s"))
    wide = {"context_parallel_size": 16}
    assert predicted(slow, **wide).attention_transfers > 2 * predicted("h100:8x2", **wide).attention_transfers
    staged = predicted("h100:8", pipeline_model_parallel_size=4)
    finer = predicted("h100:8", pipeline_model_parallel_size=4, num_layers_per_virtual_pipeline_stage=4)
    assert staged.bubble > 0
    assert finer.bubble < 0.6 * staged.bubble
    assert predicted("h100:8", tensor_model_parallel_size=8).tensor_transfers > 0
    assert predicted("h100:8").tensor_transfers == 0
    lone, overlapped = (predicted("h100:8", overlap_grad_reduce=on).data_transfers for on in (False, True))
    assert overlapped < lone


def test_rates_of_the_papers_gpus_are_the_fitted_ones() -> None:
    network = Network.parse("link=300GB/s,ranks_per_node=8,nic=100GB/s")
    found = rates_of(Cluster.of(gpu_named("a100-40"), 16, network=network))
    assert found.linear_flops_per_s == A100_CLUSTER.linear_flops_per_s
    assert found.node_link_bytes_per_s == pytest.approx(A100_CLUSTER.node_link_bytes_per_s)
    assert found.fixed_s == 0


def test_published_measurements_are_predicted() -> None:
    """Nothing is fitted to these. Short sequences on one node take longer than the model says, for every system."""
    found = published()
    steps = [abs(row.error) for row in found if row.unit == "s per step"]
    long = [
        abs(row.error)
        for row in found
        if row.unit == "tokens/s" and ("512K" in row.what or "700K" in row.what)
    ]
    rings = [abs(row.error) for row in found if row.what.startswith("ring")]
    assert max(steps) < 0.15
    assert max(long) < 0.05
    assert max(rings) < 0.05
    assert statistics.median(abs(row.error) for row in found) < 0.15


def test_search_finds_what_fits_and_is_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "num_layers: 8\nhidden_size: 1024\nnum_attention_heads: 8\nnum_query_groups: 2\nbf16: true\n"
    )
    written, drawn = tmp_path / "best.yaml", tmp_path / "plan.png"
    settings = ["seq_length=65536", "global_batch_size=8"]
    arguments = ["--gpus", "4", "--set", *settings, "--search", "--no-longest"]
    assert run(["plan", str(path), *arguments, "--write", str(written), "--png", str(drawn)]) == 0
    told = capsys.readouterr().out
    assert "layouts predicted" in told
    assert "5. TP" in told
    assert "tokens/s" in told
    again = load_config([str(written), "--data-path", "x"], machine=Machine(world_size=4, num_gpus=4))
    assert again.training.seq_length == 65536
    assert not violations(again, Machine(world_size=4), rule_sets=TRAINING_RULES)
    assert "# Planned, not run" in written.read_text()
    assert image.imread(drawn).shape[1] > 1000


def test_search_ranks_by_time_and_says_why() -> None:
    small = Cluster.of(with_memory(gpu_named("h100"), 16.0), 4)
    request = request_of(
        small, num_layers=4, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=8, seq_length=32768
    )
    ranking = search(request, count=2)
    first, second = ranking.found
    assert first.time.seconds <= second.time.seconds
    assert first.memory.fits
    assert ranking.considered > 20
    assert ranking.traced < ranking.considered / 4, "most that do not fit are not traced"
    first_reason, second_reason = reasons(ranking)
    assert "most of its time is" in first_reason
    assert "slower" in second_reason or second_reason == "as fast"
    tiny = Request(
        config=request.config, cluster=Cluster.of(with_memory(small.gpu, 0.9), 4), vocab_size=128256
    )
    with pytest.raises(ConfigError, match=r"layouts on .*a GPU has 0.9 GiB.*Use more GPUs"):
        search(tiny)


def test_pipeline_is_one_forward_one_backward() -> None:
    spans = pipeline_spans(4, 8, 3.0)
    assert len(spans) == 2 * 4 * 8
    assert max(span.start + span.seconds for span in spans) == pytest.approx((8 + 3) * 3.0)
    for stage in range(4):
        own = sorted((span.start, span.seconds) for span in spans if span.stage == stage)
        for (start, seconds), (following, _) in pairwise(own):
            assert start + seconds <= following + 1e-9
