from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.errors import TransportError
from megatron_lightseq.transport import Message, connect, loopback, run_loopback
from megatron_lightseq.transport.group import Group

SIZE = 4
METHODS = ("lightseq", "zigzag", "ulysses", "usp:2", "rsa")


def attend(group: Group, method: str, dtype: torch.dtype, verify: bool) -> list[Tensor]:
    """Output and gradients of this rank."""
    layout = "zigzag" if method == "zigzag" else "contiguous"
    kernel = "auto" if method == "rsa" else "reference"
    generator = torch.Generator().manual_seed(group.rank())
    q, k, v = torch.randn(3, 24, 2, 4, 8, generator=generator).to(dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    settings: dict[str, Any] = {"layout": layout, "method": method, "kernel": kernel}
    out = mls.dist_attention(*inputs, group=group, verify_transport=verify, **settings)
    out.sum().backward()
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checksums_do_not_change_the_result(method: str, dtype: torch.dtype) -> None:
    plain = run_loopback(SIZE, lambda group: attend(group, method, dtype, False))
    verified = run_loopback(SIZE, lambda group: attend(group, method, dtype, True))
    for theirs, ours in zip(itertools.chain(*plain), itertools.chain(*verified), strict=True):
        assert torch.equal(theirs, ours)


class Flips:
    """Flips one bit of the n-th tensor that is sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, rng: random.Random) -> None:
        self.sent = 0
        put = loopback._Network.put

        def flipped(network: Any, src: int, dst: int, tag: Any, content: Any) -> None:
            if isinstance(content, Tensor):
                with network.changed:
                    hit = self.sent == number
                    self.sent += 1
                if hit:
                    flip(content, rng)
            put(network, src, dst, tag, content)

        monkeypatch.setattr(loopback._Network, "put", flipped)


def flip(tensor: Tensor, rng: random.Random) -> None:
    raw = tensor.reshape(-1).view(torch.uint8)
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_in_any_message_of_forward_and_backward_is_found(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(method)
    with monkeypatch.context() as patch:
        counted = Flips(patch, -1, rng)
        run_loopback(SIZE, lambda group: attend(group, method, torch.float32, True))
    assert counted.sent > 2 * SIZE
    for number in rng.sample(range(counted.sent), min(counted.sent, 12)):
        with monkeypatch.context() as patch:
            Flips(patch, number, rng)
            with pytest.raises(
                TransportError, match=r"rank \d received .* from rank \d with other bytes than"
            ):
                run_loopback(SIZE, lambda group: attend(group, method, torch.float32, True))


def test_every_one_of_many_flips_is_found() -> None:
    assert found_flips(2000, seed=1) == 2000


def found_flips(flips: int, seed: int) -> int:
    """How many messages with one flipped bit are refused; none of the others may be."""
    rng = random.Random(seed)
    put = loopback._Network.put

    def flipped(network: Any, src: int, dst: int, tag: Any, content: Any) -> None:
        if src == 0 and tag == 3:
            flip(content, rng)
        put(network, src, dst, tag, content)

    def exchange(group: Group) -> int:
        transport, peer, found = connect(group, verify=True), 1 - group.rank(), 0
        for _ in range(flips):
            sends = [Message(peer, torch.randn(17), tag, "data") for tag in (1, 3)]
            receives = [Message(peer, torch.empty(17), tag, "data") for tag in (3, 1)]
            try:
                transport.start(sends, receives).wait()
            except TransportError:
                found += 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loopback._Network, "put", flipped)
        wrongly, found = run_loopback(2, exchange)
    assert wrongly == 0
    return found
