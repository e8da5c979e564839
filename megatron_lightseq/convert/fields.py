"""config.json, read field by field: what nobody has read is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain

_MISSING: Any = object()

# fmt: off
WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "model_type", "name_or_path", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "return_dict_in_generate", "id2label", "label2id", "problem_type",
    "task_specific_params", "tokenizer_class", "prefix", "finetuning_task", "use_return_dict",
    "torchscript", "is_decoder", "is_encoder_decoder", "cross_attention_hidden_size", "unsloth_version",
    "_model_name_or_path", "unk_token_id", "unsloth_fixed", "transformers.js_config", "is_llama_config",
    "initializer_range",
})
# fmt: on
"""Fields that say nothing about the function of a decoder, only about its use, its making or its storage."""


class Fields:
    """The fields of a config.json, or of one of its parts.

    Args:
        values: the parsed JSON object.
        origin: named in errors.
        ignored: fields that the user has said to be without effect.
    """

    def __init__(self, values: Mapping[str, Any], origin: str, ignored: Iterable[str] = ()) -> None:
        self._values = values
        self.origin = origin
        self._read: set[str] = set(ignored) | WITHOUT_EFFECT

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field, which thereby counts as honoured; null counts as absent.

        Raises:
            ConfigError: the field is absent and has no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConfigError(
                explain(
                    got=f"{self.origin} without {name}",
                    rule="this architecture cannot be described without it",
                    remedy=f"Add {name}, with the value that the model was trained with",
                )
            )
        return default

    def given(self, name: str, default: Any) -> Any:
        """The value of a field for which null means something else than its absence."""
        self._read.add(name)
        return self._values.get(name, default)

    def whole(self, name: str, default: Any = _MISSING) -> int:
        """A field that is a whole number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(name, value, "a whole number")
        return value

    def real(self, name: str, default: Any = _MISSING) -> float:
        """A field that is a number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong_type(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """A field that is true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._wrong_type(name, value, "true or false")
        return value

    def items(self, name: str) -> list[Any]:
        """A field that is a list; absent: empty."""
        value = self.take(name, [])
        if not isinstance(value, list):
            raise self._wrong_type(name, value, "a list")
        return value

    def part(self, name: str, default: Any = _MISSING) -> Fields:
        """A field that is an object of fields."""
        value = self.take(name, default)
        if not isinstance(value, Mapping):
            raise self._wrong_type(name, value, "an object")
        return Fields(value, f"{self.origin}: {name}")

    def expect(self, name: str, allowed: Any, default: Any = _MISSING) -> None:
        """Refuse any other value than the one that the recipe's model has.

        Raises:
            UnsupportedError: the field has another value.
        """
        value = self.take(name, allowed if default is _MISSING else default)
        if value != allowed:
            raise self.refusal(name, value, f"recipes describe models with {name} {allowed!r}")

    def refusal(self, name: str, value: Any, rule: str) -> UnsupportedError:
        """An error that names a field and its value."""
        return UnsupportedError(
            explain(
                got=f"{name} {value!r} ({self.origin})",
                rule=rule,
                remedy="Choose another model; no option makes this one the same",
            )
        )

    def finish(self) -> None:
        """Refuse fields that nobody has read.

        Raises:
            UnsupportedError: such fields, with their values.
        """
        left = {name: value for name, value in self._values.items() if name not in self._read}
        left = {name: value for name, value in left.items() if value is not None}
        if left:
            shown = ", ".join(f"{name}: {value!r}" for name, value in sorted(left.items()))
            raise UnsupportedError(
                explain(
                    got=f"{self.origin} with {shown}",
                    rule="every field is honoured or refused, and the meaning of these is not known",
                    remedy="If they do not change what the model computes, pass --ignore-field NAME for each",
                )
            )

    def _wrong_type(self, name: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(
            explain(
                got=f"{name} {value!r} ({self.origin})",
                rule=f"{name} is {wanted}",
                remedy="Correct the file, or download it again",
            )
        )
