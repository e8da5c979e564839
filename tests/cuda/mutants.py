"""Bugs that are put into the kernels on purpose; the emulated tests must notice every one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """One edit of one file of csrc/cuda."""

    name: str
    file: str
    old: str
    new: str
    architecture: str = "sm80"
    slow: bool = False
    """Shows as bank conflicts, not as wrong numbers."""


FORWARD, BACKWARD, DQ = "forward_sm80.h", "backward_sm80.h", "backward_dq_sm80.h"

SM80_MUTANTS = (
    Mutant(
        name="forward: stage refilled while in use",
        file=FORWARD,
        old="sync_threads();  // all warps are done",
        new="// all warps are done",
    ),
    Mutant(
        name="forward: tile used before all threads' copies arrived",
        file=FORWARD,
        old="copy_async_wait<1>();\n    sync_threads();",
        new="copy_async_wait<1>();",
    ),
    Mutant(
        name="forward: waits for one group too few",
        file=FORWARD,
        old="copy_async_wait<1>",
        new="copy_async_wait<2>",
    ),
    Mutant(
        name="forward: every tile goes to stage 0",
        file=FORWARD,
        old="const int stage = (tile - first_tile) % T::kStages;\n    if (tile < end_tile)",
        new="const int stage = 0;\n    if (tile < end_tile)",
    ),
    Mutant(
        name="forward: edge tiles not masked",
        file=FORWARD,
        old="if (!bounds.covers(",
        new="if (false && bounds.covers(",
    ),
    Mutant(
        name="fragments: values read untransposed",
        file="tile.h",
        old="ldmatrix_x4_transposed(b,",
        new="ldmatrix_x4(b,",
    ),
    Mutant(
        name="tiles: rows not padded",
        file="tile.h",
        old="16 * (kChunks | 1)",
        new="16 * kChunks",
        slow=True,
    ),
    Mutant(
        name="softmax: row maximum over two lanes only",
        file="softmax.h",
        old="x = fmaxf(x, shuffle_xor(x, 1));\n  return fmaxf(x, shuffle_xor(x, 2));",
        new="return fmaxf(x, shuffle_xor(x, 1));",
    ),
    Mutant(
        name="softmax: shuffle by half the warp",
        file="softmax.h",
        old="return x + shuffle_xor(x, 2);",
        new="if (lane_id() < 16) x += shuffle_xor(x, 2);\n  return x;",
    ),
    Mutant(
        name="softmax: earlier sums not rescaled",
        file="softmax.h",
        old="rows.sum[r] * rescale[r] + sum",
        new="rows.sum[r] + sum",
    ),
    Mutant(
        name="merge: lse written before all lanes read it",
        file="softmax.h",
        old="sync_warp();  // four lanes",
        new="// four lanes",
    ),
    Mutant(
        name="merge: the earlier part counts fully",
        file="softmax.h",
        old="old_part / both, top",
        new="1.0f, top",
    ),
    Mutant(
        name="mask: one key too few on the diagonal",
        file="key_interval.h",
        old="smaller(query + band_hi + 1, num_keys)",
        new="smaller(query + band_hi, num_keys)",
    ),
    Mutant(
        name="mask: last key tile of a query tile skipped",
        file="key_interval.h",
        old="smaller(last_row + visibility.band_hi + 1, visibility.num_keys)",
        new="smaller(first_row + visibility.band_hi + 1, visibility.num_keys)",
    ),
    Mutant(
        name="mask: first queries of a key tile skipped",
        file="key_interval.h",
        old="larger(first_key - visibility.band_hi, 0)",
        new="larger(end_key - visibility.band_hi, 0)",
    ),
    Mutant(
        name="backward: dS read before it is complete",
        file=BACKWARD,
        old="sync_threads();  // dS is complete",
        new="// dS is not complete",
    ),
    Mutant(
        name="backward: last head of a group left out",
        file=BACKWARD,
        old="kv_head * group + group)",
        new="kv_head * group + larger(group - 1, 1))",
    ),
    Mutant(
        name="backward: rows beyond the tensor count",
        file=BACKWARD,
        old="return {infinity(), 0.0f, {0, 0}}",
        new="return {-infinity(), 0.0f, {0, 0}}",
    ),
    Mutant(name="backward: delta forgotten", file=BACKWARD, old=".delta);", new=".delta * 0.0f);"),
    Mutant(
        name="backward: shared memory one stage short",
        file=BACKWARD,
        old="kStages * kStageBytes;",
        new="1 * kStageBytes;",
    ),
    Mutant(
        name="dq: last key tile left out",
        file=DQ,
        old="tile < end_tile; ++tile",
        new="tile < larger(end_tile - 1, first_tile + 1); ++tile",
    ),
)

HOPPER = "forward_sm90.h"


def _hopper(name: str, old: str, new: str, file: str = HOPPER) -> Mutant:
    return Mutant(name=f"hopper forward: {name}", file=file, old=old, new=new, architecture="sm90")


HOPPER_MUTANTS = (
    _hopper(
        "scores used before they are done",
        "wgmma_wait<1>();  // the scores",
        "wgmma_wait<2>();  // the scores",
    ),
    _hopper(
        "values used before they landed",
        "barrier_wait(shared.values_full(before.stage), before.parity);\n    issue_output",
        "issue_output",
    ),
    _hopper(
        "keys used before they landed",
        "barrier_wait(shared.keys_full(at.stage), at.parity);",
        "",
    ),
    _hopper("keys overwritten while used", "barrier_wait(shared.keys_empty(at.stage), at.parity ^ 1);", ""),
    _hopper(
        "values overwritten while used", "barrier_wait(shared.values_empty(at.stage), at.parity ^ 1);", ""
    ),
    _hopper(
        "wrong parity",
        "barrier_wait(shared.values_empty(at.stage), at.parity ^ 1)",
        "barrier_wait(shared.values_empty(at.stage), at.parity)",
    ),
    _hopper("scores without wgmma.fence", "hold(state.scores);\n  wgmma_fence();", "hold(state.scores);"),
    _hopper(
        "values released before the product has read them",
        "wgmma_wait<0>();\n    hold(state.out);\n    hold(state.probabilities);\n    release_stage(empty);",
        "release_stage(empty);\n    wgmma_wait<0>();\n    hold(state.out);\n    hold(state.probabilities);",
    ),
    _hopper(
        "probabilities overwritten while in use",
        "consumer.finish_output(state, shared.values_empty(before.stage));\n    scale_row",
        "consumer.pack_probabilities(state);\n"
        "    consumer.finish_output(state, shared.values_empty(before.stage));\n    scale_row",
    ),
    _hopper(
        "output rescaled while being added to",
        "consumer.finish_output(state, shared.values_empty(before.stage));\n    scale_row(state.out, 0, rescale[0]);",
        "scale_row(state.out, 0, rescale[0]);\n    consumer.finish_output(state, shared.values_empty(before.stage));",
    ),
    _hopper(
        "fewer bytes expected than copied",
        "barrier_expect(keys, T::KeyTile::kBytes)",
        "barrier_expect(keys, T::KeyTile::kBytes / 2)",
    ),
    _hopper(
        "more bytes expected than copied",
        "barrier_expect(values, T::ValueTile::kBytes)",
        "barrier_expect(values, T::ValueTile::kBytes * 2)",
    ),
    _hopper("values not transposed", "from_registers<true>", "from_registers<false>"),
    _hopper(
        "one arrival frees a stage",
        "barrier_init(keys_empty(stage), T::kConsumerWarps)",
        "barrier_init(keys_empty(stage), 1)",
    ),
    _hopper(
        "barriers used before their initialisation", "shared.init();\n  sync_threads();", "shared.init();"
    ),
    _hopper("second step of k reads the first", "k % kSwizzleColumns * 2", "0", file="panels.h"),
    _hopper("other panels not copied", "panel < Tile::kPanels", "panel < 1", file="panels.h"),
    _hopper(
        "panels that columns end in left out",
        "(kColumns + kSwizzleColumns - 1) / kSwizzleColumns",
        "kColumns / kSwizzleColumns",
        file="panels.h",
    ),
    _hopper("columns beyond the panel's half multiplied", "k < T::kHeadDim", "k < 144"),
)
