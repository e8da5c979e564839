"""Bugs seeded into the kernels. The emulated tests must detect every one."""

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
    """Detected by its bank conflicts: results stay correct."""


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
        file="gradients.h",
        old="return infinity();",
        new="return -infinity();",
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
        "wgmma_wait<1>();  // for the scores",
        "wgmma_wait<2>();  // for the scores",
    ),
    _hopper(
        "values used before they landed",
        "barrier_wait(shared.values_full(before.stage), before.parity);\n    Turn",
        "Turn",
    ),
    _hopper(
        "keys used before they landed",
        "if (tile < work.end_tile) barrier_wait(shared.keys_full(at.stage), at.parity);",
        "",
    ),
    _hopper(
        "keys of the second tile used before they landed",
        "Turn<T>::start();\n    barrier_wait(shared.keys_full(at.stage), at.parity);",
        "Turn<T>::start();",
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
    _hopper("the first turn is not given", "Turn<T>::start();", ";"),
    _hopper("a turn is not passed on", "Turn<T>::pass(tile + 1 == work.end_tile);", ""),
    _hopper(
        "a turn is given that no warpgroup takes",
        "Turn<T>::pass(tile + 1 == work.end_tile)",
        "Turn<T>::pass(false)",
    ),
    _hopper("a turn is passed to oneself", "give(warpgroup() + 1);", "give(warpgroup());"),
    _hopper(
        "values not transposed",
        "from_registers<true>(reinterpret_cast<float (&)[kWhole",
        "from_registers<false>(reinterpret_cast<float (&)[kWhole",
        file="panels.h",
    ),
    _hopper(
        "one product of one and a half panels",
        "kRest = Tile::kColumns % kSwizzleColumns",
        "kRest = 0",
        file="panels.h",
    ),
    _hopper(
        "last columns read the first panel",
        "tile.along_rows(kWhole, k)",
        "tile.along_rows(0, k)",
        file="panels.h",
    ),
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
    _hopper(
        "the first tile of a section taken twice",
        "within % width, within / width",
        "within % width, larger(within / width, 1)",
        file="work_order.h",
    ),
    _hopper("columns beyond the panel's half multiplied", "k < T::kHeadDim", "k < 144"),
)

CONSUMER, TILES, HOPPER_DQ = "backward_sm90.h", "backward_sm90_tiles.h", "backward_dq_sm90.h"
PANELS = "panels.h"


def _backward(name: str, old: str, new: str, file: str = CONSUMER, *, slow: bool = False) -> Mutant:
    return Mutant(
        name=f"hopper backward: {name}",
        file=file,
        old=old,
        new=new,
        architecture="sm90 backward",
        slow=slow,
    )


