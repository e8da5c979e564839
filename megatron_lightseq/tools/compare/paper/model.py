"""The duration of the paper's iterations, from counts of operations and bytes and the cost model's rates.

    linear layers      4 times the forward pass (forward, recomputation, and backward twice as much), evenly shared
    attention          2 matrix products forward, 5 backward, for the causal half of the scores; Megatron and Ulysses
                       compute whole sequences, with recomputation; LightSeq is simulated with its schedule
    TP + SP            14 all-gathers and reduce-scatters of the full activation per layer, with recomputation
                       (DistFlashAttn, section 3.3); heads are padded to a multiple of the number of GPUs
    Ulysses            all-to-all of q, k, v and out; heads are padded in the same way

Norms, activations and data parallelism are not modelled individually: the rate of the linear layers includes them.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule import (
    Costs,
    Method,
    Problem,
    Schedule,
    Simulation,
    TensorShape,
    build,
    simulate,
)
from megatron_lightseq.schedule.ir import Direction, Payload, Placement
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.place import all_tiles
from megatron_lightseq.tools.compare.paper.published import Cell, PaperModel
from megatron_lightseq.tools.planner.cluster import Cluster, gpu_named
from megatron_lightseq.tools.planner.rates import A100_CLUSTER, Rates

GPUS_PER_NODE = 8
_ELEMENT_BYTES = 2
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10
"""Operations of attention per (query, key) pair, head and head dimension: 2 and 5 matrix products."""
_TP_COLLECTIVES = 14
_NOMINAL_CHUNK = 64
"""Schedules do not depend on the sequence length, so short ones are simulated, and times are scaled."""


def iteration_seconds(cell: Cell, constants: Rates = A100_CLUSTER) -> float:
    """Predicted duration of one iteration in seconds."""
    heads, groups = _heads(cell)
    model, tokens = cell.model, cell.seq_length / cell.gpus
    linear = 8 * _layer_parameters(model, heads, groups) * model.num_layers
    linear += 6 * model.vocab_size * model.hidden_size
    seconds = constants.fixed_s + linear * tokens / constants.linear_flops_per_s
    if cell.system in ("lightseq", "lightseq-recompute"):
        return seconds + model.num_layers * _scheduled_attention(cell, constants)
    flops = (2 * _FORWARD_FLOPS + _BACKWARD_FLOPS) * heads * model.head_dim * cell.seq_length**2 / 2
    seconds += model.num_layers * flops / cell.gpus / constants.attention_flops_per_s
    collectives = _tensor_parallel if cell.system == "megatron" else _all_to_all
    return seconds + model.num_layers * collectives(cell, heads, groups, constants)


def _heads(cell: Cell) -> tuple[int, int]:
    """Number of query and key/value heads that are computed, including padding."""
    model = cell.model
    if cell.system.startswith("lightseq"):
        return model.num_heads, model.num_query_groups
    heads = -(-model.num_heads // cell.gpus) * cell.gpus
    return heads, heads if model.num_query_groups == model.num_heads else model.num_query_groups


def _layer_parameters(model: PaperModel, heads: int, groups: int) -> int:
    projections = (2 * heads + 2 * groups) * model.head_dim
    return model.hidden_size * (projections + 3 * model.ffn_hidden_size)


def _tensor_parallel(cell: Cell, heads: int, groups: int, constants: Rates) -> float:
    """Duration of the collectives of one layer in seconds."""
    del heads, groups
    size = cell.seq_length * cell.model.hidden_size * _ELEMENT_BYTES
    nodes = Cluster.of(gpu_named("a100-40"), cell.gpus, gpus_per_node=GPUS_PER_NODE)
    return _TP_COLLECTIVES * constants.collective_seconds(size, cell.gpus, 1, nodes)


def _all_to_all(cell: Cell, heads: int, groups: int, constants: Rates) -> float:
    """Duration of the exchanges of q, k, v and out of one layer in seconds: forward, recomputation and backward."""
    sent = 3 * (2 * heads + 2 * groups) * cell.model.head_dim * _ELEMENT_BYTES * cell.seq_length / cell.gpus
    to_other_nodes = 1 - GPUS_PER_NODE / cell.gpus
    within_node = GPUS_PER_NODE / cell.gpus - 1 / cell.gpus
    between_nodes_s = sent * GPUS_PER_NODE * to_other_nodes / constants.node_link_bytes_per_s
    return max(between_nodes_s, sent * within_node / constants.nvlink_bytes_per_s)


def _scheduled_attention(cell: Cell, constants: Rates) -> float:
    """Duration of attention in one layer in seconds, including transfers that are not hidden."""
    forward = simulate_attention(PAPER_LIGHTSEQ, cell, Direction.FORWARD, constants).makespan_s
    backward = simulate_attention(PAPER_LIGHTSEQ, cell, Direction.BACKWARD, constants).makespan_s
    return backward + forward * (2 if cell.system == "lightseq-recompute" else 1)


def simulate_attention(
    method: Method,
    cell: Cell,
    direction: Direction,
    constants: Rates = A100_CLUSTER,
    overlap: bool = True,
) -> Simulation:
    """Simulate attention of one layer with ``method`` on the GPUs of a cell; times are in seconds."""
    model, schedule = cell.model, _schedule(method, cell.gpus, direction)
    longer = cell.seq_length / schedule.seq_length
    flops = _FORWARD_FLOPS if direction is Direction.FORWARD else _BACKWARD_FLOPS
    pair_s = flops * model.num_heads * model.head_dim / constants.tile_flops_per_s
    network = Network(
        name="DGX A100",
        link_bytes_per_s=constants.nvlink_bytes_per_s / longer,
        ranks_per_node=GPUS_PER_NODE,
        nic_bytes_per_s=constants.node_link_bytes_per_s / longer,
    )
    shape = PaperShape(
        num_heads=model.num_heads, num_query_groups=model.num_query_groups, head_dim=model.head_dim
    )
    return simulate(
        schedule, Costs(seconds_per_pair=pair_s * longer**2, network=network, overlap=overlap), shape
    )


class PaperShape(TensorShape):
    """Partial results and gradients are sent with 16 bits in the paper, and softmax statistics are not counted."""

    def bytes_per_token(self, payload: Payload) -> int:
        """Bytes sent per token of ``payload``."""
        q = self.num_heads * self.head_dim * _ELEMENT_BYTES * self.batch
        kv = 2 * self.num_query_groups * self.head_dim * _ELEMENT_BYTES * self.batch
        sizes = {Payload.KV: kv, Payload.DKV: kv, Payload.QDO: 3 * q}  # q, out and dout; delta is not sent
        return sizes.get(payload, q)


def place_paper(problem: Problem) -> Placement:
    """Algorithm 2 as published: for even P, half of the ranks are idle in the last step."""
    layout, size = problem.layout, problem.layout.cp_size

    def remote(rank: int, t: int) -> list[tuple[int, int]]:
        if t <= rank:
            return [(rank, rank - t)]
        return [] if 2 * t == size else [(size + rank - t, rank)]

    pairs = [[[(rank, rank)] for rank in range(size)]]
    pairs += [[remote(rank, t) for rank in range(size)] for t in range(1, size // 2 + 1)]
    return [[[tile for q, k in cell for tile in all_tiles(layout, q, k)] for cell in row] for row in pairs]


PAPER_LIGHTSEQ = Method("paper-lightseq", place_paper, only_layouts=("contiguous",))


@lru_cache(maxsize=32)
def _schedule(method: Method, gpus: int, direction: Direction) -> Schedule:
    layout = SequenceLayout(method.default_layout, gpus)
    return build(method, layout, direction=direction, seq_length=layout.num_chunks * _NOMINAL_CHUNK)
