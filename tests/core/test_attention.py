from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.attention import DistAttention
from megatron_lightseq.attention.distributed import MethodArgument
from megatron_lightseq.errors import ConfigError, LayoutError, TransportError, UnsupportedError
from megatron_lightseq.kernels.reference import ReferenceKernel
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Method, Network, Placement, Problem, Tile
from megatron_lightseq.schedule.place import place_ring
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle
from tests.harness.ranks import RankError, run_ranks

CASES = [("lightseq", "contiguous"), ("ring", "contiguous"), ("ring", "striped"), ("zigzag", "zigzag")]
PLACED = [
    *CASES,
    ("all_gather", "zigzag"),
    ("mesh", "zigzag"),
    ("mesh", "striped"),
    ("mesh", "contiguous"),
    ("balanced", "contiguous"),
    ("balanced:3x125", "contiguous"),
]
WRAPPED = [
    *(("ulysses", layout) for layout in LAYOUTS),
    *(("usp", layout) for layout in LAYOUTS),
    ("rsa", "contiguous"),
    ("rsa", "striped"),
]
EVERY = [*PLACED, *WRAPPED]
MASKS = ["causal", "full", "window(5,0)", "window(3,4)", "documents", "causal&documents"]
HEADS = [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (3, 3)]


def mask_for(text: str, seq_length: int) -> Mask:
    borders = sorted({0, 1, seq_length // 3, seq_length // 3 + 1, seq_length - 2, seq_length})
    return Mask.parse(text.replace("documents", f"documents({','.join(map(str, borders))})"))


def attend(
    group: Group | None,
    method: MethodArgument,
    layout: SequenceLayout,
    mask: Mask,
    whole: list[Tensor],
    overlap: bool = True,
    kernel: str | Kernel = "auto",
) -> list[Tensor]:
    """One rank's output and gradients."""
    rank = 0 if group is None else group.rank()
    q, k, v, dout = (layout.shard(x, rank, 0).clone() for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out = mls.dist_attention(
        q, k, v, group=group, layout=layout, method=method, mask=mask, overlap=overlap, kernel=kernel
    )
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return [out.detach(), *grads]


def unshard(layout: SequenceLayout, parts: list[list[Tensor]]) -> list[Tensor]:
    return [layout.unshard(shards, 0) for shards in zip(*parts, strict=True)]


def check_exact(got: list[Tensor], whole: list[Tensor], mask: Mask, what: object) -> None:
    for name, result, want in zip(oracle.NAMES, got, oracle.expected(whole, mask), strict=True):
        error = (result - want).abs().max().item()
        assert error <= 1e-12, f"{what} {name}: {error:.2e}"


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("method", "layout_name"), PLACED)
def test_loopback_equals_one_device_in_fp64(size: int, method: str, layout_name: str) -> None:
    layout, seq_length = SequenceLayout(layout_name, size), 2 * size * 7
    for index, (text, heads) in enumerate(zip(MASKS, HEADS, strict=True)):
        mask = mask_for(text, seq_length)
        whole = oracle.inputs(seq_length, heads, (8, 8 if index % 2 else 5), torch.float64)
        parts = run_loopback(size, lambda group: attend(group, method, layout, mask, whole))  # noqa: B023
        check_exact(unshard(layout, parts), whole, mask, text)


# Head counts not divisible by the numbers of ranks below, fewer key/value heads than ranks, fewer heads than ranks.
UNEVEN_HEADS = [(6, 2), (5, 1), (8, 4), (2, 2)]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("method", "layout_name"), WRAPPED)
def test_wrappers_equal_one_device_in_fp64_for_any_heads(size: int, method: str, layout_name: str) -> None:
    layout, seq_length = SequenceLayout(layout_name, size), 2 * size * 5
    for index, heads in enumerate(UNEVEN_HEADS):
        text = ("causal", "full", "causal&documents", "window(3,4)")[index]
        mask = mask_for(text, seq_length)
        whole = oracle.inputs(seq_length, heads, (8, 8 if index % 2 else 5), torch.float64)
        parts = run_loopback(size, lambda group: attend(group, method, layout, mask, whole))  # noqa: B023
        check_exact(unshard(layout, parts), whole, mask, (text, heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "layout_name"), [*CASES, ("mesh", "zigzag"), ("ulysses", "contiguous"), ("usp", "zigzag")]
)
def test_low_precision_stays_within_its_budget(
    size: int, method: str, layout_name: str, dtype: torch.dtype
) -> None:
    layout, mask = SequenceLayout(layout_name, size), Mask.causal()
    whole = oracle.inputs(2 * size * 33, (4, 2), (64, 64), dtype)
    parts = run_loopback(size, lambda group: attend(group, method, layout, mask, whole))
    oracle.check_within_budget(unshard(layout, parts), whole, mask, f"{method} on {size} ranks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_sees_an_error_that_the_dtype_does_not_explain(dtype: torch.dtype) -> None:
    mask = Mask.causal()
    whole = oracle.inputs(2 * 33, (4, 2), (64, 64), dtype)
    right = [x.to(dtype) for x in oracle.expected(whole, mask)]
    oracle.check_within_budget(right, whole, mask, "rounded once")
    for index, name in enumerate(oracle.NAMES):
        for wrong in (right[index] * (1 + 8 * torch.finfo(dtype).eps), right[index] * float("nan")):
            spoiled = [*right[:index], wrong, *right[index + 1 :]]
            with pytest.raises(AssertionError, match=f"spoiled {name}: error"):
                oracle.check_within_budget(spoiled, whole, mask, "spoiled")


def gloo_cases(whole: list[Tensor], seq_length: int) -> list[list[Tensor]]:
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    return [
        attend(
            group, method, SequenceLayout(layout, group.size()), mask_for(text, seq_length), whole, overlap
        )
        for method, layout, text, overlap in GLOO_CASES
    ]


GLOO_CASES = [
    *((*case, text, overlap) for case in CASES for text in MASKS[::5] for overlap in (True, False)),
    *((*case, text, True) for case in EVERY[len(CASES) :] for text in ("causal", "full")),
]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gloo_equals_one_device_in_fp64(size: int) -> None:
    seq_length = 2 * size * 11
    whole = oracle.inputs(seq_length, (4, 2), (8, 6), torch.float64)
    parts = run_ranks(size, gloo_cases, whole, seq_length)
    for index, (method, layout, text, _) in enumerate(GLOO_CASES):
        got = unshard(SequenceLayout(layout, size), [part[index] for part in parts])
        check_exact(got, whole, mask_for(text, seq_length), (method, layout, text))


def gloo_low_precision(whole: list[Tensor]) -> list[Tensor]:
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    return attend(group, "lightseq", SequenceLayout.contiguous(group.size()), Mask.causal(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gloo_carries_low_precision(dtype: torch.dtype) -> None:
    whole = oracle.inputs(2 * 65, (4, 2), (64, 64), dtype)
    parts = run_ranks(2, gloo_low_precision, whole)
    oracle.check_within_budget(unshard(SequenceLayout.contiguous(2), parts), whole, Mask.causal(), "gloo")


@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize(("method", "layout_name"), EVERY)
def test_runs_repeat_bit_for_bit_with_and_without_overlap(size: int, method: str, layout_name: str) -> None:
    layout, mask = SequenceLayout(layout_name, size), Mask.causal()
    whole = oracle.inputs(size * 24, (4, 2), (16, 16), torch.float32)

    def run(overlap: bool) -> list[Tensor]:
        parts = run_loopback(size, lambda group: attend(group, method, layout, mask, whole, overlap))
        return unshard(layout, parts)

    runs = [run(overlap) for overlap in (True, True, False)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_strided_views_are_taken() -> None:
    qkv = torch.randn(12, 2, 3, 4 * 8, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (4, 8)) for part in qkv.unbind(2))
    out = mls.dist_attention(q, k, v)
    torch.testing.assert_close(out, oracle.attention(q, k, v, Mask.causal()), rtol=0, atol=1e-12)


class Recorded(ReferenceKernel):
    """Records the dtypes in which results were requested."""

    def __init__(self, rounds_results: bool) -> None:
        self.rounds_results = rounds_results
        self.outputs: set[torch.dtype] = set()
        self.gradients: set[torch.dtype] = set()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any) -> None:
        self.outputs.add(out.dtype)
        super().forward(q, k, v, out, lse, **options)

    def backward(self, *tensors: Tensor, **options: Any) -> None:
        self.gradients.update(x.dtype for x in tensors[6:])
        super().backward(*tensors, **options)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("method", "size", "heads", "outputs", "gradients"),
    [
        ("lightseq", 1, (4, 2), {BF16}, {BF16}),
        ("ulysses", 2, (4, 2), {BF16}, {BF16}),
        ("ulysses", 2, (3, 1), {BF16}, {FP32}),  # the ranks share a key/value head
        ("all_gather", 2, (4, 2), {FP32, BF16}, {FP32}),  # rank 0 merges no output
    ],
)
def test_results_with_a_single_contribution_are_rounded_by_the_kernel(
    method: str, size: int, heads: tuple[int, int], outputs: set[torch.dtype], gradients: set[torch.dtype]
) -> None:
    layout, whole = SequenceLayout.contiguous(size), oracle.inputs(24, heads, (8, 8), BF16)
    results = []
    for kernel in (Recorded(True), Recorded(False)):

        def run(group: Group, kernel: Kernel = kernel) -> list[Tensor]:
            return attend(group, method, layout, Mask.causal(), whole, kernel=kernel)

        results.append(unshard(layout, run_loopback(size, run)))
        rounds = kernel.rounds_results
        assert kernel.outputs == (outputs if rounds else {FP32})
        assert kernel.gradients == (gradients if rounds else {FP32})
    for rounded, cast in zip(*results, strict=True):
        assert torch.equal(rounded, cast)


def test_softmax_scale_is_used() -> None:
    q, k, v, _ = oracle.inputs(9, (2, 2), (4, 4), torch.float64)
    out = mls.dist_attention(q, k, v, softmax_scale=0.25)
    torch.testing.assert_close(out, oracle.attention(q * 0.5, k, v, Mask.causal()), rtol=0, atol=1e-12)


def test_a_placement_of_the_users_own_runs() -> None:
    """Each tile is computed by the owner of its keys: a method in three lines."""

    def place(problem: Problem) -> Placement:
        chunks = range(problem.layout.num_chunks)
        return [[[Tile(q, k) for q in chunks] for k in chunks]]

    method, layout = Method("key_owner", place), SequenceLayout.contiguous(3)
    whole = oracle.inputs(3 * 6, (4, 2), (8, 8), torch.float64)
    parts = run_loopback(3, lambda group: attend(group, method, layout, Mask.full(), whole))
    check_exact(unshard(layout, parts), whole, Mask.full(), "key_owner")


def reattached(
    group: Group, method: str, whole: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    layout = SequenceLayout.contiguous(group.size())
    q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    attention = DistAttention(group, method=method)
    out = attention(q, k, v)
    plain = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    with torch.no_grad():
        kept = attention.forward_with_lse(q, k, v)
    stats = attention.stats
    counts = [stats.forwards, stats.bytes_sent]
    again = attention.reattach(q, k, v, kept)
    counts += [stats.forwards, stats.bytes_sent]
    return plain, [again.detach(), *torch.autograd.grad(again, (q, k, v), dout)], counts


@pytest.mark.parametrize("method", ["lightseq", "all_gather", "mesh", "ulysses", "usp:2", "rsa"])
def test_reattach_repeats_neither_forward_nor_communication(method: str) -> None:
    whole = oracle.inputs(4 * 10, (4, 2), (8, 8), torch.float64)
    for plain, again, counts in run_loopback(4, lambda group: reattached(group, method, whole)):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        assert counts[:2] == counts[2:]
        assert counts[0] == 2
        assert counts[1] > 0


def test_bytes_counted_are_bytes_predicted() -> None:
    from megatron_lightseq.schedule import TensorShape, build, simulate

    size, seq_length = 4, 4 * 16
    layout = SequenceLayout.contiguous(size)
    whole = oracle.inputs(seq_length, (4, 2), (8, 6), torch.float32)
    shape = TensorShape(batch=2, num_heads=4, num_query_groups=2, head_dim=8, v_head_dim=6, element_bytes=4)
    predicted = [
        simulate(build("lightseq", layout, direction=direction, seq_length=seq_length), shape=shape)
        for direction in ("forward", "backward")
    ]

    def counted(group: Group) -> tuple[int, int]:
        attention = DistAttention(group)
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone().requires_grad_() for x in whole)
        attention(q, k, v).backward(dout.detach())
        return attention.stats.bytes_sent, attention.stats.bytes_received

    for rank, (sent, received) in enumerate(run_loopback(size, counted)):
        assert sent == sum(result.bytes_sent[rank] for result in predicted)
        assert received == sum(result.bytes_received[rank] for result in predicted)


@pytest.mark.parametrize("heads", [(8, 8), (6, 2), (5, 1)])
@pytest.mark.parametrize(("method", "layout_name"), [("ulysses", "contiguous"), ("usp:2", "zigzag")])
def test_exchanged_bytes_are_those_predicted(method: str, layout_name: str, heads: tuple[int, int]) -> None:
    from megatron_lightseq.schedule import Chooser, Direction, TensorShape
    from megatron_lightseq.schedule.choose import exchange_messages
    from megatron_lightseq.schedule.heads import HeadCut

    size, seq_length = 4, 4 * 12
    layout, cut = SequenceLayout(layout_name, size), HeadCut(*heads, 2 if method == "usp:2" else 4)
    whole = oracle.inputs(seq_length, heads, (8, 6), torch.float32)
    shape = TensorShape(
        batch=2, num_heads=heads[0], num_query_groups=heads[1], head_dim=8, v_head_dim=6, element_bytes=4
    )

    def counted(group: Group) -> int:
        attention = DistAttention(group, layout=layout, method=method)
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone().requires_grad_() for x in whole)
        attention(q, k, v).backward(dout.detach())
        return attention.stats.bytes_received

    received = run_loopback(size, counted)
    exchanged = [0] * size
    for direction in Direction:
        problem = Problem(
            layout=layout, mask=Mask.causal(), seq_length=seq_length, direction=direction, shape=shape
        )
        for messages in exchange_messages(problem, cut):
            for _, dst, num_bytes in messages:
                exchanged[dst] += num_bytes
    if method == "ulysses":
        assert received == exchanged
    else:  # plus what the ring between the groups transfers
        assert all(total > part for total, part in zip(received, exchanged, strict=True))
        if heads == (8, 8):  # the same on all ranks, so that the prediction for the busiest one is exact
            chooser = Chooser(size, seq_length)
            network = Network.parse("nvlink")
            predicted = [chooser.predict(method, layout_name, way, shape, network) for way in Direction]
            assert max(received) == sum(prediction.bytes_received for prediction in predicted)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_auto_may_take_another_method_for_each_direction(layout_name: str) -> None:
    size = 4
    layout, mask = SequenceLayout(layout_name, size), Mask.causal()
    whole = oracle.inputs(size * 24, (4, 2), (8, 6), torch.float64)
    # A network so slow that it determines the choice, with a network card shared by two ranks.
    network = Network(name="slow", link_bytes_per_s=1e6, ranks_per_node=2, nic_bytes_per_s=1e5)

    def run(group: Group) -> list[Tensor]:
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone().requires_grad_() for x in whole)
        out = DistAttention(group, layout=layout, method="auto", network=network)(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.detach())]

    check_exact(unshard(layout, run_loopback(size, run)), whole, mask, layout_name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile_gives_the_same_numbers() -> None:
    q, k, v, _ = oracle.inputs(16, (4, 2), (8, 8), torch.float32)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(mls.dist_attention(q * 2, k, v)).sum()

    inputs = [x.requires_grad_() for x in (q, k, v)]
    eager = torch.autograd.grad(block(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(block, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


# --- refusals ----------------------------------------------------------------------------------------------


def shards(h: int = 4, g: int = 2, d: int = 8, dv: int = 8, tokens: int = 4) -> list[Tensor]:
    return [torch.randn(tokens, 1, heads, dim) for heads, dim in ((h, d), (g, d), (g, dv))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: [x[0] for x in shards()], "4 dimensions"),
        (lambda: [shards()[0].double(), *shards()[1:]], "one dtype and one device"),
        (lambda: [x.long() for x in shards()], "floating-point"),
        (lambda: [shards(tokens=5)[0], *shards()[1:]], "same tokens and batch"),
        (lambda: shards(tokens=0), "at least one token"),
        (lambda: [*shards()[:2], shards(g=4)[2]], "k and v have the same heads"),
        (lambda: shards(h=4, g=3), r"q \(4, 1, 4, 8\).* divide the query heads"),
        (lambda: [shards(d=16)[0], *shards()[1:]], "same head dim"),
    ],
)
def test_bad_shapes_are_refused(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=text):
        mls.dist_attention(*make())


@pytest.mark.parametrize("scale", [0.0, -0.125, math.inf, math.nan])
def test_a_scale_that_makes_no_softmax_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match=rf"softmax_scale {scale}: .*positive, finite"):
        mls.dist_attention(*shards(), softmax_scale=scale)


def test_a_sink_of_other_heads_is_refused() -> None:
    q, k, v = shards()
    with pytest.raises(ConfigError, match=r"a sink \(1,\).*one logit for each query head.*\(4,\)"):
        DistAttention()(q, k, v, sink=torch.zeros(1))


def scale_differently(group: Group) -> None:
    mls.dist_attention(*shards(), group=group, softmax_scale=0.5 if group.rank() == 1 else 0.25)


def test_ranks_that_scale_differently_stop() -> None:
    with pytest.raises(TransportError, match=r"softmax scale 0\.\d+ .*plan something else"):
        run_loopback(3, scale_differently)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="The nearest name is 'reference'"):
        mls.dist_attention(*shards(), kernel="referense")
    with pytest.raises(UnsupportedError, match="method 'helix'"):
        mls.dist_attention(*shards(), method="helix")
    with pytest.raises(LayoutError, match="layout 'spiral'"):
        mls.dist_attention(*shards(), layout="spiral")
    with pytest.raises(LayoutError, match="over a group of 1 ranks"):
        mls.dist_attention(*shards(), layout=SequenceLayout.contiguous(2))
    with pytest.raises(ConfigError, match="a group of type list"):
        DistAttention([0, 1])  # type: ignore[arg-type]


