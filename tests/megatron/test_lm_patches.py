"""What is replaced in Megatron-LM, with the signatures of all its versions, and the errors if that is impossible."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from tests.megatron import fake_lm

CP_SIZE, RANK = 3, 1


class Group:
    """A fake process group with what cutting batches needs."""

    def __init__(self, size: int = CP_SIZE) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return RANK


@pytest.fixture
def patches() -> Iterator[Any]:
    from megatron_lightseq.megatron.lm.patches import Patches

    made = Patches()
    yield made
    made.undo()


def configured(patches: Any, *flags: str) -> Any:
    from megatron_lightseq.megatron.lm.options import add_flags, options_from_flags

    arguments = add_flags(argparse.ArgumentParser()).parse_args(flags)
    patches.configure(options_from_flags(arguments), arguments)
    return patches


# --- patch points -------------------------------------------------------------------------------------------------


def test_every_patch_point_of_the_core_is_in_the_installed_one() -> None:
    from megatron_lightseq.megatron.lm.patch_points import (
        BATCH,
        LOCAL_ATTENTION,
        MODEL,
        PATCH_POINTS,
        TE_ATTENTION,
    )

    for point in (BATCH, LOCAL_ATTENTION, MODEL, TE_ATTENTION):
        owner, attribute = point.find()
        assert callable(getattr(owner, attribute))
    assert len({point.path for point in PATCH_POINTS}) == len(PATCH_POINTS)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.core.models.nowhere", "X"),
        ("megatron.core.utils", "cut_no_batch"),
        ("megatron.core.models.backends", "NoProvider.core_attention"),
        ("megatron.training.arguments", "add_megatron_arguments"),
    ],
)
def test_a_missing_patch_point_is_named_with_version_and_remedy(module: str, name: str) -> None:
    import megatron.core

    from megatron_lightseq.megatron.lm.patch_points import PatchPoint

    point = PatchPoint(module=module, name=name, purpose="something is done")
    with pytest.raises(UnsupportedError) as caught:
        point.find()
    assert f"this Megatron-LM ({megatron.core.__version__} in " in str(caught.value)
    assert (
        f"has no {module}.{name}: it is replaced so that something is done; supported versions are core_v0.14.0"
        in str(caught.value)
    )


def test_a_patch_point_whose_module_lacks_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lightseq.megatron.lm import patch_points

    def failing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(patch_points.importlib, "import_module", failing)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        patch_points.BATCH.find()


def test_replacements_reach_every_module_that_holds_the_name_and_are_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_lightseq.megatron.lm import patch_points

    fake_lm.modules(monkeypatch)
    initialize, arguments = sys.modules["megatron.training.initialize"], patch_points.PARSE.find()[0]
    original = arguments.parse_args
    assert initialize.parse_args is original
    replacements = patch_points.Replacements()
    replacements.replace(patch_points.PARSE, lambda before: lambda: before)
    assert initialize.parse_args is arguments.parse_args
    assert initialize.parse_args() is original
    replacements.undo()
    assert initialize.parse_args is arguments.parse_args is original


# --- flags --------------------------------------------------------------------------------------------------------


def parsed(patches: Any, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    """Parse a command line as Megatron-LM's initialisation does, with our flags registered."""
    fake_lm.modules(monkeypatch)
    patches.patch_arguments()
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
    return sys.modules["megatron.training.initialize"].parse_args()


