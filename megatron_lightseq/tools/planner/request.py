"""What is planned: a recipe on a cluster, with every rule checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import with_values
from megatron_lightseq.config.load import from_entries
from megatron_lightseq.config.rules import Machine, report
from megatron_lightseq.config.rules_run import BYTE_VOCABULARY
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.config.strict_yaml import parse_mapping, read_yaml
from megatron_lightseq.config.validate import TRAINING_RULES, violations
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.tools.planner.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A configuration that obeys every rule on a cluster."""

    config: PretrainConfig
    cluster: Cluster
    vocab_size: int

    def __post_init__(self) -> None:
        """Raise ConfigError with every rule that is broken, UnsupportedError for what cannot be planned."""
        found = broken_rules(self.config, self.cluster)
        if found:
            raise report(found)
        _refuse_unsupported(self.config)

    @property
    def micro_batches(self) -> int:
        """Per step and data parallel rank."""
        training = self.config.training
        sizes = ParallelSizes.of(self.config, self.cluster.num_gpus)
        return training.global_batch_size // (training.micro_batch_size * sizes.data)

    def but(self, **values: object) -> Request:
        """With other values of configuration keys; raises as a new one does."""
        return Request(
            config=with_values(self.config, **values), cluster=self.cluster, vocab_size=self.vocab_size
        )


def read_config(recipes: Sequence[str], settings: Sequence[str]) -> PretrainConfig:
    """The configuration of recipes, later ones over earlier ones, and of ``key=value`` over all of them.

    Raises:
        ConfigError: everything that is wrong with files, names and types.
    """
    layers = [read_yaml(Path(path)) for path in recipes]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(
                explain(
                    got=f"--set {setting!r}",
                    rule="a setting is KEY=VALUE",
                    remedy="Write, for example, --set seq_length=131072",
                )
            )
        layers.append(parse_mapping(f"{key.strip().replace('-', '_')}: {value}", f"--set {setting}"))
    # Kernels of GPUs cannot be asked for here; those of CPUs need as much memory.
    return with_values(from_entries(layers), cp_kernel="auto")


def broken_rules(config: PretrainConfig, cluster: Cluster) -> list[str]:
    """A message for every rule on the model, its sizes and its parallelism that the configuration breaks."""
    machine = Machine(world_size=cluster.num_gpus, num_gpus=cluster.gpus_per_node)
    return violations(config, machine, rule_sets=TRAINING_RULES)


def vocabulary(config: PretrainConfig) -> int:
    """The size of the vocabulary, from the configuration or the tokenizer's file.

    Raises:
        ConfigError: neither says it.
    """
    data = config.data
    if data.vocab_size is not None:
        return data.vocab_size
    if data.tokenizer_type == "byte":
        return BYTE_VOCABULARY
    path = Path(data.tokenizer_model or "")
    if path.is_file():
        from megatron_lightseq.training.data.tokenizers import vocabulary_size

        return vocabulary_size(path)
    raise ConfigError(
        explain(
            got=f"tokenizer_model {data.tokenizer_model}, which is not there",
            rule="the plan needs the size of the vocabulary",
            remedy="Add --set vocab_size=128256, or the size of your tokenizer",
        )
    )


def _refuse_unsupported(config: PretrainConfig) -> None:
    if config.linear.experimental_attention_variant is not None:
        raise UnsupportedError(
            explain(
                got=f"experimental_attention_variant {config.linear.experimental_attention_variant}",
                rule="the time and the memory of linear layers are not planned",
                remedy="For a model with attention in every layer, add --set experimental_attention_variant=null "
                "linear_attention_freq=null",
            )
        )
    if config.context.cp_method == "megatron" and config.parallel.context_parallel_size > 1:
        raise UnsupportedError(
            explain(
                got="cp_method megatron with context parallelism",
                rule="its attention is Transformer Engine's, which only runs on GPUs and is not planned",
                remedy="Plan cp_method zigzag, whose work and transfers are those of its p2p",
            )
        )
    if config.experts.num_experts and config.experts.moe_token_dispatcher_type != "alltoall":
        raise UnsupportedError(
            explain(
                got=f"moe_token_dispatcher_type {config.experts.moe_token_dispatcher_type}",
                rule="only alltoall is planned",
                remedy="Add --set moe_token_dispatcher_type=alltoall",
            )
        )