def test_full_rows_take_no_kernel() -> None:
    with pytest.raises(UnsupportedError, match="method 'rsa' with kernel 'cpu'"):
        DistAttention(method="rsa", kernel="cpu")


def disagree(group: Group) -> None:
    method = "ring" if group.rank() == 1 else "lightseq"
    mls.dist_attention(*shards(), group=group, method=method)


def test_ranks_that_disagree_stop_before_the_first_transfer() -> None:
    with pytest.raises(TransportError, match=r"plans (lightseq|ring).*plan something else"):
        run_loopback(3, disagree)


def disagree_over_gloo() -> None:
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    disagree(group)


def test_ranks_that_disagree_stop_over_gloo() -> None:
    with pytest.raises(RankError, match="plan something else"):
        run_ranks(2, disagree_over_gloo)


SKIPPED = r"receiving .* \(backward step \d\) from rank 0: .* must make the same forward and backward calls"


def skip_backward_on_rank_0(group: Group) -> str:
    """The loss of rank 0 does not depend on its output. Returns the error of the other ranks."""
    q, k, v = (x.requires_grad_() for x in shards())
    out = mls.dist_attention(q, k, v, group=group)
    if group.rank() == 0:
        return "no backward"
    with pytest.raises(TransportError, match=SKIPPED) as failure:
        out.sum().backward()
    return str(failure.value)


