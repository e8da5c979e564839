"""Flag sets of real Megatron-LM programs, and the same on a small scale.

They are those of a checkout's functional tests (``tests/functional_tests/test_cases/*/*/model_config.yaml``, all that
train) and of its examples, whose scripts are run with a ``torchrun`` that only prints what it was given.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

Flags = dict[str, list[str]]
"""Values by flag; none for a switch."""

SCRIPTS = {
    "gpt": ("pretrain_gpt.py",),
    "gpt-nemo": ("pretrain_gpt.py",),
    "mixtral": ("pretrain_gpt.py",),
    "moe": ("pretrain_gpt.py",),
    "nemotron": ("pretrain_gpt.py",),
    "hybrid": ("pretrain_hybrid.py", "pretrain_mamba.py"),
    "bert": ("pretrain_bert.py",),
    "t5": ("pretrain_t5.py",),
}
"""Training script of each folder of test cases: the first that the checkout has. Other folders train otherwise."""
EXAMPLES = (
    "examples/gpt3/train_gpt3_175b_distributed.sh",
    "examples/llama/train_llama3_8b_h100_fp8.sh",
    "examples/mixtral/train_mixtral_8x7b_distributed.sh",
    "examples/gptoss/02_train.sh",
    "examples/mamba/train.sh",
    "examples/bert/train_bert_340m_distributed.sh",
    "examples/t5/train_t5_220m_distributed.sh",
)
MODELS = "examples/post_training/modelopt/conf"
"""Scripts that set the architecture of a public model in MODEL_ARGS."""


@dataclass(frozen=True)
class FlagSet:
    """What a program gives to a training script."""

    name: str
    script: str
    """Relative to the checkout."""
    flags: Flags

    def size(self, flag: str) -> int:
        """A parallel size; 1 if it is not given."""
        return int((self.flags.get(flag) or ["1"])[0])


def collect(checkout: Path) -> list[FlagSet]:
    """All flag sets of a checkout that train, by name."""
    found = [*_test_cases(checkout), *_examples(checkout), *_models(checkout)]
    return sorted(found, key=lambda each: each.name)


def _test_cases(checkout: Path) -> Iterator[FlagSet]:
    for path in (checkout / "tests/functional_tests/test_cases").glob("*/*/model_config.yaml"):
        family, case = path.parts[-3:-1]
        scripts = [name for name in SCRIPTS.get(family, ()) if (checkout / name).is_file()]
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        arguments = given.get("MODEL_ARGS")
        trains = arguments and ("--train-iters" in arguments or "--train-samples" in arguments)
        if scripts and trains and "--perform-rl-step" not in arguments:
            yield FlagSet(f"{family}/{case}", scripts[0], _of_yaml(arguments))


def _of_yaml(arguments: dict[str, object]) -> Flags:
    flags: Flags = {}
    for name, value in arguments.items():
        if value is False:
            continue
        words = str(value).strip()
        words = words[1:-1] if words.startswith("[") and words.endswith("]") else words
        pattern = name in ("--hybrid-layer-pattern", "--pipeline-model-parallel-layout", "--moe-layer-freq")
        flags[name] = [] if value is True else [words] if pattern else words.split()
    return flags


def _examples(checkout: Path) -> Iterator[FlagSet]:
    for name in EXAMPLES:
        path = checkout / name
        if not path.is_file():
            continue
        words = _given_to_torchrun(path, checkout)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is not None:
            flags = _of_words(words[words.index(script) + 1 :])
            yield FlagSet(name.removesuffix(".sh"), Path(script).name, flags)


def _given_to_torchrun(script: Path, checkout: Path) -> list[str]:
    """What an example's script would start."""
    with tempfile.TemporaryDirectory() as folder:
        fake = Path(folder) / "torchrun"
        fake.write_text('#!/bin/bash\nprintf "STARTED %s\\n" "$*"\n', encoding="utf-8")
        fake.chmod(0o755)
        (Path(folder) / "checkpoints").mkdir()
        variables = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "MODEL_SCALE": "800M"}
        paths = [str(Path(folder) / name) for name in ("checkpoints", "b", "c", "d", "e")]
        done = subprocess.run(
            ["bash", str(script), *paths],
            cwd=checkout,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
    found = re.search(r"^STARTED (.*)$", done.stdout, re.MULTILINE)
    return shlex.split(found[1]) if found else []


def _models(checkout: Path) -> Iterator[FlagSet]:
    for path in sorted((checkout / MODELS).glob("*/*.sh")):
        command = f'set -e; source {shlex.quote(str(path))}; printf "%s" "$MODEL_ARGS"'
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        flags = _of_words(shlex.split(done.stdout))
        if "--num-layers" not in flags and "--hybrid-override-pattern" not in flags:
            continue
        hybrid = any(name.startswith(("--hybrid", "--is-hybrid", "--mamba")) for name in flags)
        script = next(name for name in SCRIPTS["hybrid"] if (checkout / name).is_file())
        yield FlagSet(
            f"{MODELS}/{path.parent.name}/{path.stem}", script if hybrid else "pretrain_gpt.py", flags
        )


def _of_words(words: list[str]) -> Flags:
    flags: Flags = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = [value] if value else []
        elif name:
            flags[name].append(word)
    return flags


# --- on a small scale -------------------------------------------------------------------------------------------------

LEFT_OUT = re.compile(
    r"--(fp8|fp4|bf16|fp16|first-last-layers-bf16|num-layers-at-|tp-comm-overlap|transformer-impl|distributed-backend"
    r"|cuda-graph|enable-cuda-graph|external-cuda-graph|moe-permute-fusion|moe-router-fusion|moe-grouped-gemm"
    r"|moe-flex|moe-hybridep|moe-deepep|moe-enable-deepep|moe-router-padding-for|te-rng-tracker|use-te|"
    r"use-transformer-engine|use-fused-weighted|high-priority-stream|reuse-grad-buf|grad-reduce-in-bf16"
    r"|use-precision-aware|main-grads-dtype|main-params-dtype|exp-avg|accumulate-allreduce-grads"
    r"|apply-layernorm-1p|moe-shared-expert-overlap|defer-embedding-wgrad|wgrad-deferral"
    r"|delay-wgrad|use-nccl-ub|nccl-|loss-scale|initial-loss-scale|optimizer$|muon|use-layer-wise|no-use-layer-wise"
    r"|data-path|vocab-|merge-file|tokenizer|tiktoken|split$|data-cache|no-mmap|num-workers|dataloader-type|num-dataset"
    r"|fim-|sft-tokenizer|mock-data|make-vocab"
    r"|save|load|no-load|no-save|async|auto-detect|ckpt-(?!format)|dist-ckpt|no-ckpt|use-persistent|use-dist-ckpt|use-checkpoint"
    r"|no-use-tokenizer|finetune|override-opt|verify-integrity|replication|non-persistent"
    r"|tensorboard|wandb|log-|timing-log|logging-level|profile|exit-|error-injection|rerun|straggler"
    r"|check-weight-hash|manual-gc|empty-unused|distributed-timeout|export-|enable-gloo"
    r"|lr|min-lr|decoupled|train-samples|train-iters|eval-|global-batch-size|step-batch-size|rampup|seed$"
    r"|decoder-first-pipeline|decoder-last-pipeline|adam-|init-method-std"
    r"|decoder-num-layers|encoder-num-layers|num-gpus)"
)
"""What needs a GPU or its packages, names data, tokenizer or checkpoints, writes logs, or sets the number of steps."""
FIXED = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --hidden-size 128 --ffn-hidden-size 256 "
    "--train-iters 3 --lr 1e-3 --lr-decay-style constant --eval-iters 1 --eval-interval 1000 --num-workers 0 "
    "--log-interval 1 --hidden-dropout 0 --attention-dropout 0 --seed 1234 --split 99,1,0 --init-method-std 0.05"
)
SEQUENCE = 256
SIZES = ("tensor", "pipeline", "expert")


