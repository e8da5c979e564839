"""What tensors are for, from the functions that are active when they are created."""

from __future__ import annotations

from types import CodeType, FrameType

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
ATTENTION = "activations of attention"
MLP = "activations of MLPs"
EXPERTS = "activations of experts"
BETWEEN = "embeddings and norms"
LOGITS = "logits and loss"
KERNEL = "attention's results"
TRANSFERS = "attention's receive buffers"
COLLECTIVES = "buffers of tensor and pipeline parallelism"
BACKWARD = "gradients of activations"
OTHER = "other"

PURPOSES = (
    WEIGHTS,
    GRADIENTS,
    OPTIMIZER,
    ATTENTION,
    MLP,
    EXPERTS,
    BETWEEN,
    KERNEL,
    TRANSFERS,
    LOGITS,
    COLLECTIVES,
    BACKWARD,
    OTHER,
)
"""In the order in which reports list them."""

_BY_FUNCTION = {
    "_forward_attention": ATTENTION,
    "_forward_mlp": MLP,
    "_forward_pre_mlp_layernorm": MLP,
    "backward_step": BACKWARD,
    "custom_backward": BACKWARD,
    "_postprocess": LOGITS,
    "_preprocess": BETWEEN,
    "get_tensor": COLLECTIVES,  # GlobalMemoryBuffer
    "create_tensor_recv_prev": COLLECTIVES,
    "create_tensor_recv_next": COLLECTIVES,
}
"""Of functions of Megatron-Core, by name."""
_BY_FILE = (
    ("megatron_lightseq/transport/", TRANSFERS),
    ("megatron_lightseq/attention/", KERNEL),
    ("megatron_lightseq/training/step.py", LOGITS),
    ("megatron/core/optimizer/", OPTIMIZER),
    ("megatron/core/distributed/param_and_grad_buffer.py", GRADIENTS),
    ("megatron/core/transformer/moe/", EXPERTS),
    ("megatron/core/models/common/embeddings/language_model_embedding.py", BETWEEN),
    ("megatron/core/transformer/multi_token_prediction.py", LOGITS),
    ("megatron_lightseq/training/setup.py", WEIGHTS),
)
"""Of everything in files whose path contains these words; the first that fits counts."""
_KNOWN: dict[CodeType, str | None] = {}


def purpose_of(frame: FrameType | None) -> str:
    """The purpose that the innermost function with one has."""
    while frame is not None:
        code = frame.f_code
        if code not in _KNOWN:
            _KNOWN[code] = _of_code(code)
        found = _KNOWN[code]
        if found is not None:
            return found
        frame = frame.f_back
    return OTHER


def _of_code(code: CodeType) -> str | None:
    if "megatron" not in code.co_filename:
        return None
    if "megatron/core/" in code.co_filename and code.co_name in _BY_FUNCTION:
        return _BY_FUNCTION[code.co_name]
    path = code.co_filename.replace("\\", "/")
    return next((purpose for words, purpose in _BY_FILE if words in path), None)