def test_a_rank_without_a_backward_is_named_when_the_time_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lightseq.transport.loopback.TIMEOUT_S", 0.5)
    _, message = run_loopback(2, skip_backward_on_rank_0)
    assert "silent for 0.5 s: " in message
    assert message.endswith("check that it called backward as the others did.")


def skip_backward_over_gloo() -> str:
    import torch.distributed as dist

    group = dist.new_group(timeout=timedelta(seconds=2))
    assert isinstance(group, dist.ProcessGroup)
    return skip_backward_on_rank_0(group)


def test_a_rank_without_a_backward_is_named_over_gloo() -> None:
    _, message = run_ranks(2, skip_backward_over_gloo)
    assert "called backward as the others did" in message


def test_each_direction_may_have_its_own_method() -> None:
    layout, mask, pair = SequenceLayout.contiguous(3), Mask.causal(), ("ulysses", "all_gather")
    whole = oracle.inputs(3 * 8, (4, 2), (8, 5), torch.float64)
    parts = run_loopback(3, lambda group: attend(group, pair, layout, mask, whole))
    check_exact(unshard(layout, parts), whole, mask, pair)

    def traffic(group: Group, method: MethodArgument) -> tuple[int, int]:
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone().requires_grad_() for x in whole)
        attention = DistAttention(group, method=method)
        out = attention(q, k, v)
        forward = attention.stats.bytes_sent
        out.backward(dout.detach())
        return forward, attention.stats.bytes_sent - forward

    both, forward, backward = (run_loopback(3, lambda g: traffic(g, m)) for m in (pair, *pair))  # noqa: B023
    assert both == [(f, b) for (f, _), (_, b) in zip(forward, backward, strict=True)]
    assert both not in (forward, backward)
    with pytest.raises(UnsupportedError, match="'lightseq' on the zigzag layout"):
        DistAttention(layout="zigzag", method=("ring", "lightseq"))


def test_a_failing_rank_wakes_the_others() -> None:
    def fail(group: Group) -> None:
        if group.rank() == 1:
            raise ZeroDivisionError("rank 1 broke")
        mls.dist_attention(*shards(), group=group)

    with pytest.raises(ZeroDivisionError, match="rank 1 broke"):
        run_loopback(3, fail)


def test_ring_places_for_every_mask() -> None:
    alone = Problem(layout=SequenceLayout.contiguous(1), mask=Mask.full(), seq_length=4)
    assert place_ring(alone) == [[[Tile(0, 0)]]]