def test_our_flags_stand_beside_megatrons(patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(
        patches, monkeypatch, "--seq-length", "96", "--cp-method", "ring", "--attention-dropout", "0"
    )
    assert (arguments.seq_length, arguments.cp_method) == (96, "ring")
    assert patches.active
    assert patches.settings.method == "ring"


def test_unknown_flags_are_still_refused(
    patches: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(patches, monkeypatch, "--cp-methods", "ring")
    assert "unrecognized arguments: --cp-methods" in capsys.readouterr().err


def test_everything_that_would_be_ignored_is_refused_in_one_report(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"^--attention-dropout 0\.1: .*Set --attention-dropout to 0 to train without it, or keep",
    ):
        parsed(patches, monkeypatch)
    several = ("--sft", "--cuda-graph-impl", "local", "--cp-layout", "zigzag")
    patches.on_cpu = True
    with pytest.raises(UnsupportedError) as caught:
        parsed(patches, monkeypatch, *several, "--distributed-backend", "nccl")
    first, *problems = str(caught.value).splitlines()
    assert first == "5 options are not supported:"
    assert [problem.split(":")[0] for problem in problems] == [
        "1. --attention-dropout 0.1",
        "2. --cuda-graph-impl local",
        "3. --sft",
        "4. --distributed-backend nccl on a machine without a CUDA device",
        "5. cp_method lightseq, cp_layout zigzag, context_parallel_size 1",
    ]
    with pytest.raises(ConfigError, match=r"--yaml-cfg"):
        parsed(patches, monkeypatch, "--yaml-cfg", "x.yaml")


def test_arguments_that_select_a_kernel_are_replaced_with_one_line_of_log(
    patches: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron.core.transformer.enums import AttnBackend

    from megatron_lightseq.megatron import notes

    notes.note_once.cache_clear()
    flags = ("--attention-dropout", "0", "--attention-backend", "unfused", "--use-flash-attn")
    for _ in range(2):
        arguments = parsed(patches, monkeypatch, *flags)
    assert (arguments.attention_backend, arguments.use_flash_attn) == (AttnBackend.auto, False)
    (record,) = caplog.records
    assert record.message == (
        "LightSeq attention runs its own kernels, which cp_kernel selects; replaced: --attention-backend unfused, "
        "--use-flash-attn"
    )
    caplog.clear()
    notes.note_once.cache_clear()
    monkeypatch.setenv("RANK", "1")
    parsed(patches, monkeypatch, *flags)
    assert not caplog.records, "only the first rank logs it"


def test_the_baseline_keeps_the_kernel_that_is_asked_for(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = parsed(patches, monkeypatch, "--cp-method", "megatron", "--attention-backend", "flash")
    assert arguments.attention_backend.name == "flash"


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ((), False),
        (("--micro-batch-size", "2"), True),
        (("--pipeline-model-parallel-size", "2"), True),
        (("--no-create-attention-mask-in-dataloader",), True),
    ],
)
def test_documents_are_kept_apart_or_refused(
    patches: Any, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], refused: bool
) -> None:
    words = ("--attention-dropout", "0", "--reset-attention-mask", *flags)
    if not refused:
        assert parsed(patches, monkeypatch, *words).reset_attention_mask
        return
    with pytest.raises(
        UnsupportedError, match=r"--reset-attention-mask unless --micro-batch-size and .*are 1"
    ):
        parsed(patches, monkeypatch, *words)


@pytest.mark.parametrize(
    "cut", [("--context-parallel-size", "2"), ("--tensor-model-parallel-size", "2", "--sequence-parallel")]
)
def test_dropping_tokens_by_rank_is_refused_where_tokens_are_cut(
    patches: Any, monkeypatch: pytest.MonkeyPatch, cut: tuple[str, ...]
) -> None:
    words = ("--attention-dropout", "0", "--moe-expert-capacity-factor", "1.0")
    by_position = ("--moe-token-drop-policy", "position")
    parsed(patches, monkeypatch, *words, *cut)
    expected = (
        r"--moe-expert-capacity-factor 1.0 with --moe-token-drop-policy position .*over ranks.*: each rank would "
        r"count.*Use --moe-token-drop-policy probs without --moe-pad-expert-input-to-capacity"
    )
    with pytest.raises(UnsupportedError, match=expected):
        parsed(patches, monkeypatch, *words, *by_position, *cut)


def test_the_baseline_may_do_what_we_refuse(patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed(patches, monkeypatch, "--cp-method", "megatron", "--reset-attention-mask", "--cp-comm-type", "a2a")
    assert not patches.active


def test_kinds_of_single_layers_are_taken_over(patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(patches, monkeypatch, "--attention-dropout", "0", "--cp-comm-type", "p2p", "a2a")
    assert patches.settings.comm_types == ("p2p", "a2a")
    assert arguments.cp_comm_type == ["p2p"]


def test_options_may_be_read_twice_but_not_changed(patches: Any) -> None:
    configured(configured(patches, "--cp-method", "ring"), "--cp-method", "ring")
    with pytest.raises(ConfigError, match=r"one process trains with one set"):
        configured(patches, "--cp-method", "mesh")


def test_the_cpu_has_defaults_of_its_own_and_gloo_only(patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patches.on_cpu = True
    arguments = parsed(patches, monkeypatch, "--attention-dropout", "0")
    assert (arguments.distributed_backend, arguments.transformer_impl) == ("gloo", "local")
    assert not arguments.apply_rope_fusion
    assert not hasattr(arguments, "masked_softmax_fusion"), "only defaults of arguments that this version has"
    with pytest.raises(ConfigError, match=r"--distributed-backend nccl .*without a CUDA device.*gloo"):
        parsed(patches, monkeypatch, "--attention-dropout", "0", "--distributed-backend", "nccl")


# --- batches, in the signatures of all versions -------------------------------------------------------------------


def cut_0_14(batch: dict[str, Any]) -> Any:
    return "megatron's"


def cut_0_16(batch: dict[str, Any], cp_group: Any = None) -> Any:
    return "megatron's"


def cut_0_18(
    batch: dict[str, Any], is_hybrid_cp: bool, cp_group: Any = None, hybrid_cp_group_func: Any = None
) -> Any:
    return "megatron's"


def cut_0_19(
    batch: dict[str, Any],
    is_hybrid_cp: bool,
    cp_group: Any = None,
    hybrid_cp_group_func: Any = None,
    use_per_sequence_balancing: bool = False,
) -> Any:
    return "megatron's"


NEWER = {"is_hybrid_cp": False, "cp_group": Group(), "hybrid_cp_group_func": None}
CALLS: list[tuple[Any, dict[str, Any]]] = [
    (cut_0_14, {}),
    (cut_0_16, {}),
    (cut_0_16, {"cp_group": Group()}),
    (cut_0_18, NEWER),
    (cut_0_19, {**NEWER, "use_per_sequence_balancing": False}),
]


def batch() -> dict[str, Any]:
    tokens = torch.arange(12).expand(2, -1)
    return {"tokens": tokens, "labels": tokens + 1, "attention_mask": None, "cu_seqlens": None}


@pytest.fixture
def cutter(patches: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Patches with options, a model, and a context-parallel group in Megatron's global state."""
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: Group())
    patches._models = 1
    return configured(patches, "--cp-method", "lightseq")


@pytest.mark.parametrize(("original", "options"), CALLS)
def test_batches_are_cut_by_our_layout_in_every_version(
    cutter: Any, original: Any, options: dict[str, Any]
) -> None:
    cut = cutter._get_batch(original)(batch(), **options)
    expected = SequenceLayout.contiguous(CP_SIZE).positions(RANK, 12)
    assert list(cut) == list(batch()), "0.14 unpacks the values in their order"
    assert cut["tokens"].tolist() == [list(expected)] * 2
    assert cut["labels"].tolist() == [[position + 1 for position in expected]] * 2
    assert cut["cu_seqlens"] is None


def test_one_rank_and_the_baseline_keep_megatrons_cut(cutter: Any, patches: Any) -> None:
    assert cutter._get_batch(cut_0_16)(batch(), cp_group=Group(1)) == "megatron's"
    patches.options = None
    assert patches._get_batch(cut_0_16)(batch(), cp_group=Group()) == "megatron's"


@pytest.mark.parametrize(
    ("entries", "options", "named"),
    [
        ({"cu_seqlens": torch.tensor([0, 6, 12])}, {}, "cu_seqlens"),
        ({"local_cp_size": torch.tensor(2)}, {}, "local_cp_size"),
        ({}, {"is_hybrid_cp": True}, "is_hybrid_cp"),
        ({}, {"use_per_sequence_balancing": True}, "use_per_sequence_balancing"),
    ],
)
def test_packed_batches_are_refused_by_name(
    cutter: Any, entries: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"a batch with {named}: .*unpacked sequences"):
        cutter._get_batch(cut_0_19)({**batch(), **entries}, **{**NEWER, **options})


def test_a_program_without_a_gpt_model_is_refused(cutter: Any) -> None:
    cutter._models = 0
    with pytest.raises(UnsupportedError, match=r"before a GPTModel was built: .*trains another model"):
        cutter._get_batch(cut_0_16)(batch(), cp_group=Group())


# --- models other than GPTModel -----------------------------------------------------------------------------------


class MambaMixer(torch.nn.Module):
    """A fake of Megatron's, which needs packages that are not installed. Only its name and module are used."""


MambaMixer.__module__ = "megatron.core.ssm.mamba_mixer"


def hybrid(*layers: torch.nn.Module) -> torch.nn.Module:
    """A model with Mamba layers, as ``pretrain_mamba.py`` builds it."""
    return torch.nn.Sequential(MambaMixer(), MambaMixer(), *layers)


def test_a_hybrid_model_says_that_our_attention_is_not_used(
    cutter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron.core import parallel_state

    from megatron_lightseq.megatron import notes

    notes.note_once.cache_clear()
    attention = torch.nn.Module()
    attention.core_attention = torch.nn.Identity()
    wrap = cutter._wrap_model(lambda self, config, ddp_config, module: seen.append(module))
    seen: list[torch.nn.Module] = []
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    for model in (torch.nn.Linear(1, 1), hybrid(attention)):
        wrap(None, None, None, model)
    (record,) = caplog.records
    assert "LightSeq attention is not used: " in record.message
    assert "(2 MambaMixer, 1 Identity)" in record.message
    assert len(seen) == 2, "they are wrapped anyway"
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
    wrap(None, None, None, module=torch.nn.Linear(1, 1))
    with pytest.raises(
        UnsupportedError, match=r"not a GPTModel, with 2 MambaMixer, over context-parallel ranks: "
    ):
        wrap(None, None, None, module=hybrid())


# --- layers and models --------------------------------------------------------------------------------------------


def gpt(spec: Any = None) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.megatron.test_core_attention import transformer_config

    return GPTModel(
        transformer_config(), spec or get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=32
    )


def core_attentions(model: Any) -> set[str]:
    return {type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers}


@pytest.mark.usefixtures("one_rank")
def test_models_of_megatrons_own_specification_get_our_attention_until_it_is_removed(patches: Any) -> None:
    patches.patch_model()
    assert core_attentions(gpt()) == {"DotProductAttention"}, "no options have been read yet"
    configured(patches, "--cp-method", "ring")
    model = gpt()
    assert core_attentions(model) == {"LightSeqCoreAttention"}
    assert all(layer.self_attention.core_attention.layout_adopted for layer in model.decoder.layers)
    assert model.decoder.layers[0].self_attention.core_attention.method == "ring"
    patches.undo()
    assert core_attentions(gpt()) == {"DotProductAttention"}


@pytest.mark.usefixtures("one_rank")
def test_models_compute_in_the_slices_that_are_asked_for(
    patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_lightseq.megatron import sequence_slices

    rows: list[int] = []
    in_slices = sequence_slices.in_slices

    def counted(*args: Any) -> torch.Tensor:
        rows.append(args[-1])
        return in_slices(*args)

    monkeypatch.setattr(sequence_slices, "in_slices", counted)
    tokens = torch.arange(32).view(1, 32)
    configured(patches, "--mlp-tile-tokens", "7", "--loss-tile-tokens", "5").patch_model()
    model = gpt().eval()  # without dropout
    losses = model(tokens, tokens, None, labels=tokens)
    assert rows == [7] * len(model.decoder.layers) + [5]
    monkeypatch.setattr(sequence_slices, "in_slices", lambda compute, x, *_: compute(x, slice(len(x))))
    torch.testing.assert_close(model(tokens, tokens, None, labels=tokens), losses)


def test_the_baseline_refuses_slices(patches: Any) -> None:
    with pytest.raises(ConfigError, match=r"\(None, 5\) with --cp-method megatron: .*Leave them out"):
        configured(patches, "--cp-method", "megatron", "--loss-tile-tokens", "5")
    with pytest.raises(ConfigError, match="loss_tile_tokens must be a finite number >= 1"):
        configured(patches, "--loss-tile-tokens", "0")


@pytest.mark.usefixtures("one_rank")
def test_experts_latent_attention_and_transformer_engine_take_it_from_the_same_place(patches: Any) -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    configured(patches).patch_model()
    for options in ({}, {"num_experts": 2}, {"multi_latent_attention": True}):
        attention = get_gpt_layer_local_spec(**options).submodules.self_attention.submodules
        assert attention.core_attention.module.__name__ == "LightSeqCoreAttention", options
    assert TESpecProvider().core_attention().params["settings"] is patches.settings


@pytest.mark.usefixtures("one_rank")
def test_a_specification_that_brings_its_own_attention_is_refused(patches: Any) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    own = get_gpt_layer_local_spec()
    configured(patches).patch_model()
    with pytest.raises(
        UnsupportedError, match=r"a GPTModel with DotProductAttention: all layers must.*--spec"
    ):
        gpt(own)


# --- --spec -------------------------------------------------------------------------------------------------------


def spec_arguments(**changes: Any) -> SimpleNamespace:
    values = {
        "transformer_impl": "local",
        "num_experts": None,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "multi_latent_attention": False,
        "attention_dropout": 0.0,
        "cp_comm_type": ["p2p"],
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def spec_route(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Provides ``megatron.training.get_args``, and undoes the specification's patches afterwards."""
    from megatron_lightseq.megatron import lm
    from megatron_lightseq.megatron.lm import layers_spec
    from megatron_lightseq.megatron.lm.patches import Patches

    package = fake_lm.modules(monkeypatch)
    made_patches: list[Patches] = []

    def remembered() -> Patches:
        made_patches.append(Patches())
        return made_patches[-1]

    monkeypatch.setattr(layers_spec, "Patches", remembered)

    def read(**changes: Any) -> Any:
        package.get_args = lambda: spec_arguments(**changes)
        # as megatron.core.transformer.spec_utils.import_module does
        return vars(__import__("megatron_lightseq.megatron.lm", fromlist=["layers"]))["layers"]

    yield read
    vars(lm).pop("layers", None)
    for made in made_patches:
        made.undo()


def test_spec_gives_a_finished_layer_before_0_19(spec_route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLS_CP_METHOD", "ulysses")
    spec = spec_route()
    model = gpt(spec)
    assert core_attentions(model) == {"LightSeqCoreAttention"}
    attention = model.decoder.layers[0].self_attention
    assert attention.core_attention.method == "ulysses"
    assert attention.core_attention.layout_adopted
    assert type(attention.q_layernorm).__name__ != "IdentityOp", "the other arguments must be Megatron-LM's"


def test_spec_gives_a_function_from_0_19(spec_route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ModuleType("megatron.training.models.gpt")
    models.default_layer_spec = lambda config, vp_stage=None: config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training.models", ModuleType("megatron.training.models"))
    monkeypatch.setitem(sys.modules, models.__name__, models)
    assert spec_route() is models.default_layer_spec


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"num_experts": 2, "virtual_pipeline_model_parallel_size": 2}, "--num-experts with an interleaved"),
    ],
)
def test_spec_refuses_what_one_specification_cannot_say(
    spec_route: Any, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"{named}.* with --spec.*before 0\.19.*the launcher"):
        spec_route(**changes)


def test_the_package_has_no_other_names() -> None:
    from megatron_lightseq.megatron import lm

    with pytest.raises(AttributeError, match="has no attribute 'layer'"):
        lm.layer  # noqa: B018
