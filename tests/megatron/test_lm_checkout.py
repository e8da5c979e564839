"""An unmodified checkout of Megatron-LM trains with LightSeq attention to the losses of one process.

``MEGATRON_LM_PATH`` names the checkout, ``MEGATRON_LM_PACKAGES`` a folder with the packages that its training
program imports beyond ours (six, regex, triton, pydantic); without the first, everything here is skipped and
counted. Each run starts its own torchrun; together they take minutes.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.packaging.fakes import ROOT

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")

pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM_PATH names no checkout of Megatron-LM"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares ranks on CPUs"),
    pytest.mark.timeout(900),
]

MODEL = shlex.split(
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 4200 --num-layers 2 --hidden-size 64 "
    "--num-attention-heads 4 --seq-length 48 --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 "
    "--train-iters 3 --lr 1e-2 --min-lr 1e-3 --lr-decay-style constant --weight-decay 0.01 --clip-grad 1.0 "
    "--position-embedding-type rope --init-method-std 0.1 --hidden-dropout 0 --attention-dropout 0 --log-interval 1 "
    "--eval-iters 1 --eval-interval 1000 --num-workers 0 --seed 1234 --split 99,1,0"
)
CPU = shlex.split(
    "--distributed-backend gloo --transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-rope-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --no-persist-layer-norm"
)
"""Flags that the launcher sets automatically on a machine without a GPU."""
SPEC = ("--spec", "megatron_lightseq.megatron.lm", "layers")
RECOMPUTE = (
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
)
FORWARDS = 2 * (3 * 4 + 2 * 4)  # layers x (steps x micro-batches + evaluations x micro-batches)
REPLAYED = 2 * 3 * 4


@dataclass(frozen=True)
class Run:
    """Values that Megatron-LM printed."""

    losses: list[float]
    grad_norms: list[float]
    validation: list[float]
    forwards: int
    """Number of attention forwards on a rank."""


@functools.cache
def train(
    ranks: int, *flags: str, mode: str = "launcher", padding: int = 128, environment: tuple[str, ...] = ()
) -> Run:
    """Three steps of ``pretrain_gpt.py`` under torchrun.

    Args:
        ranks: processes.
        flags: in addition to those of the model.
        mode: ``launcher`` or ``spec`` (tests/megatron/lm_rank.py).
        padding: the vocabulary is padded to a multiple of this and of the tensor-parallel size.
        environment: further variables, NAME=VALUE.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.megatron.lm_rank", mode, str(Path(CHECKOUT) / "pretrain_gpt.py"), *MODEL, *flags]
    command += ["--make-vocab-size-divisible-by", str(padding)]
    paths = [str(ROOT), os.environ.get("MEGATRON_LM_PACKAGES", "")]
    variables = {
        **os.environ,
        **dict(pair.split("=", 1) for pair in environment),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Megatron-LM compiles its data helpers for the Python whose python3-config comes first.
        "PATH": os.pathsep.join([str(Path(sys.executable).resolve().parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    number = r"([0-9.]+(?:E[+-]\d+)?)"
    return Run(
        losses=_numbers(rf"iteration +\d+/.* lm loss: {number}", done.stdout),
        grad_norms=_numbers(rf"iteration +\d+/.* grad norm: {number}", done.stdout),
        validation=_numbers(rf"lm loss value: {number}", done.stdout),
        forwards=int(_numbers(r"attention forwards: (\d+)", done.stdout)[0]),
    )


def _numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def one_process() -> Run:
    """Megatron-LM's own attention."""
    run = train(1, "--cp-method", "megatron")
    assert len(run.losses) == len(run.grad_norms) == 3
    assert len(run.validation) == 2
    assert run.forwards == 0, "the baseline must not use LightSeq attention"
    return run


def check_same(run: Run, *, forwards: int = FORWARDS, expected: Run | None = None) -> None:
    """Checks that losses equal those of one process up to fp32 rounding, and that LightSeq attention computed them."""
    expected = expected or one_process()
    assert run.losses == pytest.approx(expected.losses, rel=2e-6, abs=0)
    assert run.validation == pytest.approx(expected.validation, rel=2e-6, abs=0)
    assert run.grad_norms == pytest.approx(
        expected.grad_norms, rel=0, abs=1.001e-3
    )  # three decimals are printed
    assert run.forwards == forwards


def cp(size: int) -> tuple[str, str]:
    return ("--context-parallel-size", str(size))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_losses_do_not_depend_on_context_parallelism(size: int) -> None:
    check_same(train(size, *cp(size)))


def test_losses_with_tensor_and_context_parallelism() -> None:
    tensor = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    check_same(train(4, *cp(2), *tensor, padding=64))


def test_the_specification_without_the_launcher() -> None:
    check_same(train(2, *CPU, *SPEC, *cp(2), mode="spec", environment=("MLS_CP_METHOD=ring",)))


def test_recomputation_does_not_repeat_attention() -> None:
    check_same(train(2, *cp(2), *RECOMPUTE))


@pytest.mark.parametrize("recompute", [(), RECOMPUTE], ids=["stored", "recomputed"])
def test_tiles_change_nothing(recompute: tuple[str, ...]) -> None:
    tiles = ("--mlp-tile-tokens", "7", "--loss-tile-tokens", "5")
    tensor = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    check_same(train(4, *cp(2), *tensor, *tiles, *recompute, padding=64))


def test_recomputation_repeats_attention_when_it_is_not_kept() -> None:
    check_same(train(2, *cp(2), *RECOMPUTE, "--no-keep-attention-on-recompute"), forwards=FORWARDS + REPLAYED)


def test_kinds_by_layer_in_megatrons_own_words() -> None:
    check_same(train(2, *cp(2), "--cp-comm-type", "p2p", "a2a"))


def test_pipeline_with_the_distributed_optimizer() -> None:
    """Compared with Megatron's attention in the same pipeline, because initial weights depend on the pipeline."""
    pipeline = ("--pipeline-model-parallel-size", "2")
    run = train(4, *cp(2), *pipeline, "--use-distributed-optimizer", "--cp-method", "zigzag")
    check_same(run, forwards=FORWARDS // 2, expected=train(2, *pipeline, "--cp-method", "megatron"))


def test_interleaved_pipeline() -> None:
    pipeline = ("--pipeline-model-parallel-size", "2", "--num-layers", "4")
    interleaved = (*pipeline, "--num-layers-per-virtual-pipeline-stage", "1")
    check_same(train(4, *cp(2), *interleaved), expected=train(2, *interleaved, "--cp-method", "megatron"))


def test_a_checkpoint_of_megatrons_attention_goes_on_with_ours(tmp_path: Path) -> None:
    folder, form = str(tmp_path), ("--ckpt-format", "torch_dist")
    first = ("--save", folder, "--save-interval", "2", "--exit-interval", "2", "--cp-method", "megatron")
    saved = train(1, *form, *first)
    resumed = train(2, *form, *cp(2), "--load", folder)
    assert saved.losses == one_process().losses[:2]
    assert resumed.losses == pytest.approx(one_process().losses[2:], rel=2e-6, abs=0)
    assert resumed.validation == pytest.approx(one_process().validation, rel=2e-6, abs=0)


EXPERTS = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.5 "
    "--moe-token-dispatcher-type alltoall --disable-bias-linear --calculate-per-token-loss"
)


def test_the_load_balancing_of_experts_weighs_the_same() -> None:
    """With Megatron-Core up to 0.18 its weight would be halved on two ranks. Our fix corrects the gradients."""
    check_same(train(2, *cp(2), *EXPERTS), expected=train(1, *EXPERTS, "--cp-method", "megatron"))


LATENT = shlex.split(
    "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 24 --qk-head-dim 12 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 12 --rope-type rope --rotary-scaling-factor 1.0 --attention-softmax-in-fp32"
)


def test_latent_attention_with_tensor_parallelism() -> None:
    """Megatron's layers would lose part of the gradient of the shared keys. Our fix corrects the gradients."""
    tensor = ("--tensor-model-parallel-size", "2")
    expected = train(1, *LATENT)
    check_same(train(4, *cp(2), *tensor, *LATENT, padding=64), expected=expected)


def test_windows_and_sinks() -> None:
    flags = ("--window-size", "20,0", "--window-attn-skip-freq", "2", "--softmax-type", "learnable")
    check_same(train(2, *cp(2), *flags), expected=train(1, *flags, "--cp-method", "megatron"))
