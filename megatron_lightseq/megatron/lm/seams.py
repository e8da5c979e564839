"""Where Megatron-LM is taken hold of: every attribute of it that is replaced, in which versions, and how.

Nothing is copied from Megatron-LM and no file of it changes. Each seam is a function or method that exists under
one name in all supported versions; what differs between versions is its signature, and the replacement passes on
what it does not know.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.errors import UnsupportedError, explain

SUPPORTED = "core_v0.14.0 to core_v0.19.0 and the main branch after it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """An attribute of Megatron-LM that we replace."""

    module: str
    name: str
    """In the module, with dots for an attribute of a class."""
    purpose: str
    """What is done there, for messages and readers."""
    versions: str = "0.14 to 0.19 and later"
    """Core versions in which it was seen."""

    @property
    def path(self) -> str:
        """The whole dotted name."""
        return f"{self.module}.{self.name}"

    def find(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name there.

        Raises:
            UnsupportedError: this Megatron has no such module or attribute.
        """
        try:
            owner: Any = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not self.module.startswith(error.name):
                raise  # the module is there and misses a package of its own
            raise self._missing() from error
        *classes, attribute = self.name.split(".")
        for name in classes:
            owner = getattr(owner, name, None)
        if not hasattr(owner, attribute):
            raise self._missing()
        return owner, attribute

    def _missing(self) -> UnsupportedError:
        return UnsupportedError(
            explain(
                got=f"this Megatron-LM ({megatron_version()}) has no {self.path}",
                rule=f"it is where {self.purpose}; supported are {SUPPORTED}",
                remedy="Use one of those, or build the model with megatron_lightseq.gpt_layer_spec in a program of "
                "your own",
            )
        )


ARGUMENTS = Seam(
    module="megatron.training.arguments",
    name="add_megatron_arguments",
    purpose="our flags join Megatron-LM's",
)
PARSE = Seam(
    module="megatron.training.arguments",
    name="parse_args",
    purpose="what was asked for is read and checked",
)
LOCAL_ATTENTION = Seam(
    module="megatron.core.models.backends",
    name="LocalSpecProvider.core_attention",
    purpose="layers of --transformer-impl local get their attention (dense, MoE, MLA, MTP)",
)
TE_ATTENTION = Seam(
    module="megatron.core.extensions.transformer_engine_spec_provider",
    name="TESpecProvider.core_attention",
    purpose="layers of --transformer-impl transformer_engine get their attention (dense, MoE, MLA, MTP)",
)
BATCH = Seam(
    module="megatron.core.utils",
    name="get_batch_on_this_cp_rank",
    purpose="a batch is cut over the context-parallel ranks",
)
"""(batch) in 0.14 and 0.15, + cp_group in 0.16, + is_hybrid_cp and hybrid_cp_group_func in 0.18,
+ use_per_sequence_balancing in 0.19."""
MODEL = Seam(
    module="megatron.core.models.gpt.gpt_model",
    name="GPTModel.__init__",
    purpose="a finished model adopts the layout of its attention",
)
DEFAULT_LAYERS = Seam(
    module="megatron.training.models.gpt",
    name="default_layer_spec",
    purpose="Megatron-LM chooses its layers from a configuration",
    versions="0.19 and later",
)
SEAMS = (ARGUMENTS, PARSE, LOCAL_ATTENTION, TE_ATTENTION, BATCH, MODEL)
"""What the launcher needs; with ``--spec`` the first two are not touched."""


def megatron_version() -> str:
    """Megatron-Core's version and folder, as far as they can be found out."""
    core = sys.modules.get("megatron.core")
    version = getattr(core, "__version__", "core of unknown version")
    return f"{version} in {next(iter(getattr(core, '__path__', ())), 'an unknown folder')}"


class Replacements:
    """What has been replaced in this process, so that all of it can be undone."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, seam: Seam, make: Callable[[Any], Any]) -> None:
        """Put ``make(original)`` in the place of a seam's attribute.

        Modules of Megatron-LM that have imported a function by its name hold the function itself: they get the
        replacement too, and so does a running script.

        Raises:
            UnsupportedError: this Megatron has no such seam.
        """
        owner, attribute = seam.find()
        original = getattr(owner, attribute)
        replacement = make(original)
        self._set(owner, attribute, replacement)
        if "." in seam.name:
            return
        for name, module in list(sys.modules.items()):
            if name == "__main__" or name.partition(".")[0] == "megatron":
                for alias, value in list(getattr(module, "__dict__", {}).items()):
                    if value is original:
                        self._set(module, alias, replacement)

    def _set(self, owner: Any, attribute: str, value: Any) -> None:
        before = vars(owner)[attribute]
        setattr(owner, attribute, value)
        self._undo.append(lambda: setattr(owner, attribute, before))

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._undo:
            self._undo.pop()()
