"""The families that are known, by ``model_type``."""

from __future__ import annotations

from megatron_lightseq.config.names import nearest
from megatron_lightseq.convert.families.deepseek import DEEPSEEK
from megatron_lightseq.convert.families.dense import DENSE
from megatron_lightseq.convert.families.experts import EXPERTS
from megatron_lightseq.convert.families.family import Family
from megatron_lightseq.convert.families.gemma import GEMMA
from megatron_lightseq.convert.families.glm import GLM
from megatron_lightseq.convert.families.gpt_oss import GPT_OSS
from megatron_lightseq.convert.families.qwen_hybrid import QWEN_HYBRID
from megatron_lightseq.errors import UnsupportedError, explain

FAMILIES: dict[str, Family] = {**DENSE, **EXPERTS, **GEMMA, **GPT_OSS, **GLM, **DEEPSEEK, **QWEN_HYBRID}


def family_of(model_type: object, origin: str) -> Family:
    """The family of a ``model_type``; raises UnsupportedError, with the names of those that are known."""
    found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if found is not None:
        return found
    near = nearest(str(model_type), FAMILIES)
    raise UnsupportedError(
        explain(
            got=f"model_type {model_type!r} ({origin})",
            rule=f"the families that can be converted are {', '.join(sorted(FAMILIES))}",
            remedy=f"Perhaps {near} was meant" if near else "Convert a model of one of these families",
        )
    )
