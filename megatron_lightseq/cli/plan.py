"""`lightseq plan RECIPE --cluster h100:8x16`: will it fit, how fast will it be, and which way is best?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.schedule import Network

if TYPE_CHECKING:
    from megatron_lightseq.tools.planner.cluster import Cluster
    from megatron_lightseq.tools.planner.request import Request

EXAMPLES = """\
examples:
  lightseq plan configs/gqa8b_2x8gpu_128k.yaml --cluster h100:8x2 --set vocab_size=128256
  lightseq plan configs/models/llama_3_1_8b.yaml --gpus 16 --gpu h200 --set seq_length=524288 --search
"""


def run(arguments: Sequence[str]) -> int:
    """Print the plan; 0 if the run fits into memory, 1 if a shorter sequence would, 2 if none does."""
    options = _parser().parse_args(arguments)
    # Ranks of the cluster are planned on this machine's CPU, without their tensors.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about packages that do not matter here
        return _plan(options)


def _cluster(options: argparse.Namespace) -> Cluster:
    """The cluster that the options describe."""
    from megatron_lightseq.tools.planner.cluster import Cluster, gpu_named, with_memory

    if options.cluster is not None:
        named = Cluster.parse(options.cluster)
    elif options.gpus is not None:
        named = Cluster.of(gpu_named(options.gpu), options.gpus, gpus_per_node=options.gpus_per_node)
    else:
        raise ConfigError(
            explain(
                got="no cluster",
                rule="a plan is for a number of GPUs of one kind",
                remedy="Give --cluster, for example --cluster h100:8x2, or --gpus with --gpu",
            )
        )
    return Cluster.of(
        named.gpu if options.memory is None else with_memory(named.gpu, options.memory),
        named.num_gpus,
        gpus_per_node=named.gpus_per_node,
        network=None if options.network is None else Network.parse(options.network),
    )


def _plan(options: argparse.Namespace) -> int:
    from megatron_lightseq.tools.planner.cost import predict_time
    from megatron_lightseq.tools.planner.footprint import footprint, longest_sequence
    from megatron_lightseq.tools.planner.report import (
        Longest,
        as_json,
        layout,
        memory_table,
        time_table,
        verdict,
    )
    from megatron_lightseq.tools.planner.request import Request, read_config, vocabulary

    config = read_config(options.recipe, options.set)
    request = Request(config=config, cluster=_cluster(options), vocab_size=vocabulary(config))
    lines: list[str] = []
    if options.search:
        request, lines = _search(request, options)
    found, time = footprint(request), predict_time(request)
    longest = Longest(longest_sequence(request, found)) if options.longest else None
    title = f"{request.cluster}: {layout(request)}"
    if options.png is not None:
        from megatron_lightseq.tools.planner.draw import draw_plan

        draw_plan(found, time, request.micro_batches, title, options.png)
    text = json.dumps(as_json(request, found, longest, time), indent=1) + "\n"
    if options.json is not None and str(options.json) != "-":
        options.json.write_text(text)
    if str(options.json) != "-":
        lines += [title, "", *memory_table(found), "", verdict(found, longest), "", *time_table(time)]
        text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if longest is not None and longest.tokens is None:
        return 2
    return 0 if found.fits else 1


def _search(request: Request, options: argparse.Namespace) -> tuple[Request, list[str]]:
    """The best layout, and the lines about it and those behind it."""
    from megatron_lightseq.tools.planner.report import ranking_table
    from megatron_lightseq.tools.planner.search import search
    from megatron_lightseq.tools.planner.write import recipe_of

    ranking = search(request)
    best = ranking.found[0]
    lines = [*ranking_table(ranking), ""]
    if options.write is not None:
        options.write.write_text(recipe_of(best))
        lines += [f"The first is written to {options.write}.", ""]
    return best.request, lines


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq plan",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Plan a run on a cluster that is not here: every rule that the recipe breaks there, the memory of\n"
        "the fullest rank of every pipeline stage, the longest sequence that fits, and the time of one step.",
        epilog=EXAMPLES,
    )
    made.add_argument(
        "recipe", nargs="+", help="YAML files, as for lightseq pretrain; later ones override earlier ones"
    )
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the recipe",
    )
    made.add_argument("--cluster", metavar="GPU:PER_NODExNODES", help="for example h100:8x16")
    made.add_argument("--gpus", type=int, metavar="N", help="number of GPUs, instead of --cluster")
    made.add_argument("--gpu", default="h100", metavar="NAME", help="with --gpus: their kind (default: h100)")
    made.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="with --gpus: GPUs per node (default: 8)"
    )
    made.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU (default: by its kind)")
    made.add_argument(
        "--network",
        help="name or numbers, as for lightseq schedule (default: NVLink and network cards as in the vendor's nodes)",
    )
    made.add_argument(
        "--no-longest",
        dest="longest",
        action="store_false",
        help="do not look for the longest sequence that fits",
    )
    made.add_argument(
        "--search",
        action="store_true",
        help="rank parallel sizes, methods, recomputation and slices; plan the best",
    )
    made.add_argument("--write", type=Path, metavar="FILE", help="with --search: write the best as a recipe")
    made.add_argument("--png", type=Path, metavar="FILE", help="draw the memory and the timeline of one step")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the plan as JSON; - for standard output"
    )
    return made
