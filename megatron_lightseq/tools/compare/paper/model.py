"""The cost model: what one iteration takes, from counts of work and bytes and eight constants of the hardware.

    linear layers      4 forwards' worth (forward, recomputation, twice for backward), shared evenly
    attention          2 matrix products forward, 5 backward, over the causal half of the square; Megatron and Ulysses
                       run it on whole sequences, and once more for recomputation; LightSeq plays its schedule
    TP + SP            14 all-gathers and reduce-scatters of the whole activation a layer, with recomputation
                       (DistFlashAttn, section 3.3); its heads are padded to a multiple of the GPUs
    Ulysses            all-to-all of q, k, v and out; heads padded likewise

Norms, activations and data parallelism are not counted one by one: the rate of the linear layers covers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Costs, Method, Schedule, Simulation, TensorShape, build, simulate
from megatron_lightseq.schedule.ir import Direction, Payload, Placement
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.place import all_tiles
from megatron_lightseq.tools.compare.paper.published import Cell, PaperModel

GPUS_PER_NODE = 8
_ELEMENT_BYTES = 2
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10
"""Of attention, per (query, key) pair, head and head dimension: 2 and 5 matrix products."""
_TP_COLLECTIVES = 14
_NOMINAL_CHUNK = 64
"""Schedules do not depend on the length, so that short ones are played and scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """One set for all systems. The two of NVLink are measured ones of the hardware; six are fitted."""

    linear_flops_per_s: float
    """Everything but attention, per GPU (an A100's peak is 312e12)."""
    attention_flops_per_s: float
    """FlashAttention-2 on whole causal sequences, per GPU."""
    tile_flops_per_s: float
    """The same on tiles of a schedule."""
    node_collective_bytes_per_s: float
    """Bus bandwidth of all-gather and reduce-scatter over two nodes."""
    node_link_bytes_per_s: float
    """What one node sends the other in point-to-point messages and all-to-all, each way."""
    fixed_s: float
    """Per iteration: optimizer, and whatever else does not grow with the sequence."""
    nvlink_collective_bytes_per_s: float = 230e9
    """Bus bandwidth of NCCL's all-gather on 8 A100 with NVSwitch, as nccl-tests reports it; not fitted."""
    nvlink_bytes_per_s: float = 200e9
    """Point to point between two A100 of a node; not fitted."""


A100_CLUSTER = Constants(
    linear_flops_per_s=210.3e12,
    attention_flops_per_s=168.4e12,
    tile_flops_per_s=173.8e12,
    node_collective_bytes_per_s=98.53e9,
    node_link_bytes_per_s=59.39e9,
    fixed_s=0.4445,
)
"""What :func:`fit.fit` finds on the 12 cells of :data:`published.FITTED`; a test fits again and compares. For what
they mean: eight cards of 100 Gbps a node carry 100e9 bytes per second, and FlashAttention-2 reports 170e12 to 190e12
FLOP/s for causal training on an A100."""


def iteration_seconds(cell: Cell, constants: Constants = A100_CLUSTER) -> float:
    """Predicted seconds of one iteration."""
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
    """Query and key/value heads that are computed, padding included."""
    model = cell.model
    if cell.system.startswith("lightseq"):
        return model.num_heads, model.num_query_groups
    heads = -(-model.num_heads // cell.gpus) * cell.gpus
    return heads, heads if model.num_query_groups == model.num_heads else model.num_query_groups


def _layer_parameters(model: PaperModel, heads: int, groups: int) -> int:
    projections = (2 * heads + 2 * groups) * model.head_dim
    return model.hidden_size * (projections + 3 * model.ffn_hidden_size)


def _tensor_parallel(cell: Cell, heads: int, groups: int, constants: Constants) -> float:
    """Seconds of a layer's collectives."""
    del heads, groups
    on_one_node = cell.gpus <= GPUS_PER_NODE
    rate = constants.nvlink_collective_bytes_per_s if on_one_node else constants.node_collective_bytes_per_s
    size = cell.seq_length * cell.model.hidden_size * _ELEMENT_BYTES
    return _TP_COLLECTIVES * size * (cell.gpus - 1) / cell.gpus / rate


def _all_to_all(cell: Cell, heads: int, groups: int, constants: Constants) -> float:
    """Seconds of a layer's exchanges of q, k, v and out: forward, recomputation and backward."""
    sent = 3 * (2 * heads + 2 * groups) * cell.model.head_dim * _ELEMENT_BYTES * cell.seq_length / cell.gpus
    elsewhere = 1 - GPUS_PER_NODE / cell.gpus
    inside = GPUS_PER_NODE / cell.gpus - 1 / cell.gpus
    between = sent * GPUS_PER_NODE * elsewhere / constants.node_link_bytes_per_s
    return max(between, sent * inside / constants.nvlink_bytes_per_s)


def _scheduled_attention(cell: Cell, constants: Constants) -> float:
    """Seconds of a layer's attention, transfers that kernels do not hide with it."""
    forward = play(PAPER_LIGHTSEQ, cell, Direction.FORWARD, constants).makespan_s
    backward = play(PAPER_LIGHTSEQ, cell, Direction.BACKWARD, constants).makespan_s
    return backward + forward * (2 if cell.system == "lightseq-recompute" else 1)


def play(
    method: Method,
    cell: Cell,
    direction: Direction,
    constants: Constants = A100_CLUSTER,
    overlap: bool = True,
) -> Simulation:
    """One layer's attention by ``method`` on the cell's GPUs, in seconds."""
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
    """Partial results and gradients travel in the inputs' 16 bits there, and statistics are not counted."""

    def bytes_per_token(self, payload: Payload) -> int:
        """Bytes that one token of ``payload`` takes on the wire."""
        q = self.num_heads * self.head_dim * _ELEMENT_BYTES * self.batch
        kv = 2 * self.num_query_groups * self.head_dim * _ELEMENT_BYTES * self.batch
        sizes = {Payload.KV: kv, Payload.DKV: kv, Payload.QDO: 3 * q}  # q, out and dout: delta is not shipped
        return sizes.get(payload, q)


def place_paper(layout: SequenceLayout, mask: Mask) -> Placement:
    """Algorithm 2 as published: for even P half of the ranks have nothing to do in the last step."""
    del mask
    size = layout.cp_size

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
