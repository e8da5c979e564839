"""The functions and methods of Megatron-LM that are replaced in a running process, and in which versions they exist.

Nothing is copied from Megatron-LM, and no file of it changes. Each patch point has the same name in all supported
versions; where versions differ in its signature, the replacement passes on the arguments that it does not know.
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
class PatchPoint:
    """A function or method of Megatron-LM that we replace."""

    module: str
    name: str
    """Its name in the module, with a dot for a method of a class."""
    purpose: str
    """What the replacement is for; completes "replaced so that ..."."""
    versions: str = "0.14 to 0.19 and later"
    """Core versions in which it exists."""

    @property
    def path(self) -> str:
        """The full dotted name."""
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
                raise  # the module exists; a package that it imports is missing
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
                rule=f"it is replaced so that {self.purpose}; supported versions are {SUPPORTED}",
                remedy="Use one of these, or build the model with megatron_lightseq.gpt_layer_spec in a program of "
                "your own",
            )
        )


ARGUMENTS = PatchPoint(
    module="megatron.training.arguments",
    name="add_megatron_arguments",
    purpose="our flags are added to Megatron-LM's",
)
PARSE = PatchPoint(
    module="megatron.training.arguments",
    name="parse_args",
    purpose="the arguments are checked, and our options read",
)
LOCAL_ATTENTION = PatchPoint(
    module="megatron.core.models.backends",
    name="LocalSpecProvider.core_attention",
    purpose="layers of --transformer-impl local get our attention (dense, MoE, MLA, MTP)",
)
TE_ATTENTION = PatchPoint(
    module="megatron.core.extensions.transformer_engine_spec_provider",
    name="TESpecProvider.core_attention",
    purpose="layers of --transformer-impl transformer_engine get our attention (dense, MoE, MLA, MTP)",
)
BATCH = PatchPoint(
    module="megatron.core.utils",
    name="get_batch_on_this_cp_rank",
    purpose="batches are cut by the layout of attention",
)
"""(batch) in 0.14 and 0.15, + cp_group in 0.16, + is_hybrid_cp and hybrid_cp_group_func in 0.18,
+ use_per_sequence_balancing in 0.19."""
MODEL = PatchPoint(
    module="megatron.core.models.gpt.gpt_model",
    name="GPTModel.__init__",
    purpose="a model adopts the layout of its attention once it is built",
)
DEFAULT_LAYERS = PatchPoint(
    module="megatron.training.models.gpt",
    name="default_layer_spec",
    purpose="--spec gets the layers that Megatron-LM would choose",
    versions="0.19 and later",
)
WRAPPED_MODEL = PatchPoint(
    module="megatron.core.distributed.distributed_data_parallel",
    name="DistributedDataParallel.__init__",
    purpose="models other than GPTModel are noticed before they train",
)
PATCH_POINTS = (ARGUMENTS, PARSE, LOCAL_ATTENTION, TE_ATTENTION, BATCH, MODEL, WRAPPED_MODEL)
"""What the launcher replaces; with ``--spec`` the first two are left alone."""


def megatron_version() -> str:
    """Megatron-Core's version and folder, if they are known."""
    core = sys.modules.get("megatron.core")
    version = getattr(core, "__version__", "core of unknown version")
    return f"{version} in {next(iter(getattr(core, '__path__', ())), 'an unknown folder')}"


class Replacements:
    """What was replaced in this process, so that it can be undone."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, point: PatchPoint, make: Callable[[Any], Any]) -> None:
        """Replace a patch point by ``make(original)``.

        Modules of Megatron-LM that imported a function by name hold the function itself: they get the replacement too,
        and so does a running script.

        Raises:
            UnsupportedError: this Megatron lacks the patch point.
        """
        owner, attribute = point.find()
        original = getattr(owner, attribute)
        replacement = make(original)
        self._set(owner, attribute, replacement)
        if "." in point.name:
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
        """Restore the originals, in reverse order."""
        while self._undo:
            self._undo.pop()()