def scaled(given: FlagSet, *, ranks: int = 8) -> tuple[FlagSet, int]:
    """The same with a small model and short sequences, and how many ranks it needs.

    Parallel sizes stay as they are if ``ranks`` suffice; otherwise they become 2 at most.
    """
    flags = {name: list(values) for name, values in given.flags.items() if not LEFT_OUT.match(name)}
    if flags.get("--moe-token-dispatcher-type") == ["flex"]:
        flags["--moe-token-dispatcher-type"] = ["alltoall"]
    needed = _ranks(FlagSet("", "", flags))
    if needed > ranks:
        for kind in SIZES:
            _at_most(flags, f"--{kind}-model-parallel-size", 2)
        _at_most(flags, "--expert-tensor-parallel-size", 2)
    if needed > ranks and _ranks(FlagSet("", "", flags)) > ranks:
        _at_most(flags, "--context-parallel-size", 2)
    _scale_model(flags)
    _scale_experts(flags)
    micro = min(int(flags.get("--micro-batch-size", ["1"])[0]), 2)
    flags["--micro-batch-size"] = [str(micro)]
    flags["--global-batch-size"] = [str(micro * 8)]
    flags.update(_of_words(FIXED.split()))
    if given.script == "pretrain_bert.py":  # its own choice of layers looks for Transformer Engine only
        flags["--spec"] = ["local"]
    small = FlagSet(given.name, given.script, flags)
    return small, _ranks(small)


def one_context_rank(given: FlagSet) -> tuple[FlagSet, int]:
    """The same without context parallelism, and its number of ranks."""
    dropped = (
        "--context-parallel-size",
        "--cp-comm-type",
        "--hierarchical-context-parallel-sizes",
    )
    flags = {name: values for name, values in given.flags.items() if name not in dropped}
    if (
        "--num-experts" not in flags
    ):  # then these sizes only order the ranks, and may not fit to fewer of them
        flags.pop("--expert-tensor-parallel-size", None)
    alone = FlagSet(given.name, given.script, flags)
    return alone, _ranks(alone)


