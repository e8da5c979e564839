"""Schedules as data: build, print, parse, validate, simulate and compile them. Standard library only."""

from __future__ import annotations

from megatron_lightseq.schedule.build import build, solve
from megatron_lightseq.schedule.choose import Choice, Chooser, rank_methods, reason
from megatron_lightseq.schedule.ir import Direction, Move, Payload, Placement, Step, Tile
from megatron_lightseq.schedule.method import Method, SizedForm
from megatron_lightseq.schedule.methods import (
    METHODS,
    default_layouts,
    mesh,
    method_forms,
    method_names,
    register,
    resolve_method,
    usp,
)
from megatron_lightseq.schedule.network import NETWORKS, Device, Network
from megatron_lightseq.schedule.pair import SchedulePair
from megatron_lightseq.schedule.problem import Problem
from megatron_lightseq.schedule.program import Program, compile_program
from megatron_lightseq.schedule.scan import Scan
from megatron_lightseq.schedule.scan_choose import StateShape, rank_scans, simulate_scan
from megatron_lightseq.schedule.scan_place import SCANS, build_scan
from megatron_lightseq.schedule.schedule import Schedule
from megatron_lightseq.schedule.shape import TensorShape
from megatron_lightseq.schedule.simulate import Costs, Simulation, simulate

__all__ = [
    "METHODS",
    "NETWORKS",
    "SCANS",
    "Choice",
    "Chooser",
    "Costs",
    "Device",
    "Direction",
    "Method",
    "Move",
    "Network",
    "Payload",
    "Placement",
    "Problem",
    "Program",
    "Scan",
    "Schedule",
    "SchedulePair",
    "Simulation",
    "SizedForm",
    "StateShape",
    "Step",
    "TensorShape",
    "Tile",
    "build",
    "build_scan",
    "compile_program",
    "default_layouts",
    "mesh",
    "method_forms",
    "method_names",
    "rank_methods",
    "rank_scans",
    "reason",
    "register",
    "resolve_method",
    "simulate",
    "simulate_scan",
    "solve",
    "usp",
]
