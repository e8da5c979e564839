"""The configuration of a pretraining run: one frozen dataclass per section.

Keys are flat and unique over all sections: `num_layers` is a YAML key, a `--num-layers` flag and a field of
:class:`ModelConfig`. Names and meanings are Megatron-LM's arguments wherever Megatron has the argument; ours
are added beside them (`cp_*`, `keep_attention_on_recompute`, `report_dir`, `progress`).

The docstring under a field is its help text, so `lightseq pretrain --help` cannot disagree with this file.
Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_lightseq.schedule.network import Network

PositionEmbedding = Literal["rope", "learned_absolute", "none"]
SoftmaxType = Literal["vanilla", "off-by-one", "learnable"]
Normalization = Literal["RMSNorm", "LayerNorm"]
Backend = Literal["auto", "nccl", "gloo"]
CPMethod = Literal[
    "lightseq", "ring", "zigzag", "all_gather", "mesh", "ulysses", "usp", "rsa", "auto", "megatron"
]
CPCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
CPLayout = Literal["auto", "contiguous", "zigzag", "striped"]
CPKernel = Literal["auto", "cuda", "cpu", "reference", "flash_attn", "sdpa"]
LoadBalancing = Literal["none", "aux_loss", "seq_aux_loss"]
TokenDispatcher = Literal["alltoall", "allgather"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp"]
LRDecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]
TokenizerType = Literal["byte", "hf", "null"]
Progress = Literal["auto", "live", "plain", "off"]

LAYOUT_OF_METHOD: dict[str, str] = {
    "lightseq": "contiguous",
    "ring": "contiguous",
    "zigzag": "zigzag",
    "all_gather": "zigzag",
    "mesh": "zigzag",
    "ulysses": "contiguous",
    "usp": "contiguous",
    "rsa": "contiguous",
    "auto": "contiguous",
    "megatron": "zigzag",  # what Transformer Engine's context parallelism expects
}
"""The layout that `cp_layout: auto` stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = 4
    """Number of transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width inside the MLP; null: 4 * hidden_size, with swiglu 8/3 of it in whole multiples of 64."""
    num_attention_heads: int = 8
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (GQA); null: one per query head (MHA), 1: multi-query."""
    kv_channels: int | None = None
    """Dimension of one head; null: hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Longest sequence the position embedding knows; null: seq_length."""
    position_embedding_type: PositionEmbedding = "rope"
    """How positions enter the model."""
    rotary_base: int = 10000
    """Base period of RoPE."""
    rotary_percent: float = 1.0
    """Fraction of a head's dimensions that RoPE turns."""
    normalization: Normalization = "RMSNorm"
    """Which normalisation every layer uses."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside the normalisation."""
    swiglu: bool = True
    """Gated MLP with SiLU (else: GELU)."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer weights of its own instead of the embedding's."""
    add_bias_linear: bool = False
    """Biases in all linear layers (Megatron's --disable-bias-linear is --no-add-bias-linear)."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head before attention."""
    window_size: tuple[int, ...] = ()
    """Sliding window: tokens back and ahead that a query sees, e.g. [1023, 0]; empty: all before it."""
    window_attn_skip_freq: int | None = None
    """With window_size: every so many layers, one sees all tokens before; null: none does."""
    softmax_type: SoftmaxType = "vanilla"
    """off-by-one: every row has one more logit, 0, of a key without value; learnable: a trained one a head (sinks)."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities; must be 0 with context parallelism."""
    hidden_dropout: float = 0.0
    """Dropout on the residual stream."""
    init_method_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this and of tensor_model_parallel_size."""
    multi_latent_attention: bool = False
    """Attention with keys and values projected from one latent vector (MLA), and RoPE on dimensions of its own."""
    q_lora_rank: int | None = None
    """With MLA: width of the latent vector of queries; null: queries are projected directly."""
    kv_lora_rank: int = 32
    """With MLA: width of the latent vector of keys and values."""
    qk_head_dim: int = 128
    """With MLA: dimension of a head's queries and keys that RoPE leaves alone."""
    qk_pos_emb_head_dim: int = 64
    """With MLA: dimension of a head's queries and keys that RoPE turns; all heads share these keys."""
    v_head_dim: int = 128
    """With MLA: dimension of a head's values."""
    mtp_num_layers: int | None = None
    """Layers that predict one further token each, beside the next (MTP); null: none."""
    mtp_loss_scaling_factor: float = 0.1
    """With MTP: weight of the further tokens' mean loss beside the next token's."""

    @property
    def num_window_layers(self) -> int:
        """Number of layers that see a window only."""
        if not self.window_size:
            return 0
        skipped = self.num_layers // self.window_attn_skip_freq if self.window_attn_skip_freq else 0
        return self.num_layers - skipped

    @property
    def head_dim(self) -> int:
        """Dimension of one head of queries and keys, after defaults."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        if self.kv_channels is not None:
            return self.kv_channels
        return self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Dimension of one head of values, after defaults."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, after defaults."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP, after defaults (Megatron-LM's own arithmetic)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(64, int(4 * self.hidden_size * 2 / 3) // 64 * 64)
        return 4 * self.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """A mixture of experts (MoE) in place of every MLP."""

    num_experts: int | None = None
    """Number of experts in every layer; null: one MLP that all tokens take."""
    moe_ffn_hidden_size: int | None = None
    """Width inside each expert; null: ffn_hidden_size."""
    moe_router_topk: int = 2
    """Experts that each token takes."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """What evens out the experts' load: a loss over the micro-batch, over each sequence, or nothing."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load balancing loss; 0: none."""
    moe_token_dispatcher_type: TokenDispatcher = "alltoall"
    """How tokens travel to the ranks of their experts."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of one more expert that every token takes; null: there is none."""
    moe_grouped_gemm: bool = False
    """Multiply all local experts in one kernel; Transformer Engine has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks share the work; data parallel size is what remains of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers (PP)."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per virtual stage of the interleaved pipeline schedule; null: not interleaved."""
    overlap_p2p_comm: bool = True
    """Overlap the pipeline's sends and receives with compute (interleaved schedule only)."""
    context_parallel_size: int = 1
    """Ranks that share every sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer (EP), taken out of tensor, context and data parallel ranks."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share the matrices of each expert; null: tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Cut norms and dropout over the TP ranks along the sequence (SP); needs TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data and context parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""
    overlap_param_gather: bool = False
    """Gather parameters while forward runs; needs use_distributed_optimizer."""
    distributed_backend: Backend = "auto"
    """auto: nccl when every rank has a GPU, gloo otherwise."""
    distributed_timeout_minutes: float = 10.0
    """How long a collective may take before the run is declared dead."""

    @property
    def virtual_pipeline(self) -> bool:
        """Whether the interleaved pipeline schedule is asked for."""
        return self.num_layers_per_virtual_pipeline_stage is not None

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share the matrices of each expert, after defaults."""
        size = self.expert_tensor_parallel_size
        return self.tensor_model_parallel_size if size is None else size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that hold one copy of all experts: expert tensor * EP * PP."""
        return self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model working on one sequence: TP * PP * CP."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextParallelConfig:
    """How attention runs over the context parallel ranks."""

    cp_method: CPMethod = "lightseq"
    """How ranks share attention; auto: fastest in simulation; megatron: Megatron's own (CP needs TE)."""
    cp_ulysses_size: int | None = None
    """With usp: ranks that exchange heads; null: the largest divisor up to the square root."""
    cp_comm_type: tuple[CPCommType, ...] = ()
    """Megatron's names, one for all layers or one a layer: p2p is cp_method, a2a ulysses, a2a+p2p usp."""
    cp_network: str | None = None
    """With auto: the cluster's network, by name or by numbers; null: NVLink in nodes of 8, 100 Gbit/s between."""
    cp_layout: CPLayout = "auto"
    """Which rank owns which tokens; auto: what balances the method."""
    cp_overlap: bool = True
    """Transfer the next step's blocks while this step's are computed."""
    cp_kernel: CPKernel = "auto"
    """Attention kernel; auto: ours for the device; flash_attn: that package; sdpa: torch's own flash attention."""

    @property
    def method_name(self) -> str:
        """The method in the form that the schedule package reads: usp with its size."""
        sized = self.cp_method == "usp" and self.cp_ulysses_size is not None
        return f"usp:{self.cp_ulysses_size}" if sized else self.cp_method

    @property
    def network(self) -> Network | None:
        """What auto predicts with."""
        return None if self.cp_network is None else Network.parse(self.cp_network)

    @property
    def layout_name(self) -> str:
        """The layout, with auto resolved."""
        return LAYOUT_OF_METHOD[self.cp_method] if self.cp_layout == "auto" else self.cp_layout


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """What is recomputed in backward instead of stored."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full: whole layers, selective: the modules named in recompute_modules, null: nothing."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: every layer in groups of recompute_num_layers (uniform), or only the first ones (block)."""
    recompute_num_layers: int | None = None
    """With full: layers per group (uniform) or layers recomputed per pipeline stage (block)."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """With selective: which modules."""
    keep_attention_on_recompute: bool = True
    """Keep attention's output and log-sum-exp: recomputation repeats neither attention nor its traffic."""
    mlp_tile_tokens: int | None = None
    """Compute MLPs in tiles of so many tokens, again in backward: a tile's insides are held at a time; null: whole."""
    loss_tile_tokens: int | None = None
    """Compute logits and losses in tiles of so many tokens, again in backward; null: all logits at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """The optimizer and its learning rate schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW (decoupled weight decay)."""
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
    """Decoupled weight decay on matrices."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to Adam's denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Batch, length and duration."""

    seq_length: int = 4096
    """Tokens per sequence, over all context parallel ranks."""
    micro_batch_size: int = 1
    """Sequences per rank and forward pass."""
    global_batch_size: int = 1
    """Sequences per step over all data parallel ranks."""
    train_iters: int = 100
    """Optimizer steps to run."""
    bf16: bool = False
    """Weights and activations in bfloat16, master weights and gradients in fp32."""
    seed: int = 1234
    """Seed of weights, dropout and data order."""
    calculate_per_token_loss: bool = True
    """Average over the unmasked tokens of the global batch: exact when masks differ between ranks."""
    eval_interval: int | None = None
    """Steps between evaluations on the validation split; null: none."""
    eval_iters: int = 10
    """Batches per evaluation."""
    log_interval: int = 1
    """Steps between log lines."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes; null: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read."""

    data_path: tuple[str, ...] = ()
    """Prefixes of prepared data (`PREFIX.bin`, `PREFIX.idx`); several: alternate weight and prefix."""
    split: str = "969,30,1"
    """Shares of documents for training, validation and test."""
    tokenizer_type: TokenizerType = "byte"
    """byte: 256 bytes and end-of-document, hf: a `tokenizers` JSON file, null: text is token ids."""
    tokenizer_model: str | None = None
    """The `tokenizers` JSON file for hf."""
    eod_token: str | None = None
    """Name of the end-of-document token in that file; null: the first well-known name that it has."""
    vocab_size: int | None = None
    """Size of the vocabulary before padding; null: the tokenizer's."""
    data_cache_path: str | None = None
    """Folder for index caches; null: `cache` beside the first data prefix."""
    num_workers: int = 0
    """DataLoader processes per rank; 0: read in the training process."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where state is written and read."""

    save: str | None = None
    """Folder for checkpoints; null: none are written."""
    load: str | None = None
    """Folder to resume from; null: start afresh."""
    save_interval: int | None = None
    """Steps between checkpoints; null: only at the end."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_load_rng: bool = False
    """Do not load random number generator state."""
    finetune: bool = False
    """Load weights only and start at step 0."""
    strict_load: bool = False
    """Refuse a damaged newest checkpoint instead of falling back to the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What a person sees."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard files; null: none."""
    report_dir: str | None = None
    """Folder for the summary, the loss plot and the schedule drawing; null: none."""
    progress: Progress = "auto"
    """live: one line that updates, plain: one line per log_interval, auto: live on a terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything `lightseq pretrain` needs; read it with :func:`megatron_lightseq.config.load_config`.

    Constructing one does not check rules between keys, which may need the world size:
    :func:`megatron_lightseq.config.validate` does, and `load_config` calls it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    context: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def expert_ffn_size(self) -> int:
        """Width inside each expert, after defaults."""
        width = self.experts.moe_ffn_hidden_size
        return self.model.ffn_size if width is None else width

    @property
    def recomputes_single_layers(self) -> bool:
        """Whether each recomputed checkpoint holds one layer, whose output goes nowhere else in it.

        In groups a layer feeds the next, and in multi-token prediction a norm.
        """
        recompute = self.recompute
        alone = recompute.recompute_method == "block" or recompute.recompute_num_layers == 1
        return recompute.recompute_granularity == "full" and alone and self.model.mtp_num_layers is None