def _ranks(flags: FlagSet) -> int:
    """The fewest ranks that hold all parallel groups."""
    pipeline = flags.size("--pipeline-model-parallel-size")
    dense = flags.size("--tensor-model-parallel-size") * flags.size("--context-parallel-size")
    tensor = "--expert-tensor-parallel-size"
    if tensor not in flags.flags:
        tensor = "--tensor-model-parallel-size"
    experts = flags.size("--expert-model-parallel-size") * flags.size(tensor)
    wanted = dense
    while wanted % experts:
        wanted += dense
    copies = flags.size("--num-distributed-optimizer-instances")
    return pipeline * wanted * copies


def _at_most(flags: Flags, name: str, limit: int) -> None:
    if name in flags:
        flags[name] = [str(min(int(flags[name][0]), limit))]


def _scale_model(flags: Flags) -> None:
    small = FlagSet("", "", flags)
    tensor = small.size("--tensor-model-parallel-size")
    heads = int(flags.get("--num-attention-heads", ["8"])[0])
    groups = int(flags.get("--num-query-groups", [str(heads)])[0])
    flags["--num-attention-heads"] = ["8"]
    if "--num-query-groups" in flags:
        flags["--num-query-groups"] = [str(max(tensor, 8 * groups // heads, 1))]
    for name, value in (
        ("--kv-channels", "16"),
        ("--q-lora-rank", "32"),
        ("--kv-lora-rank", "32"),
        ("--qk-head-dim", "16"),
        ("--qk-pos-emb-head-dim", "8"),
        ("--v-head-dim", "16"),
        ("--mamba-head-dim", "16"),
        ("--mamba-num-heads", "8"),
        ("--mamba-state-dim", "16"),
        ("--mup-base-hidden-size", "64"),
    ):
        if name in flags:
            flags[name] = [value]
    for name in ("--seq-length", "--encoder-seq-length", "--max-position-embeddings"):
        if name in flags:
            flags[name] = [str(SEQUENCE)]
    if "--window-size" in flags:
        flags["--window-size"] = ["64,0"]
    _scale_layers(flags, small.size("--pipeline-model-parallel-size"))


def _scale_layers(flags: Flags, stages: int) -> None:
    hybrid = [name for name in flags if name in ("--hybrid-layer-pattern", "--hybrid-override-pattern")]
    if hybrid:
        flags[hybrid[0]] = [_short_pattern(flags[hybrid[0]][0])]
        if "--num-layers" in flags:
            flags["--num-layers"] = [str(len(flags[hybrid[0]][0].replace("|", "")))]
        return
    layers = max(2, stages)
    if "--pipeline-model-parallel-layout" in flags:
        layout = flags["--pipeline-model-parallel-layout"][0].replace("\\", "")  # escaped for a shell
        flags["--pipeline-model-parallel-layout"] = [layout]
        expanded = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), layout)
        expanded = re.sub(r"(\w)\*(\d+)", lambda m: m[1] * int(m[2]), expanded)
        layers = expanded.count("t")
    elif "--num-layers-per-virtual-pipeline-stage" in flags:
        flags["--num-layers-per-virtual-pipeline-stage"] = ["1"]
        layers = 2 * stages
    elif "--num-virtual-stages-per-pipeline-rank" in flags:
        layers = stages * int(flags["--num-virtual-stages-per-pipeline-rank"][0])
    for name in ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"):
        layers -= name in flags and stages > 1
        layers += stages if layers <= 0 or (name in flags and layers < stages - 1) else 0
    for name in ("--encoder-num-layers", "--decoder-num-layers"):
        flags.pop(name, None)
    flags["--num-layers"] = [str(layers)]
    for name in ("--linear-attention-freq", "--no-rope-freq"):
        if name in flags:
            flags[name] = ["2"]
    if "--microbatch-group-size-per-virtual-pipeline-stage" in flags:
        flags["--microbatch-group-size-per-virtual-pipeline-stage"] = [str(stages)]


def _short_pattern(pattern: str) -> str:
    """The first few layers of a hybrid model, with one of each kind; stages stay."""
    if "|" in pattern:
        return pattern
    short = ""
    for layer in pattern.split("/")[0]:
        if layer not in short:
            short += layer
    return short


def _scale_experts(flags: Flags) -> None:
    if "--num-experts" not in flags:
        return
    count = min(int(flags["--num-experts"][0]), 8)
    flags["--num-experts"] = [str(count)]
    _at_most(flags, "--moe-router-topk", 2)
    _at_most(flags, "--moe-router-num-groups", 2)
    _at_most(flags, "--moe-router-group-topk", 1)
    for name in ("--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size", "--moe-latent-size"):
        if name in flags:
            flags[name] = ["64"]
    if "--moe-layer-freq" in flags:
        layers = int(flags["--num-layers"][0])
        flags["--moe-layer-freq"] = [f"([0]*1+[1]*{layers - 1})"]