HOPPER_BACKWARD_MUTANTS = (
    _backward(
        "scores used before they are done",
        "wgmma_wait<1>();\n    hold(state.scores)",
        "wgmma_wait<2>();\n    hold(state.scores)",
    ),
    _backward("dP used before it is done", "wgmma_wait<1>();  // all but dV", "wgmma_wait<2>();"),
    _backward("dQ used before it is done", "wgmma_wait<1>();  // all but dK", "wgmma_wait<2>();"),
    _backward(
        "tile released before dK has read it",
        "wgmma_wait<0>();\n    hold(state.dk);\n    hold(state.ds_operand);\n"
        "    arrive_as_warp(&barriers.tile_empty[at.stage]);",
        "arrive_as_warp(&barriers.tile_empty[at.stage]);\n"
        "    wgmma_wait<0>();\n    hold(state.dk);\n    hold(state.ds_operand);",
    ),
    _backward(
        "dS read before all have written it", "named_barrier_sync(1, T::kConsumers * kWarpgroupSize);", ""
    ),
    _backward("dS not fenced", "proxy_fence();\n    named_barrier_sync", "named_barrier_sync"),
    _backward(
        "dQ not fenced",
        "proxy_fence();\n    arrive_as_warp(&barriers.dq_full",
        "arrive_as_warp(&barriers.dq_full",
    ),
    _backward(
        "one stage of dS",
        "consumer.share_score_gradients(state, turn);\n      consumer.issue_query_gradient(state, turn);",
        "consumer.share_score_gradients(state, 0);\n      consumer.issue_query_gradient(state, 0);",
    ),
    _backward(
        "dQ overwritten before it is sent", "barrier_wait(&barriers.dq_empty[consumer], turn ^ 1);", ""
    ),
    _backward("wrong parity of dQ", "dq_empty[consumer], turn ^ 1)", "dq_empty[consumer], turn)"),
    _backward("dQ of another tile's turn", "barrier_wait(full, parity);", "", TILES),
    _backward("dQ not committed", "    tensor_reduce_commit();\n", "", TILES),
    _backward("dQ's shared memory free before it is read", "    tensor_reduce_wait_read();\n", "", TILES),
    _backward("keys used before they landed", "barrier_wait(&barriers.keys_full, 0);", ""),
    _backward("dO used before it landed", "barrier_wait(&barriers.grads_full[at.stage], at.parity);\n", ""),
    _backward(
        "rows overwritten while used",
        "any = !cursor.done();\n    barrier_wait(&barriers.tile_empty[at.stage], at.parity ^ 1);",
        "any = !cursor.done();",
        TILES,
    ),
    _backward(
        "queries counted as there before their rows",
        "barrier_init(&queries_full[stage], 1 + kWarpSize)",
        "barrier_init(&queries_full[stage], 1)",
        TILES,
    ),
    _backward(
        "one arrival frees a stage",
        "barrier_init(&tile_empty[stage], T::kConsumerWarps)",
        "barrier_init(&tile_empty[stage], 1)",
        TILES,
    ),
    _backward(
        "fewer bytes expected than copied",
        "barrier_expect(queries, T::QueryTile::kBytes)",
        "barrier_expect(queries, T::QueryTile::kBytes / 2)",
        TILES,
    ),
    _backward("the end is not signalled", "rows.any = any;", "rows.any = true;", TILES),
    _backward("last head of a group left out", "first_head + heads;", "first_head + larger(heads - 1, 1);"),
    _backward(
        "the second launch writes over the first", "params.accumulate || first_query > 0", "params.accumulate"
    ),
    _backward(
        "every part of a group takes the first heads",
        "launch.head_parts + part) * heads",
        "launch.head_parts) * heads",
    ),
    _backward(
        "tiles that are seen in part left out", "== TileKind::kUnseen);", "!= TileKind::kWhole);", TILES
    ),
    _backward("barriers used before their initialisation", "sync_threads();\n", ""),
    _backward(
        "last queries left out", "visibility.num_queries) + T::kQueries - 1)", "visibility.num_queries))"
    ),
    _backward("edge tiles not masked", "if (rows.masked)", "if (false && rows.masked)"),
    _backward(
        "mask one key off",
        "contains(first_key + fragment_row(e))",
        "contains(first_key + 1 + fragment_row(e))",
    ),
    _backward("dS not transposed", "from_shared<true, true>", "from_shared<false, true>"),
    _backward(
        "both consumers compute the same columns of dQ",
        "along_rows(consumer * T::kDqColumns, k)",
        "along_rows(0, k)",
    ),
    _backward("product without wgmma.fence", "hold(scores);\n  wgmma_fence();", "hold(scores);"),
    _backward(
        "the second launch adds to the first queries",
        "part.dq.data += first_query * part.dq.token_stride;",
        "",
    ),
    _backward("delta forgotten", "- rows.delta[query]", ""),
    _backward(
        "dK without the scale",
        "state.dk, first_row, 0, params.softmax_scale);",
        "state.dk, first_row, 0, 1.0f);",
    ),
    _backward(
        "shared dK without the scale",
        "state.dk, first_row, params.softmax_scale);",
        "state.dk, first_row, 1.0f);",
    ),
    _backward("dS stored unswizzled", "(chunk % 8 ^ row % 8)", "(chunk % 8)", PANELS),
    _backward("rows of dQ have bank conflicts", "trades = row % 2;", "trades = false;", PANELS, slow=True),
    _backward(
        "deterministic dq: keys used before they landed",
        "if (tile < work.end_tile) barrier_wait(shared.keys_full(at.stage), at.parity);",
        "",
        HOPPER_DQ,
    ),
    _backward(
        "deterministic dq: keys overwritten while used",
        "barrier_wait(shared.keys_empty(at.stage), at.parity ^ 1);",
        "",
        HOPPER_DQ,
    ),
    _backward(
        "deterministic dq: dP used before it is done",
        "wgmma_wait<0>();\n    hold(grads)",
        "hold(grads)",
        HOPPER_DQ,
    ),
    _backward(
        "deterministic dq: queries used before they landed",
        "barrier_wait(shared.queries_full(), 0);",
        "",
        HOPPER_DQ,
    ),
    _backward("deterministic dq: every step reads the first keys", "keys, step * 16)", "keys, 0)", HOPPER_DQ),
    _backward(
        "deterministic dq: edge tiles not masked",
        "    if (masked) {",
        "    if (false && masked) {",
        HOPPER_DQ,
    ),
    _backward(
        "deterministic dq: last keys left out",
        "tile < work.end_tile;) {\n",
        "tile < work.end_tile - 1;) {\n",
        HOPPER_DQ,
    ),
    _backward("deterministic dq: delta forgotten", "- rows[i % 4 / 2].delta", "", HOPPER_DQ),
)
