"""The configuration of a pretraining run: one frozen dataclass per section.

Keys are flat and unique over all sections: `num_layers` is a YAML key, a `--num-layers` flag and a field of
:class:`ModelConfig`. Where Megatron-LM has an argument, the key has its name and its meaning; the keys that
Megatron-LM lacks are ours (`cp_*`, `*_tile_tokens`, `keep_attention_on_recompute`, `report_dir`, `progress`).

The docstring under a field is its help text, so `lightseq pretrain --help` cannot disagree with this file. Words that
other parts of the package own (methods, layouts, kernels) come from there (:mod:`megatron_lightseq.config.choices`).
Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_lightseq.config.choices import CPKernel, CPLayout, CPMethod, default_layout, sized_name
from megatron_lightseq.config.sections_experts import ExpertsConfig
from megatron_lightseq.config.sections_health import HealthConfig
from megatron_lightseq.config.sections_linear import LinearConfig
from megatron_lightseq.config.sections_model import ModelConfig
from megatron_lightseq.config.sections_rope import RopeConfig
from megatron_lightseq.config.sections_tuning import TuningConfig
from megatron_lightseq.schedule import Network

Backend = Literal["auto", "nccl", "gloo"]
CPCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp"]
LRDecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]
TokenizerType = Literal["byte", "hf", "null"]
Progress = Literal["auto", "live", "plain", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the work is divided among the ranks; data parallelism takes the ranks that remain."""

    tensor_model_parallel_size: int = 1
    """Tensor parallelism (TP): ranks that every weight matrix is split over."""
    pipeline_model_parallel_size: int = 1
    """Pipeline parallelism (PP): ranks that the layers are split over."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per virtual stage of the interleaved pipeline schedule; null: no interleaving."""
    context_parallel_size: int = 1
    """Context parallelism (CP): ranks that every sequence is split over."""
    expert_model_parallel_size: int = 1
    """Expert parallelism (EP): ranks that experts are spread over, taken from the TP, CP and DP ranks."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that the matrices of each expert are split over; null: tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Sequence parallelism (SP): split norms and dropout over the TP ranks along the sequence; needs TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data and context parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass; needs use_distributed_optimizer."""
    distributed_backend: Backend = "auto"
    """auto: nccl when every rank has a GPU, gloo otherwise."""
    distributed_timeout_minutes: float = 10.0
    """Time limit of one collective, after which the run is considered dead."""

    @property
    def virtual_pipeline(self) -> bool:
        """Whether the pipeline schedule is interleaved."""
        return self.num_layers_per_virtual_pipeline_stage is not None

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that the matrices of each expert are split over, after defaults."""
        size = self.expert_tensor_parallel_size
        return self.tensor_model_parallel_size if size is None else size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that together hold one copy of all experts: expert tensor * EP * PP."""
        return self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together work on one sequence: TP * PP * CP."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextParallelConfig:
    """Attention over the context parallel ranks."""

    cp_method: CPMethod = "lightseq"
    """How attention is distributed over the context parallel ranks."""
    cp_ulysses_size: int | None = None
    """With usp: ranks that exchange heads; null: the largest divisor of the CP size up to its square root."""
    cp_comm_type: tuple[CPCommType, ...] = ()
    """Megatron-LM's communication type, for all layers or one per layer: p2p: cp_method, a2a: ulysses, a2a+p2p: usp."""
    cp_network: str | None = None
    """With auto: the cluster's network, by name or by numbers; null: NVLink in nodes of 8, 100 Gbit/s between nodes."""
    cp_layout: CPLayout = "auto"
    """Which rank holds which tokens."""
    cp_overlap: bool = True
    """Transfer the next step's chunks while the current step is computed."""
    cp_kernel: CPKernel = "auto"
    """Attention kernel."""
    cp_invariant: int | None = None
    """Tokens per chunk of a grid that makes attention bit for bit the same for every CP size and method; null: off."""

    cp_verify_transport: bool = False
    """Compare a checksum of every message of attention, to find bits that were flipped on their way; on GPUs slow."""

    @property
    def method_name(self) -> str:
        """The method as :mod:`megatron_lightseq.schedule` names it: usp with its size."""
        return sized_name(self.cp_method, self.cp_ulysses_size)

    @property
    def network(self) -> Network | None:
        """The network that auto predicts with; None for its default."""
        return None if self.cp_network is None else Network.parse(self.cp_network)

    @property
    def layout_name(self) -> str:
        """The layout, with auto replaced by the method's default (`cp_method: auto` may still choose another)."""
        return default_layout(self.cp_method) if self.cp_layout == "auto" else self.cp_layout


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Activations that are recomputed in backward instead of stored."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full: recompute whole layers; selective: the modules in recompute_modules; null: nothing."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: all layers, in groups of recompute_num_layers (uniform), or the first recompute_num_layers (block)."""
    recompute_num_layers: int | None = None
    """With full: layers per group (uniform), or recomputed layers per pipeline stage (block)."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """With selective: the modules to recompute."""
    keep_attention_on_recompute: bool = True
    """Store attention's output and log-sum-exp, so that recomputation repeats neither attention nor its traffic."""
    mlp_tile_tokens: int | None = None
    """Compute MLPs in slices of this many tokens, recomputed in backward: one slice's activations live; null: off."""
    loss_tile_tokens: int | None = None
    """Compute logits and losses in slices of this many tokens, recomputed in backward; null: off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """The optimizer and its learning rate schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam: AdamW (decoupled weight decay); sgd: stochastic gradient descent."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr: float = 3e-4
    """Learning rate at the end of the decay."""
    lr_decay_style: LRDecayStyle = "cosine"
    """Shape of the decay from lr to min_lr."""
    lr_decay_iters: int | None = None
    """Steps until min_lr is reached; null: train_iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0 to lr."""
    weight_decay: float = 0.1
    """Weight decay of matrices (decoupled with adam)."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    adam_eps: float = 1e-8
    """Epsilon in Adam's denominator."""
    clip_grad: float = 1.0
    """Clip gradients to this global norm; 0: no clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Sequence length, batch sizes, duration and evaluation."""

    seq_length: int = 4096
    """Tokens per sequence, over all context parallel ranks."""
    micro_batch_size: int = 1
    """Sequences per forward pass and data parallel rank."""
    global_batch_size: int = 1
    """Sequences per step over all data parallel ranks."""
    train_iters: int = 100
    """Optimizer steps to run."""
    bf16: bool = False
    """Keep weights and activations in bfloat16, master weights and gradients in fp32."""
    seed: int = 1234
    """Seed of initial weights, dropout and data order."""
    calculate_per_token_loss: bool = True
    """Average the loss over the unmasked tokens of the global batch, which is exact even if masks differ by rank."""
    eval_interval: int | None = None
    """Steps between evaluations on the validation split; null: no evaluation."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    log_interval: int = 1
    """Steps between log lines."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes; null: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training data and tokenizer."""

    data_path: tuple[str, ...] = ()
    """Prefix of the prepared data (`PREFIX.bin`, `PREFIX.idx`); for several, alternate weights and prefixes."""
    split: str = "969,30,1"
    """Shares of documents for training, validation and test."""
    tokenizer_type: TokenizerType = "byte"
    """byte: 256 bytes and end-of-document; hf: a `tokenizers` JSON file; null: the text is token ids."""
    tokenizer_model: str | None = None
    """With hf: path of the `tokenizers` JSON file."""
    eod_token: str | None = None
    """With hf: name of the end-of-document token; null: the first well-known name in the file."""
    vocab_size: int | None = None
    """Vocabulary size before padding; null: the tokenizer's."""
    data_cache_path: str | None = None
    """Folder for index caches; null: `cache` next to the first data prefix."""
    num_workers: int = 0
    """DataLoader worker processes per rank; 0: read in the training process."""
    reset_position_ids: bool = False
    """Count positions from the start of each document, instead of from the start of the sequence."""
    reset_attention_mask: bool = False
    """Let tokens attend to their own document only, where a sequence holds several."""
    eod_mask_loss: bool = False
    """Exclude end-of-document tokens from the loss."""
    sft: bool = False
    """Fine-tune on prompts and answers that `lightseq prepare-data --pack` has packed: the loss is that of answers."""

    verify_data: bool = False
    """Before training, hash the data and compare it with what `prepare-data` recorded; ranks divide the files."""

    @property
    def packed(self) -> bool:
        """Whether the documents of a sequence do not attend to one another."""
        return self.reset_attention_mask or self.sft

    @property
    def restarts_positions(self) -> bool:
        """Whether positions are counted within documents."""
        return self.reset_position_ids or self.sft


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where checkpoints are written, and what is loaded from them."""

    save: str | None = None
    """Folder to save checkpoints in; null: save none."""
    load: str | None = None
    """Folder to resume from; null: start from scratch."""
    load_iteration: int | None = None
    """Step of the checkpoint to load, of whichever run; null: the newest intact one of the run that saved last."""
    resume: Literal["off", "auto"] = "off"
    """auto: resume from the folder of save if it has a checkpoint, instead of from load; then every start is the same
    command."""
    save_interval: int | None = None
    """Steps between checkpoints; null: only at the end."""
    async_save: bool = False
    """Copy the state to host memory, and write it while training goes on. Takes as much memory as the rank's part of a
    checkpoint; checkpoints appear a few steps later."""
    save_retain_interval: int | None = None
    """Remove all checkpoints of this run but those at multiples of this many steps, and the newest; null: keep all."""
    save_keep_last: int | None = None
    """Keep only this many of the newest checkpoints of this run, and those of save_retain_interval; null: keep all."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_load_rng: bool = False
    """Do not load random number generator state."""
    finetune: bool = False
    """Load only the weights and start at step 0; RoPE may then differ from the checkpoint's, and
    adapters may be added."""
    strict_load: bool = False
    """Fail if the newest checkpoint is damaged, instead of falling back to the previous one."""
    data_may_change: bool = False
    """Resume although corpus, mixture or tokenizer are not those of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Progress lines, metrics and reports."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard files; null: none."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to, with the wandb package (WANDB_MODE=offline: to files); null: none."""
    wandb_exp_name: str | None = None
    """Name of the run there; null: one that wandb chooses."""
    wandb_save_dir: str | None = None
    """Folder for wandb's files; null: wandb in the working directory."""
    report_dir: str | None = None
    """Folder for metrics, summary, loss plot and schedule drawing; null: none."""
    trace: str | None = None
    """Folder for a trace of a few steps on all ranks (trace.json, for ui.perfetto.dev) and a picture of attention,
    measured and predicted; null: none."""
    trace_step_start: int = 3
    """The first step to trace."""
    trace_step_end: int = 4
    """The last one."""
    progress: Progress = "auto"
    """live: one line that updates in place; plain: one line per log_interval; auto: live on a terminal, else plain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything `lightseq pretrain` needs; read it with :func:`megatron_lightseq.config.load_config`.

    Constructing one does not check the rules between keys, some of which need the world size;
    :func:`megatron_lightseq.config.validate` does.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    context: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def expert_ffn_size(self) -> int:
        """Width of each expert, after defaults."""
        width = self.experts.moe_ffn_hidden_size
        return self.model.ffn_size if width is None else width

    @property
    def joined_seq_length(self) -> int:
        """Tokens of a sequence as the model sees it: the rows of packed micro-batches are joined into one."""
        joined = self.data.packed and self.context.cp_method != "megatron"
        return self.training.seq_length * (self.training.micro_batch_size if joined else 1)

    @property
    def mla_rope_type(self) -> str:
        """Which RoPE multi-latent attention has, after defaults."""
        return self.rope.rope_type or ("rope" if self.rope.rotary_scaling_factor == 1 else "yarn")

    @property
    def recomputes_single_layers(self) -> bool:
        """Whether every activation checkpoint holds a single layer, whose output nothing else in it reads.

        In a group of layers, a layer's output is read by the next one; in multi-token prediction, by a norm.
        """
        recompute = self.recompute
        alone = recompute.recompute_method == "block" or recompute.recompute_num_layers == 1
        return recompute.recompute_granularity == "full" and alone and self.model.mtp_num_layers is None
