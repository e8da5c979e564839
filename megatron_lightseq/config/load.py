"""From YAML files and command-line flags to one validated :class:`PretrainConfig`.

jsonargparse converts and checks every value and writes the help. Added here: the strict YAML reader, Megatron-LM's
spellings, the nearest names for unknown keys, and one report of everything that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from megatron_lightseq.config.flags import ACTIONS, COMMAND_LINE, read_flags
from megatron_lightseq.config.flat import from_flat, keys, section_of_key, section_types, to_flat
from megatron_lightseq.config.names import MEGATRON_SPELLINGS, nearest
from megatron_lightseq.config.rules import Machine, report
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.strict_yaml import Entry, dump_scalar, parse_mapping, read_yaml
from megatron_lightseq.config.typed import coerce, is_switch
from megatron_lightseq.config.validate import validate
from megatron_lightseq.errors import ConfigError, explain


def load_config(arguments: Sequence[str], *, machine: Machine | None = None) -> PretrainConfig:
    """The validated configuration of a command line `[FILE.yaml ...] [--key value ...]`.

    Later files override earlier ones, flags override files. Raises ConfigError with everything that is wrong:
    unknown names and wrong types in one report, or, when there are none, every violated rule.
    """
    config = parse_config(arguments)
    validate(config, machine)
    return config


def parse_config(arguments: Sequence[str]) -> PretrainConfig:
    """As :func:`load_config`, without the rules between keys."""
    invocation = read_flags(arguments)
    problems = list(invocation.problems)
    layers: list[Mapping[str, Entry]] = []
    for path in invocation.files:
        try:
            layers.append(read_yaml(path))
        except ConfigError as error:
            problems.append(str(error))
    return from_entries([*layers, invocation.entries], problems)


def from_entries(layers: Iterable[Mapping[str, Entry]], problems: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of several layers of raw entries; later layers override earlier ones."""
    found = list(problems)
    merged: dict[str, Entry] = {}
    needed: dict[str, Entry] = {}
    for layer in layers:
        for name, entry in layer.items():
            if name in section_of_key():
                merged[name] = entry
            elif name in MEGATRON_SPELLINGS:
                found.extend(_megatron_spelling(name, entry, merged, needed))
            else:
                found.append(_unknown(name, entry))
    found.extend(_missing(key, entry) for key, entry in needed.items() if key not in merged)
    values, wrong = coerce(merged)
    found.extend(wrong)
    if found:
        raise report(found)
    return from_flat(values)


def from_yaml(text: str) -> PretrainConfig:
    """Read what :func:`to_yaml` wrote, without checking the rules between keys."""
    return from_entries([parse_mapping(text, "saved configuration")])


def to_yaml(config: PretrainConfig) -> str:
    """The whole configuration as YAML, by section; reading it back gives an equal configuration."""
    values = to_flat(config)
    lines: list[str] = []
    for section in section_types():
        lines.append(f"# {section}")
        for key in (key for key, owner in section_of_key().items() if owner == section):
            value = list(values[key]) if isinstance(values[key], tuple) else values[key]
            lines.append(f"{key}: {dump_scalar(value)}")
    return "\n".join(lines) + "\n"


def _megatron_spelling(
    name: str, entry: Entry, merged: dict[str, Entry], needed: dict[str, Entry]
) -> list[str]:
    """Enter the keys that a Megatron-LM argument stands for; returns the problems."""
    spelling = MEGATRON_SPELLINGS[name]
    if spelling.refusal is not None:
        got = f"{name} ({entry.origin}), an argument of Megatron-LM"
        return [explain(got=got, rule="it is not a key of this package", remedy=spelling.refusal)]
    if entry.value is False:
        return []
    if entry.value is not True:
        got = f"{name} {entry.value!r} ({entry.origin})"
        return [explain(got=got, rule=f"{name} is true or false", remedy=f"Write {name}: true")]
    merged.update({key: Entry(value, entry.origin) for key, value in spelling.values})
    if spelling.needs is not None:
        needed[spelling.needs] = Entry(name, entry.origin)
    return []


def _missing(key: str, entry: Entry) -> str:
    return explain(
        got=f"{entry.value} ({entry.origin}) without {key}",
        rule=f"{entry.value} needs {key}",
        remedy=f"Set {key}",
    )


def _unknown(name: str, entry: Entry) -> str:
    on_command_line = entry.origin.startswith(COMMAND_LINE)
    candidates = [*keys(), *(ACTIONS if on_command_line else ())]
    if on_command_line and name.startswith("n"):
        candidates += [f"no_{key}" for key in keys() if is_switch(key)]
    near = nearest(name, candidates)
    if name in section_types():
        remedy = f"Keys are flat: remove the line {name!r}, and the indentation below it"
    elif near is None:
        remedy = "Run lightseq pretrain --help for the list of keys"
    else:
        remedy = f"Perhaps {'--' + near.replace('_', '-') if on_command_line else near} was meant"
    return explain(got=f"{name!r} ({entry.origin})", rule="there is no such key", remedy=remedy)
