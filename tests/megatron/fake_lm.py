"""Fakes of the parts of Megatron-LM that megatron-core from PyPI does not have: ``megatron.training``.

They are minimal, with the names, signatures and order of calls of the real ones. :func:`modules` installs them as
modules of this process, :func:`checkout` writes them to a folder with a ``pretrain_gpt.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

ARGUMENTS = """
import argparse

from megatron.core.transformer.enums import AttnBackend


def add_megatron_arguments(parser):
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--group-query-attention", action="store_true")
    parser.add_argument("--num-query-groups", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=48)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--cp-comm-type", nargs="+", default=["p2p"])
    parser.add_argument("--hierarchical-context-parallel-sizes", nargs="+", type=int, default=None)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--reset-attention-mask", action="store_true")
    parser.add_argument("--attention-backend", type=lambda name: AttnBackend[name], default=AttnBackend.auto)
    parser.add_argument("--use-flash-attn", action="store_true")
    parser.add_argument("--no-create-attention-mask-in-dataloader", action="store_false",
                        dest="create_attention_mask_in_dataloader")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--sft", action="store_true")
    parser.add_argument("--cuda-graph-impl", default="none")
    parser.add_argument("--moe-expert-capacity-factor", type=float, default=None)
    parser.add_argument("--moe-token-drop-policy", default="probs")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--distributed-backend", default="nccl")
    parser.add_argument("--no-rope-fusion", action="store_false", dest="apply_rope_fusion")
    parser.add_argument("--yaml-cfg", default=None)
    parser.add_argument("--fp16", action="store_true")
    return parser


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    args = parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args()
    return argparse.Namespace(num_layers=2) if args.yaml_cfg else args
"""
INITIALIZE = """
import torch

from megatron.training.arguments import parse_args


def initialize_megatron(extra_args_provider=None):
    assert torch.cuda.is_available(), "Megatron requires CUDA."
    _warmup_jit_function()
    return parse_args(extra_args_provider)


def _warmup_jit_function():
    raise AssertionError("would draw random numbers on a CPU")
"""
TRAINING = """
from megatron.training.initialize import _warmup_jit_function
"""
SCRIPT = """
import json
import sys

import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training.initialize import initialize_megatron


def main():
    args = initialize_megatron()
    where = torch.zeros(1, device="cuda").cuda(non_blocking=True).device
    wired = get_batch_on_this_cp_rank.__closure__ is not None
    seen = {"device": str(where), "wired": wired, "argv": sys.argv[1:], "module": __name__, "args": vars(args)}
    print(json.dumps(seen, default=str))


if __name__ == "__main__":
    main()
"""
FILES = {"__init__": "", "arguments": ARGUMENTS, "initialize": INITIALIZE, "training": TRAINING}


def modules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put the fakes into ``sys.modules`` for one test. Returns ``megatron.training``."""
    megatron = __import__("megatron.core")
    package = ModuleType("megatron.training")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setattr(megatron, "training", package, raising=False)
    for name, source in FILES.items():
        if name != "__init__":
            module = ModuleType(f"megatron.training.{name}")
            monkeypatch.setitem(sys.modules, module.__name__, module)
            setattr(package, name, module)
            exec(compile(source, name, "exec"), module.__dict__)
    return package


def checkout(folder: Path) -> Path:
    """Write a fake checkout whose training program prints its arguments. Returns its script."""
    training = folder / "megatron" / "training"
    training.mkdir(parents=True)
    for name, source in FILES.items():
        (training / f"{name}.py").write_text(source)
    script = folder / "pretrain_gpt.py"
    script.write_text(SCRIPT)
    return script
