"""From files and flags to a configuration: what is accepted, what is refused, and the messages."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lightseq.config import (
    PretrainConfig,
    from_flat,
    from_yaml,
    keys,
    load_config,
    parse_config,
    to_flat,
    to_yaml,
)
from megatron_lightseq.config.names import MEGATRON_SPELLINGS, nearest
from megatron_lightseq.config.rules import Machine
from megatron_lightseq.config.sections import ModelConfig
from megatron_lightseq.config.strict_yaml import MAX_BYTES, dump_scalar, parse_scalar
from megatron_lightseq.config.typed import (
    choices,
    field_docstrings,
    is_list,
    is_pattern,
    key_types,
    parser,
    takes_null,
)
from megatron_lightseq.errors import ConfigError


def changed(config: PretrainConfig) -> dict[str, Any]:
    """The keys whose values are not the defaults."""
    default = to_flat(PretrainConfig())
    return {key: value for key, value in to_flat(config).items() if value != default[key]}


def read(tmp_path: Path, text: str) -> PretrainConfig:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8"))
    return parse_config([str(path)])


# --- scalars in files -----------------------------------------------------------------------------------------------

ACCEPTED: dict[str, dict[str, Any]] = {
    "lr: 1e-4": {"lr": 1e-4},
    "lr: 1e+0": {"lr": 1.0},
    "lr: '1e-4'": {"lr": 1e-4},
    "lr: 1": {"lr": 1.0},
    "lr: .5": {"lr": 0.5},
    "rotary_base: 500000.0": {"rotary_base": 500000.0},
    "rotary_base: 500000": {"rotary_base": 500000.0},
    "rotary_base: 1e6": {"rotary_base": 1e6},
    "rotary_base: 10000": {},
    "num_layers: '3'": {"num_layers": 3},
    "num-layers: 3": {"num_layers": 3},
    "bf16: True": {"bf16": True},
    "bf16: 'true'": {"bf16": True},
    "progress: off": {"progress": "off"},
    "save: on": {"save": "on"},
    "save: 1:30": {"save": "1:30"},
    "save: 2026-01-01": {"save": "2026-01-01"},
    "save: '3'": {"save": "3"},
    "save: 'null'": {"save": "null"},
    "kv_channels: null\nsave:\nload: ~": {},
    "data_path: corpus": {"data_path": ("corpus",)},
    "data_path: [0.3, a, 1, b]": {"data_path": ("0.3", "a", "1", "b")},
    "recompute_modules: [mlp]": {"recompute_modules": ("mlp",)},
    "disable_bias_linear: true\nnum_layers: 2": {"num_layers": 2},
    "tokenizer_type: null": {"tokenizer_type": "null"},
    "": {},
    "# nothing\n": {},
}

REFUSED: dict[str, str] = {
    "num_layers: true": "num_layers True (RECIPE line 1): num_layers must be an integer",
    "num_layers: 1e4": "num_layers must be an integer",
    "num_layers: 2.0": "num_layers must be an integer",
    "num_layers: 010": "num_layers '010'",
    "num_layers: 0x10": "num_layers '0x10'",
    "num_layers: 1_000": "num_layers '1_000'",
    "num_layers: 1:30": "num_layers '1:30'",
    "num_layers: null": "num_layers must be an integer. Write, for example, num_layers: 4",
    "num_layers: [4]": "num_layers must be an integer",
    "num_layers:\n  a: 1": "num_layers must be an integer",
    "num_layers: 999999999999999999999999999999999999999x": "num_layers must be an integer",
    "kv_channels: false": "kv_channels must be an integer or null",
    "lr: true": "lr must be a number",
    "rotary_base: large": "rotary_base must be a number. Write, for example, rotary_base: 10000.0",
    "lr: fast": "lr must be a number. Write, for example, lr: 0.003",
    "lr: [1.0]": "lr must be a number",
    "bf16: yes": "bf16 must be true or false",
    "bf16: 1": "bf16 must be true or false",
    "bf16: null": "bf16 must be true or false",
    "split: 1": "split must be text",
    "save: true": "save must be text or null",
    "save: 3": "save must be text or null",
    "cp_method: lightsec": "cp_method must be one of lightseq, ring, zigzag, all_gather, mesh, balanced, ulysses, usp, "
    "rsa, auto, megatron. Perhaps lightseq was meant",
    "cp_layout: false": "cp_layout must be one of",
    "data_path: [true]": "data_path must be a list of text",
    "data_path: {a: b}": "data_path must be a list of text",
    "recompute_modules: [attention]": "recompute_modules must be a list of core_attn | layernorm | mlp",
    "num_layers: 2\nnum_layers: 3": "num_layers is given at RECIPE line 1 and again at RECIPE line 2",
    "num_layers: 2\nnum-layers: 3": "Remove one of the two lines",
    "\tnum_layers: 2": "RECIPE line 1, column 1: found character '\\t' that cannot start any token",
    "model:\n  num_layers: 2": "Keys are flat: remove the line 'model', and the indentation below it",
    "num_layer: 2": "'num_layer' (RECIPE line 1): there is no such key. Perhaps num_layers was meant",
    "xyzzyxyzzy: 2": "Run lightseq pretrain --help",
    "3: 2": "has the key 3: a key must be a name",
    "? [a]\n: 2": "a key must be a name",
    "- num_layers": "the top level is not a mapping",
    "just words": "the top level is not a mapping",
    "num_layers: 2\n---\nnum_layers: 3": "another document",
    "a: &x 1\nb: *x": "alias *x is refused",
    "a: [[[[[1]]]]]": "nesting is deeper than 4",
    "save: !!python/object/apply:os.system [id]": "could not determine a constructor for the tag",
    "save: !!python/name:os.system": "could not determine a constructor for the tag",
    "num_layers: 'a": "RECIPE line",
    "num_layers: \x00": "special characters are not allowed",
    "num_layers: " + "9" * 5000: "Exceeds the limit",
    "!!binary: 1": "RECIPE line 1",
}


@pytest.mark.parametrize("text", ACCEPTED)
def test_file_is_read(text: str, tmp_path: Path) -> None:
    assert changed(read(tmp_path, text)) == ACCEPTED[text]


@pytest.mark.parametrize("text", REFUSED)
def test_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert REFUSED[text].replace("RECIPE", str(tmp_path / "recipe.yaml")) in str(caught.value)


def test_nan_is_read_and_then_refused_by_its_rule(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: .nan\ndata_path: x\n")
    with pytest.raises(ConfigError, match=r"lr nan: lr must be a finite number > 0"):
        load_config([str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"save: " + b"x" * MAX_BYTES, f"bytes: a configuration file has at most {MAX_BYTES}"),
        (b"save: \xff", "can't decode byte"),
    ],
)
def test_unfit_file_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        parse_config([str(tmp_path / "recipe.yaml")])


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read \(No such file or directory\)"):
        parse_config(["none.yaml"])


def test_bombs_are_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    """Aliases that would expand to 10^9 nodes, and 90,000 open brackets, in an address space of 400 MB."""
    laughs = "a0: &a0 [x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    (tmp_path / "laughs.yaml").write_text(laughs)
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 90_000)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "from megatron_lightseq.config import parse_config\n"
        "for name in sys.argv[1:]:\n"
        "    try: parse_config([name])\n"
        "    except ValueError as error: print(error)\n"
    )
    names = [str(tmp_path / "laughs.yaml"), str(tmp_path / "deep.yaml")]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "alias *a0 is refused" in done.stdout
    assert "nesting is deeper than 4" in done.stdout


# --- flags ----------------------------------------------------------------------------------------------------------

FLAGS: dict[str, dict[str, Any]] = {
    "--num-layers 2": {"num_layers": 2},
    "--num_layers 2": {"num_layers": 2},
    "--num-layers=2": {"num_layers": 2},
    "--num-layers 2 --num_layers 3": {"num_layers": 3},
    "--bf16": {"bf16": True},
    "--bf16 true": {"bf16": True},
    "--bf16 --no-bf16": {},
    "--bf16 false": {},
    "--no-swiglu": {"swiglu": False},
    "--no-cp-overlap --lr 1": {"cp_overlap": False, "lr": 1.0},
    "--no-keep-attention-on-recompute": {"keep_attention_on_recompute": False},
    "--no-load-optim": {"no_load_optim": True},
    "--no-load-optim --no-no-load-optim": {},
    "--adam-eps 1e-6": {"adam_eps": 1e-6},
    "--rotary-base 500000.0 --rotary-percent 0.5": {"rotary_base": 500000.0, "rotary_percent": 0.5},
    "--data-path 0.3 a 0.7 b --bf16": {"data_path": ("0.3", "a", "0.7", "b"), "bf16": True},
    "--data-path=a": {"data_path": ("a",)},
    "--recompute-modules core_attn mlp": {"recompute_modules": ("core_attn", "mlp")},
    "--save null": {},
    "--save 3": {"save": "3"},
    "--save=": {"save": ""},
    "--split 1,1,1": {"split": "1,1,1"},
    "--recompute-granularity null": {},
    "--kv-channels null": {},
    "--tokenizer-type null": {"tokenizer_type": "null"},
    "--disable-bias-linear": {},
    "--window-size 127 0": {"window_size": (127, 0)},
    "--window-size 127,0": {"window_size": (127, 0)},
    "--window-size (127,0) --softmax-type off-by-one": {
        "window_size": (127, 0),
        "softmax_type": "off-by-one",
    },
    "--recompute-activations": {"recompute_granularity": "selective"},
    "--group-query-attention --num-query-groups 2": {"num_query_groups": 2},
    "--use-mcore-models --attention-softmax-in-fp32": {},
}

REFUSED_FLAGS: dict[str, str] = {
    "--num-layer 2": "'num_layer' (command line, --num-layer): there is no such key. Perhaps --num-layers was meant",
    "--no-bf61": "Perhaps --no-bf16 was meant",
    "--print-confg": "Perhaps --print-config was meant",
    "--num-layers": "num_layers '(no value)'",
    "--num-layers --bf16": "num_layers '(no value)'",
    "--num-layers two": "num_layers must be an integer",
    "--num-layers true": "num_layers must be an integer",
    "--window-size wide": "window_size must be a list of integers. Write, for example, window_size: [1, 0]",
    "--window-size 1.5 0": "window_size",
    "--softmax-type sinks": "softmax_type 'sinks'",
    "--bf16 1": "bf16 '1' (command line, --bf16): bf16 must be true or false",
    "--no-bf16=true": "--no-bf16=true on the command line: a negated switch takes no value. Write --no-bf16",
    "-n 2": "'-n' on the command line: a flag is two dashes and a name",
    "--lr nan": "lr must be a number",
    "--group-query-attention": "group_query_attention (command line, --group-query-attention) without "
    "num_query_groups: group_query_attention needs num_query_groups. Set num_query_groups",
    "--disable-bias-linear=no": "disable_bias_linear is true or false",
}


@pytest.mark.parametrize("line", FLAGS)
def test_flags_are_read(line: str) -> None:
    assert changed(parse_config(line.split())) == FLAGS[line]


@pytest.mark.parametrize("line", REFUSED_FLAGS)
def test_flags_are_refused(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(line.split())
    assert REFUSED_FLAGS[line] in str(caught.value)


def test_later_files_override_earlier_ones_and_flags_override_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("num_layers: 2\nhidden_size: 64\nlr: 0.5\n")
    second.write_text("num_layers: 3\nhidden_size: 128\n")
    found = changed(parse_config([str(first), "--config", str(second), "--num-layers", "8"]))
    assert found == {"num_layers": 8, "hidden_size": 128, "lr": 0.5}


def test_everything_wrong_comes_in_one_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("num_layer: 2\nlr: fast\n")
    with pytest.raises(ConfigError) as caught:
        parse_config([str(tmp_path / "recipe.yaml"), "none.yaml", "--fp16", "--cp-method", "x", "-z"])
    message = str(caught.value)
    assert message.startswith("6 problems in the configuration:")
    for part in ("-z", "none.yaml", "num_layer", "fp16", "lr", "cp_method"):
        assert part in message


@pytest.mark.parametrize("name", [name for name, found in MEGATRON_SPELLINGS.items() if found.refusal])
def test_megatron_argument_is_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    for text in ([f"--{name.replace('_', '-')}"], [f"--{name}", "value", "value"]):
        with pytest.raises(ConfigError) as caught:
            parse_config(text)
        assert f"{name} (command line" in str(caught.value)
        assert str(MEGATRON_SPELLINGS[name].refusal) in str(caught.value)
    with pytest.raises(ConfigError, match="an argument of Megatron-LM: it is not a key of this package"):
        read(tmp_path, f"{name}: 1")


def test_megatron_spellings_are_no_keys_and_mean_keys() -> None:
    assert not set(MEGATRON_SPELLINGS) & set(keys())
    for name, spelling in MEGATRON_SPELLINGS.items():
        meant = [key for key, _ in spelling.values] + ([spelling.needs] if spelling.needs else [])
        assert set(meant) <= set(keys()), name
        assert (spelling.refusal is None) or not meant


# --- names ----------------------------------------------------------------------------------------------------------


def misspellings(key: str) -> set[str]:
    """Every deletion, transposition and a sample of insertions and substitutions of one character."""
    letters = string.ascii_lowercase[:: max(1, len(key) // 4)]
    deleted = {key[:i] + key[i + 1 :] for i in range(len(key))}
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    inserted = {key[:i] + letter + key[i:] for i in range(len(key) + 1) for letter in letters}
    return (deleted | swapped | inserted) - set(keys()) - {key, ""}


def test_single_edit_misspellings_get_the_right_suggestion() -> None:
    cases = [(wrong, key) for key in keys() for wrong in sorted(misspellings(key))[::4]]
    right = sum(nearest(wrong, keys()) == key for wrong, key in cases)
    assert len(cases) > 2000
    assert right / len(cases) >= 0.95, f"{right} of {len(cases)}"


def test_misspellings_are_refused_everywhere(tmp_path: Path) -> None:
    known = set(keys()) | set(MEGATRON_SPELLINGS) | {"config", "help", "print_config"}
    for key in keys():
        wrong = next(wrong for wrong in sorted(misspellings(key)) if wrong not in known)
        with pytest.raises(ConfigError, match="there is no such key"):
            parse_config([f"--{wrong}", "1"])
        with pytest.raises(ConfigError, match="there is no such key"):
            read(tmp_path, f"{wrong}: 1")


# --- round trip -----------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


def _values(key: str) -> st.SearchStrategy[Any]:
    annotation = key_types()[key]
    if is_list(key):
        known = {"recompute_modules": ["core_attn", "layernorm", "mlp"], "cp_comm_type": ["p2p", "a2a+p2p"]}
        known["lora_target_modules"] = ["linear_qkv", "linear_fc2"]
        item = st.sampled_from(known[key]) if key in known else _TEXT
        if key == "window_size":
            item = st.integers()
        if key.startswith("longrope"):
            item = st.floats(allow_nan=False)
        return st.lists(item, max_size=4).map(tuple)
    if is_pattern(key):
        pattern = st.integers() | st.lists(st.integers(0, 1), max_size=4).map(tuple)
        return st.none() | pattern if takes_null(key) else pattern
    if choices(key):
        options: list[Any] = [*choices(key), *([None] if takes_null(key) else [])]
        return st.sampled_from(options)
    kind = {int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), str: _TEXT}
    base = next(strategy for cls, strategy in kind.items() if annotation in (cls, cls | None))
    return st.none() | base if takes_null(key) else base


CONFIGS = (
    st.lists(st.sampled_from(keys()), max_size=10, unique=True)
    .flatmap(lambda chosen: st.fixed_dictionaries({key: _values(key) for key in chosen}))
    .map(from_flat)
)


@settings(max_examples=500, deadline=None)
@given(config=CONFIGS)
def test_printing_and_parsing_gives_the_same_configuration(config: PretrainConfig) -> None:
    assert from_yaml(to_yaml(config)) == config


@settings(max_examples=300, deadline=None)
@given(value=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT | st.lists(_TEXT))
def test_scalar_round_trip(value: Any) -> None:
    found = parse_scalar(dump_scalar(value))
    assert (type(found), found) == (type(value), value)


def test_print_config_of_the_command_parses_back(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_lightseq.cli import run

    flags = [
        "--num-layers",
        "7",
        "--save",
        "1e4",
        "--progress",
        "off",
        "--data-path",
        "0.5",
        "a b",
        "0.5",
        "null",
    ]
    assert run(["pretrain", *flags, "--print-config"]) == 0
    assert from_yaml(capsys.readouterr().out) == parse_config(flags)


# --- help -----------------------------------------------------------------------------------------------------------


def test_every_key_has_a_docstring_and_the_help_shows_it() -> None:
    text = " ".join(parser().format_help().split())
    for key in keys():
        assert f"--{key.replace('_', '-')}" in text
    for key, docstring in field_docstrings(ModelConfig).items():
        assert docstring.endswith("."), key
        assert docstring[:30] in text


def test_the_list_of_keys_is_frozen() -> None:
    """Users' files and scripts depend on it. Keys may be added; removing one must be announced."""
    expected = Path(__file__).with_name("keys.txt").read_text(encoding="utf-8").split()
    assert list(keys()) == expected


def test_importing_the_configuration_is_cheap() -> None:
    script = (
        "import sys, megatron_lightseq.config\n"
        "heavy = {'torch', 'numpy', 'megatron', 'jsonargparse', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("train_iters", 10**18, ">= 1 and <= 1,000,000,000"),
        ("eval_iters", 10**12, ">= 1 and <= 1,000,000,000"),
        ("global_batch_size", 10**12, ">= 1 and < 2,147,483,648"),
        ("seq_length", 10**18, ">= 1 and < 2,147,483,648"),
        ("num_workers", 5000, ">= 0 and <= 256"),
    ],
)
def test_what_would_take_hours_or_all_memory_is_refused_at_once(key: str, value: int, bound: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key} {value}: {key} must be {bound}\. Set {key} to a value in bounds"
    ):
        load_config([f"--{key.replace('_', '-')}", str(value)], machine=Machine(world_size=1))
