"""The cost model: how long the parts of a training step take, from counts of operations and bytes.

    matrix products    operations of the linear layers, recomputed ones included, at one rate
    attention          the schedule that would run, simulated (:mod:`megatron_lightseq.schedule.simulate`)
    transfers          what nothing overlaps: of attention, and of tensor, expert, pipeline and data parallelism
    bubble             the time in which pipeline stages wait for their first and after their last micro-batch
    optimizer          the bytes that it reads and writes

The rates of a GPU are fractions of its data sheet. Those of the Ampere generation are fitted to the paper's table
(:mod:`megatron_lightseq.tools.compare.paper.fit`); with the same fractions of other generations' data sheets, attention
excepted, nothing else is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.accounting import linear_flops, output_flops, step_flops
from megatron_lightseq.config.resolved import attention_shape, layer_mask, method_of_layer
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, Network, TensorShape, rank_methods
from megatron_lightseq.schedule.choose import Chooser
from megatron_lightseq.schedule.network import Device
from megatron_lightseq.tools.planner.parameters import rank_parameters
from megatron_lightseq.tools.planner.rates import Rates, rates_of
from megatron_lightseq.tools.planner.request import Request

_OPTIMIZER_BYTES = 40
"""Read and written per parameter by the norm, Adam in fp32 and the cast to bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The parts of one training step on the slowest pipeline stage, in seconds."""

    matrix_products: float
    attention: float
    attention_transfers: float
    """Waiting in attention: transfers that kernels do not overlap, and imbalance."""
    tensor_transfers: float
    expert_transfers: float
    pipeline_transfers: float
    data_transfers: float
    """Of gradients and parameters, as far as the backward pass does not overlap them."""
    bubble: float
    optimizer: float
    tokens: int
    """Of one step."""
    model_flops: float
    """Of one step, without recomputation, over all ranks."""
    peak_flops_per_s: float
    """Of all GPUs, by the data sheet."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name, in the order of reports."""
        names = (
            "matrix_products",
            "attention",
            "attention_transfers",
            "tensor_transfers",
            "expert_transfers",
            "pipeline_transfers",
            "data_transfers",
            "bubble",
            "optimizer",
        )
        return {name.replace("_", " "): getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Over all GPUs."""
        return self.tokens / self.seconds

    @property
    def utilisation(self) -> float:
        """Model FLOP/s utilisation (MFU)."""
        return self.model_flops / self.seconds / self.peak_flops_per_s


def predict_time(request: Request) -> StepTime:
    """How long one training step takes."""
    return _Prediction(request).predict()


class _Prediction:
    def __init__(self, request: Request) -> None:
        self._request, self._config = request, request.config
        self._sizes = ParallelSizes.of(request.config, request.cluster.num_gpus)
        self._rates = rates_of(request.cluster)
        self._micro_batches = request.micro_batches
        training = self._config.training
        self._tokens = training.seq_length * training.micro_batch_size / self._sizes.context
        """Of one micro-batch on one rank."""
        self._element = 2 if training.bf16 else 4
        self._layers = self._config.model.num_layers / self._sizes.pipeline

    def predict(self) -> StepTime:
        kernels, waiting = self._attention()
        per_micro_batch = {
            "matrix_products": self._matrix_products(),
            "attention": kernels,
            "attention_transfers": waiting,
            "tensor_transfers": self._tensor(),
            "expert_transfers": self._experts(),
            "pipeline_transfers": self._pipeline(),
        }
        one = sum(per_micro_batch.values())
        parts = {name: self._micro_batches * seconds for name, seconds in per_micro_batch.items()}
        virtual = self._config.parallel.num_layers_per_virtual_pipeline_stage
        chunks = 1 if virtual is None else self._layers / virtual
        return StepTime(
            **parts,
            data_transfers=self._data(one),
            bubble=one * (self._sizes.pipeline - 1) / chunks,
            optimizer=self._optimizer(),
            tokens=self._config.training.seq_length * self._config.training.global_batch_size,
            model_flops=step_flops(self._config, self._request.vocab_size),
            peak_flops_per_s=self._request.cluster.num_gpus * self._request.cluster.gpu.peak_flops_per_s,
        )

    def _matrix_products(self) -> float:
        """Of the last stage, which has the output layer too."""
        config, vocab_size = self._config, self._request.vocab_size
        whole, output = linear_flops(config, vocab_size), output_flops(config, vocab_size)
        of_stage = (whole - output) / self._sizes.pipeline + output
        samples = config.training.global_batch_size / config.training.micro_batch_size
        return of_stage / samples / self._sizes.context / self._sizes.tensor / self._rates.linear_flops_per_s

    def _attention(self) -> tuple[float, float]:
        """Kernels and waiting of all layers of one stage."""
        config = self._config
        forwards = 2 if self._repeats_attention() else 1
        kernels = waiting = 0.0
        for number, layers in _kinds_of_layers(config).items():
            times = _layer_attention(
                method_of_layer(config, number),
                config.context.layout_name,
                self._sizes.context,
                config.training.seq_length,
                layer_mask(config, number),
                attention_shape(config),
                self._rates,
                self._group_network(),
                config.context.cp_overlap,
            )
            for direction, (compute, total) in times.items():
                count = layers * (forwards if direction is Direction.FORWARD else 1)
                kernels += count * compute
                waiting += count * (total - compute)
        return kernels / self._sizes.pipeline, waiting / self._sizes.pipeline

    def _repeats_attention(self) -> bool:
        recompute = self._config.recompute
        if recompute.recompute_granularity == "selective":
            return "core_attn" in recompute.recompute_modules and not recompute.keep_attention_on_recompute
        return recompute.recompute_granularity == "full" and not recompute.keep_attention_on_recompute

    def _group_network(self) -> Network:
        """As a context parallel group sees it: its members are a tensor parallel group apart."""
        cluster = self._request.cluster
        network = replace(
            cluster.network,
            link_bytes_per_s=self._rates.nvlink_bytes_per_s,
            nic_bytes_per_s=self._rates.node_link_bytes_per_s,
            ranks_per_node=cluster.gpus_per_node if cluster.num_gpus > cluster.gpus_per_node else None,
        )
        return network.of_one_ring(self._sizes.tensor)

    def _tensor(self) -> float:
        """All-gathers and reduce-scatters: 4 forward, 4 for recomputation, 6 backward (DistFlashAttn, section 3.3)."""
        size = self._sizes.tensor
        recomputed = self._config.recompute.recompute_granularity == "full"
        count = (14 if recomputed else 10) * self._layers
        num_bytes = self._tokens * self._config.model.hidden_size * self._element
        return count * self._rates.collective_seconds(num_bytes, size, 1, self._request.cluster)

    def _experts(self) -> float:
        """Dispatching and combining tokens: two exchanges forward, two backward, two more where recomputed."""
        experts, size = self._config.experts, self._config.parallel.expert_model_parallel_size
        if not experts.num_experts or size == 1:
            return 0.0
        layers = sum(experts.is_in(n) for n in range(1, self._config.model.num_layers + 1))
        count = (6 if self._config.recompute.recompute_granularity == "full" else 4) * layers
        num_bytes = self._tokens * experts.moe_router_topk * self._config.model.hidden_size * self._element
        cluster = self._request.cluster
        inside = min(1.0, cluster.gpus_per_node / (size * self._sizes.tensor))
        between_s = num_bytes * (1 - inside) * cluster.gpus_per_node / self._rates.node_link_bytes_per_s
        within_s = num_bytes * (inside - 1 / size) / self._rates.nvlink_bytes_per_s
        return count / self._sizes.pipeline * max(between_s, within_s)

    def _pipeline(self) -> float:
        """Hidden states forward and their gradients backward, of every virtual stage."""
        if self._sizes.pipeline == 1:
            return 0.0
        virtual = self._config.parallel.num_layers_per_virtual_pipeline_stage
        chunks = 1 if virtual is None else self._layers / virtual
        num_bytes = self._tokens * self._config.model.hidden_size * self._element
        if self._config.parallel.sequence_parallel:
            num_bytes /= self._sizes.tensor
        cluster = self._request.cluster
        crosses = cluster.num_gpus > cluster.gpus_per_node
        rate = (
            self._rates.node_link_bytes_per_s / cluster.gpus_per_node
            if crosses
            else self._rates.nvlink_bytes_per_s
        )
        return 2 * chunks * num_bytes / min(rate, self._rates.nvlink_bytes_per_s)

    def _data(self, micro_batch_s: float) -> float:
        """Gradients and parameters over the data and context parallel ranks."""
        parallel, size = self._config.parallel, self._sizes.data * self._sizes.context
        parameters = rank_parameters(self._config, self._request.vocab_size)
        rates, cluster = self._rates, self._request.cluster
        reduce_s = rates.collective_seconds(4.0 * parameters, size, self._sizes.tensor, cluster)
        gathered = self._element if parallel.use_distributed_optimizer else 4
        gather_s = rates.collective_seconds(float(gathered * parameters), size, self._sizes.tensor, cluster)
        # The last micro-batch's backward pass, two thirds of its time, overlaps all but the first layer's gradients.
        hidden = micro_batch_s * 2 / 3 if parallel.overlap_grad_reduce else 0.0
        ahead = micro_batch_s / 3 if parallel.overlap_param_gather else 0.0
        least = 1 / max(1.0, self._layers)
        return max(reduce_s * least, reduce_s - hidden) + max(gather_s * least, gather_s - ahead)

    def _optimizer(self) -> float:
        parameters = rank_parameters(self._config, self._request.vocab_size)
        if self._config.parallel.use_distributed_optimizer:
            parameters /= self._sizes.data * self._sizes.context
        return parameters * _OPTIMIZER_BYTES / self._request.cluster.gpu.memory_bytes_per_s


def _kinds_of_layers(config: PretrainConfig) -> dict[int, int]:
    """The first layer of every kind of attention, counted from 1, and how many layers are of that kind."""
    first: dict[tuple[str, bool, bool], int] = {}
    counts: dict[int, int] = {}
    for number in range(1, config.model.num_layers + 1):
        kind = method_of_layer(config, number), config.model.has_window(number), config.rope.is_in(number)
        number = first.setdefault(kind, number)
        counts[number] = counts.get(number, 0) + 1
    return counts


@cache
def _layer_attention(
    method: str,
    layout: str,
    cp_size: int,
    seq_length: int,
    mask: Mask,
    shape: TensorShape,
    rates: Rates,
    network: Network,
    overlap: bool,
) -> dict[Direction, tuple[float, float]]:
    """Kernel time of the busiest rank, and the whole time, of one layer and micro-batch, by direction."""
    forward, backward = rates.attention_flops_per_s, rates.attention_flops_per_s
    if cp_size > 1:
        forward = backward = rates.tile_flops_per_s
    device = Device(name="planned", forward_flops_per_s=forward, backward_flops_per_s=backward)
    if cp_size > 1 and method == "auto":
        best, *_ = rank_methods(
            cp_size, shape, seq_length, mask=mask, network=network, device=device, layouts=[layout]
        )
        found = {Direction.FORWARD: best.forward, Direction.BACKWARD: best.backward}
    else:
        chooser = Chooser(cp_size, seq_length, mask, device, overlap)
        name = method if cp_size > 1 else "ring"
        found = {d: chooser.predict(name, layout, d, shape, network) for d in Direction}
    return {d: (prediction.compute_s, prediction.seconds) for d, prediction in found.items()}
