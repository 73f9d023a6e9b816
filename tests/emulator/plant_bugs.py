"""Plants bugs in a copy of the CUDA sources, one at a time, and prints which test notices each of them.

usage: python tests/emulator/plant_bugs.py [part of a bug's name] [--jobs N]

To be quick, the copy has three cells. A bug that changes results is shown to tests/test_cuda_kernels.py, beginning with
the tests that are the likeliest to notice; one that only a race detector can see, to the driver under ThreadSanitizer.
Exits with 1 if a bug is missed, is not in the sources any more or does not compile.

What the emulator cannot tell apart, so that nothing of it is planted here:
  - lanes of a warp that are apart: a collective waits for all lanes wherever they are, so a polling loop without its
    vote is as good as one with it;
  - memory order: relaxed words may pass each other on a GPU; here they do so only as far as fibers interleave, and
    ThreadSanitizer tells plain from relaxed accesses, no more;
  - occupancy: resident_blocks() is one block of a multiprocessor;
  - numbers beyond the end of an array, where they meet weights of 0: nothing checks bounds;
  - status, the word by which blocks tell each other to give up: it is read every 1024 polls, which no test reaches.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
TESTS, RACE_TEST = "tests/test_cuda_kernels.py", "test_threads_do_not_race"
# Of a run of all tests, and of the first ones alone: several times what they take. A bug may be noticed by a test that
# does not end.
CPU_SECONDS, FIRST_CPU_SECONDS = 900, 120


@dataclass(frozen=True)
class Bug:
    """`old`, which occurs exactly once in `file`, becomes `new`. `first` are the tests to begin with."""

    name: str
    file: str
    old: str
    new: str
    reason: str
    first: str = "test_persistent"
    race: bool = False


EXCHANGE, CLUSTER, ROWS, STEPS = "exchange.h", "cluster.h", "rows.h", "steps.h"
MMA, FMA, TILE = "product_mma.h", "product_fma.h", "tile.h"
FORWARD, BACKWARD, PREPARE, DRIVER = "forward.h", "backward.h", "prepare.h", "driver.h"
SUMS, WGMMA = "sums.h", "product_wgmma.h"
FORWARD_CU, BACKWARD_CU, CHOOSE, OPS = "forward.cu", "backward.cu", "choose.cpp", "../ops_cuda.cpp"

BUGS = [
    Bug(
        "exchange: plain store of 16-bit numbers",
        EXCHANGE,
        "store_relaxed(reinterpret_cast<uint32_t*>(to), without_sentinel(value.bits | next << 16));",
        "*reinterpret_cast<uint32_t*>(to) = without_sentinel(value.bits | next << 16);",
        "a data race with the readers",
        race=True,
    ),
    Bug(
        "exchange: plain store of float",
        EXCHANGE,
        "if (writes) store_relaxed(reinterpret_cast<uint32_t*>(to), without_sentinel(bits_of(widen(value))));",
        "if (writes) *reinterpret_cast<uint32_t*>(to) = without_sentinel(bits_of(widen(value)));",
        "a data race with the readers",
        race=True,
    ),
    Bug(
        "exchange: a published float may be the sentinel",
        EXCHANGE,
        "without_sentinel(bits_of(widen(value))));",
        "bits_of(widen(value)));",
        "readers wait for ever for a NaN of these bits",
        "test_nan_stays_in_its_row",
    ),
    Bug(
        "exchange: 16-bit h0 may hold the sentinel",
        EXCHANGE,
        "return S{x.bits == 0xffff ? uint16_t(0x7fff) : x.bits};",
        "return x;",
        "readers wait for ever for a NaN of these bits",
        "test_nan_stays_in_its_row",
    ),
    Bug(
        "exchange: only the first word is checked",
        EXCHANGE,
        "v.x == kSentinel || v.y == kSentinel || v.z == kSentinel || v.w == kSentinel",
        "v.x == kSentinel",
        "a vector load is four separate ones",
        "test_bits_do_not_depend_on_the_schedule",
    ),
    Bug(
        "exchange: only the last word is checked",
        EXCHANGE,
        "v.x == kSentinel || v.y == kSentinel || v.z == kSentinel || v.w == kSentinel",
        "v.w == kSentinel",
        "words may arrive in any order",
        "test_bits_do_not_depend_on_the_schedule",
    ),
    Bug(
        "exchange: the halves of a word swapped",
        EXCHANGE,
        "without_sentinel(value.bits | next << 16)",
        "without_sentinel(next | uint32_t(value.bits) << 16)",
        "the even unit comes first in memory",
    ),
    Bug(
        "exchange: odd lanes publish",
        EXCHANGE,
        "threadIdx.x % 2 == 0",
        "threadIdx.x % 2 == 1",
        "a word would begin at an odd unit",
    ),
    Bug(
        "exchange: everybody writes",
        EXCHANGE,
        "if (writes && threadIdx.x % 2 == 0)",
        "if (threadIdx.x % 2 == 0)",
        "rows and units beyond the layer lie in other rows",
    ),
    Bug(
        "guard: waits never give up",
        EXCHANGE,
        "      expired_ = true;\n",
        "",
        "a lost block hangs the device",
        "test_a_lost_block_ends_the_launch_with_an_error",
    ),
    Bug(
        "guard: the launch ends as if nothing had happened",
        STEPS,
        "  if (guard.expired()) abandon();\n",
        "",
        "wrong results without an error",
        "test_a_lost_block_ends_the_launch_with_an_error",
    ),
    Bug(
        "guard: no start over, 16 bits",
        MMA,
        "      guard.start_over();\n",
        "",
        "a launch of many steps reaches the limit of a single wait",
        "test_each_wait_is_counted_by_itself",
    ),
    Bug(
        "guard: no start over, float",
        FMA,
        "    guard.start_over();\n",
        "",
        "a launch of many steps reaches the limit of a single wait",
        "test_each_wait_is_counted_by_itself",
    ),
    Bug(
        "rows: lengths not clamped",
        ROWS,
        "return n < 0 ? 0 : n > T ? T : int(n);",
        "return int(n);",
        "the op cannot check lengths on a GPU",
        "test_lengths_are_clamped",
    ),
    Bug(
        "rows: reset of the forward direction in both",
        ROWS,
        "const int from = restart_time(d_, t, length_);",
        "const int from = t;",
        "the reverse direction restarts before the marked time, not after it",
    ),
    Bug(
        "rows: restart by T, not by the row's length",
        ROWS,
        "restart_time(d_, t, length_)",
        "restart_time(d_, t, rows_.T)",
        "the reverse direction of a shorter row begins at its length",
    ),
    Bug(
        "rows: initial state by T, not by the row's length",
        ROWS,
        "carried_time(d_, t, length_) == kInitialState",
        "carried_time(d_, t, rows_.T) == kInitialState",
        "the reverse direction of a shorter row begins at its length",
    ),
    Bug(
        "rows: one step too long",
        ROWS,
        "__ballot_sync(kFullWarp, 0 <= t && t < length_)",
        "__ballot_sync(kFullWarp, 0 <= t && t <= length_)",
        "a finished row takes part once more",
    ),
    Bug(
        "rows: active before time 0",
        ROWS,
        "__ballot_sync(kFullWarp, 0 <= t && t < length_)",
        "__ballot_sync(kFullWarp, t < length_)",
        "backward of the reverse direction asks for time -1",
    ),
    Bug(
        "rows: longest of half of the lanes",
        ROWS,
        "int other = kWarpSize / 2; other > 0",
        "int other = kWarpSize / 4; other > 0",
        "tiles of 32 rows disagree about the barrier",
        "test_tiles",
    ),
    Bug(
        "product: k order of the packed 16-bit weights",
        MMA,
        "const int word = 2 * tile + reg / 2;",
        "const int word = tile + 2 * (reg / 2);",
        "not the order of the rows' loads",
    ),
    Bug(
        "product: k order of the packed float weights",
        FMA,
        "lane % kLanesOfK * kVector + j",
        "lane % kLanesOfK + j * kLanesOfK",
        "not the order of the rows' loads",
        "test_stepwise",
    ),
    Bug(
        "product: row halves of the packed weights",
        MMA,
        "16 * row_tile + lane / 4 + 8 * (reg % 2)",
        "16 * row_tile + lane / 4 + 8 * (reg / 2)",
        "registers 1 and 2 of an A fragment swapped",
    ),
    Bug(
        "product: wrong register of a B fragment",
        MMA,
        "mma(sum[n][m], a1, b[p][n].z, b[p][n].w);",
        "mma(sum[n][m], a1, b[p][n].y, b[p][n].w);",
        "a copied line",
    ),
    Bug(
        "product: wrong register of the sums",
        MMA,
        "odd[0] = sum[n][m][1], even[8] = sum[n][m][2]",
        "odd[0] = sum[n][m][2], even[8] = sum[n][m][1]",
        "rows and columns of a D fragment swapped",
    ),
    Bug(
        "product: slice cut one load early",
        MMA,
        "first_k + kStride * p < depth",
        "first_k + kStride * p < depth - 8",
        "the last eight numbers are left out",
    ),
    Bug(
        "product: slice cut one load late",
        MMA,
        "first_k + kStride * p < depth",
        "first_k + kStride * p <= depth",
        "waits for numbers of another row",
    ),
    Bug(
        "product: last slice of streamed weights dropped",
        DRIVER,
        "(K + kNumbers - 1) / kNumbers",
        "(K < kNumbers ? 1 : K / kNumbers)",
        "rounded down",
        "test_long_sums",
    ),
    Bug(
        "product: a group is not cut short",
        MMA,
        ": weights.slices() - first;",
        ": kGroup;",
        "the next warp's slice is counted twice",
        "test_tiles",
    ),
    Bug(
        "product: groups overlap",
        MMA,
        "first < kSlices; first += kGroup)",
        "first < kSlices; first += 1)",
        "slices are counted twice",
        "test_tiles",
    ),
    Bug(
        "product: inactive rows of a turn",
        FMA,
        "(live >> row & ((1u << kTurn) - 1)) == 0",
        "(live >> row & 1) == 0",
        "a turn is skipped for its first row",
    ),
    Bug(
        "product: inactive rows are read",
        FMA,
        "if (has_row(live, row + n) && first_k",
        "if (first_k",
        "a restarted row takes its old state",
    ),
    Bug(
        "product: sums of four of eight lanes",
        FMA,
        "reduce<kLaneRows, kLanesOfK / 2>(",
        "reduce<kLaneRows, kLanesOfK / 4>(",
        "the reduction starts too low",
        "test_stepwise",
    ),
    Bug(
        "product: upper lanes store into the lower half",
        FMA,
        "upper ? to + N / 2 : to, stores)",
        "to, stores)",
        "half of the sums are lost",
        "test_stepwise",
    ),
    Bug(
        "product: sent and kept halves swapped",
        FMA,
        "sent = upper ? sum[i] : sum[i + N / 2], kept = upper ? sum[i + N / 2] : sum[i]",
        "sent = upper ? sum[i + N / 2] : sum[i], kept = upper ? sum[i] : sum[i + N / 2]",
        "sums change their rows",
        "test_stepwise",
    ),
    Bug(
        "product: several lanes store a sum",
        FMA,
        "stores && !upper",
        "stores",
        "they store the same number, but without order",
        race=True,
    ),
    Bug(
        "product: shared slices filled with those of the registers",
        MMA,
        "from_[(kHeld + i) * kWarpSize]",
        "from_[i * kWarpSize]",
        "a forgotten offset",
        "test_shared_slices",
    ),
    Bug(
        "product: warps share their shared slices",
        MMA,
        "static_cast<uint4*>(shared) + warp * kSharedSlices * kSliceFragments * kWarpSize + lane",
        "static_cast<uint4*>(shared) + lane",
        "a forgotten offset",
        "test_shared_slices",
    ),
    Bug(
        "product: shared slices where the sums are",
        STEPS,
        "passes.slices, after_sums);",
        "passes.slices, shared);",
        "a forgotten offset",
        "test_long_sums",
    ),
    Bug(
        "product: weights of another warp",
        MMA,
        "size_t(warp) * slices * kSliceFragments",
        "size_t(warp) * kSliceFragments",
        "right for a single slice only",
        "test_tiles",
    ),
    Bug(
        "sums: the last warp left out",
        SUMS,
        "for (int part = 0; part < Product::kParts; ++part) {\n      const Sum*",
        "for (int part = 0; part < Product::kParts - 1; ++part) {\n      const Sum*",
        "only long sums have one",
        "test_long_sums",
    ),
    Bug(
        "sums: the neighbouring unit's",
        SUMS,
        "Product::Sums::at(set_, part, item.row) + kRowsPerUnit * item.unit",
        "Product::Sums::at(set_, part, item.row) + item.unit",
        "right for one product row of a unit",
        "test_stepwise",
    ),
    Bug(
        "steps: room for one set of sums",
        TILE,
        "kBytes = 2 * kSet * int(sizeof(Sum))",
        "kBytes = kSet * int(sizeof(Sum))",
        "the second one overwrites the weights",
        "test_long_sums",
    ),
    Bug(
        "steps: sums are not double-buffered",
        STEPS,
        "shared + (pass & 1) * Product::Sums::kSet",
        "shared",
        "a quick warp writes what a slow one reads",
        race=True,
    ),
    Bug(
        "steps: no barrier before the sums",
        STEPS,
        "exchange.guard());\n        __syncthreads();\n",
        "exchange.guard());\n",
        "sums are read before they are written",
    ),
    Bug(
        "steps: no barrier after a group",
        STEPS,
        "    __syncthreads();  // the next group starts with whichever set of sums\n",
        "",
        "the next group overwrites the sums of this one",
        race=True,
    ),
    Bug(
        "steps: prefetch of this step",
        STEPS,
        "next[i] = Step::load_input(args, d, items[i], next_time)",
        "next[i] = Step::load_input(args, d, items[i], t)",
        "every step but the first has the inputs of the one before",
    ),
    Bug(
        "steps: reset of this step for the next",
        STEPS,
        "watch.load_reset(next_time)",
        "watch.load_reset(t)",
        "resets come one step late",
    ),
    Bug(
        "steps: resets of the pass before are forgotten",
        STEPS,
        "watch.load_reset(Step::time(args, d, passes.begin - 1))",
        "uint8_t(0)",
        "a stepwise launch begins in the middle",
        "test_stepwise",
    ),
    Bug(
        "steps: the look-ahead pass is missing",
        STEPS,
        "t < longest || (Step::kLookAhead && t == longest && d == 1)",
        "t < longest",
        "the reverse direction's initial state gets no gradient",
    ),
    Bug(
        "steps: weights of the first direction for both",
        STEPS,
        "size_t(blockIdx.z) * gridDim.x + blockIdx.x",
        "size_t(blockIdx.x)",
        "a forgotten offset",
        "test_stepwise",
    ),
    Bug(
        "forward: c goes on at a restart",
        FORWARD,
        "state.c = V(A(0)), state.h = V(A(0));",
        "state.h = V(A(0));",
        "a restart clears the whole state",
    ),
    Bug(
        "forward: h goes on at a restart",
        FORWARD,
        "state.c = V(A(0)), state.h = V(A(0));",
        "state.c = V(A(0));",
        "GRU reads h besides its product",
    ),
    Bug(
        "forward: the product sees h at a restart",
        FORWARD,
        "return {active & ~restarted, watch.initial(t)};",
        "return {active, watch.initial(t)};",
        "a restart clears the whole state",
    ),
    Bug(
        "forward: h of the step before in both directions",
        FORWARD,
        "const int before = d == 0 ? t - 1 : t + 1;",
        "const int before = t - 1;",
        "the reverse direction comes from later times",
    ),
    Bug(
        "forward: reverse direction one step off",
        FORWARD,
        "p.rows.T - 1 - pass",
        "p.rows.T - pass",
        "its first pass reads time T",
    ),
    Bug(
        "forward: biases swapped",
        FORWARD,
        "fixed.x_bias[g] = biases[(kGate + g) * p.H];",
        "fixed.x_bias[g] = biases[(Cell::kGates + kGate + g) * p.H];",
        "the same to all cells but GRU",
    ),
    Bug(
        "forward: saved vectors of finished rows not cleared",
        FORWARD,
        "      clear_saved(p, d, t, item);\n",
        "",
        "they are operands of the large products",
        "test_what_nobody_wrote_does_not_matter",
    ),
    Bug(
        "forward: y of the second direction over the first",
        FORWARD,
        "p.y[(row_at(p, t, item) * p.D + d) * p.P + item.u]",
        "p.y[row_at(p, t, item) * p.D * p.P + item.u]",
        "directions lie side by side",
    ),
    Bug(
        "forward: c_n not stored",
        FORWARD,
        "      p.c_n[cell_at(p, d, item)] = narrow<S>(A(state.c));\n",
        "",
        "it stays c0",
    ),
    Bug(
        "forward: padding units of h not published",
        FORWARD,
        "exchange.publish(output, out, item.in_exchange",
        "exchange.publish(output, out, item.used",
        "readers wait for eight units",
    ),
    Bug(
        "forward: h of a projection stored by units",
        FORWARD,
        "if (kFirst || (kWhole && p.projected)) return;  // the other",
        "if (kFirst) return;  // the other",
        "h has P numbers",
        "test_stepwise",
    ),
    Bug(
        "backward: dh is not cut at a restart",
        BACKWARD,
        "state.carry = A(0), state.dc = A(0);",
        "state.dc = A(0);",
        "GRU carries dh besides its product",
    ),
    Bug(
        "backward: dc is not cut at a restart",
        BACKWARD,
        "state.carry = A(0), state.dc = A(0);",
        "state.carry = A(0);",
        "no gradient passes a restart",
    ),
    Bug(
        "backward: the product passes a restart",
        BACKWARD,
        "watch.active(time_before(d, t)) & ~restarted_before",
        "watch.active(time_before(d, t))",
        "no gradient passes a restart",
    ),
    Bug(
        "backward: h before a restart",
        BACKWARD,
        "restarted || kUnits ? A(0)",
        "kUnits ? A(0)",
        "it was 0",
    ),
    Bug(
        "backward: c before a restart",
        BACKWARD,
        "V(restarted ? A(0) : in.c_prev)",
        "V(in.c_prev)",
        "it was 0",
    ),
    Bug(
        "backward: c0 is forgotten",
        BACKWARD,
        "} else if (p.c0) {",
        "} else if (false) {",
        "the first step's forget gate",
    ),
    Bug(
        "backward: the first vector of gradients",
        BACKWARD,
        "kFirst ? kSecondGrad : kFirstGrad",
        "kFirst ? kSecondGrad : 0",
        "right for all cells but GRU",
    ),
    Bug(
        "backward: padding units of gate gradients not published",
        BACKWARD,
        "narrow<S>(A(grads[j])), item.in_exchange,",
        "narrow<S>(A(grads[j])), item.used,",
        "readers wait for eight units",
    ),
    Bug(
        "backward: padding outputs of a projection not published",
        BACKWARD,
        "narrow<S>(outputs), item.in_exchange,",
        "narrow<S>(outputs), item.used,",
        "NaN times 0",
        "test_what_nobody_wrote_does_not_matter",
    ),
    Bug(
        "backward: finished rows leave no gradients",
        BACKWARD,
        "narrow<S>(A(grads[j])), item.in_exchange,",
        "narrow<S>(A(grads[j])), item.in_exchange && active,",
        "the large products read all rows",
    ),
    Bug(
        "prepare: grad_h_n is dropped",
        PREPARE,
        "p.grad_h_n ? widen(p.grad_h_n[i]) : A(0)",
        "A(0)",
        "the carry begins at 0",
    ),
    Bug(
        "prepare: biases of the first direction for both",
        PREPARE,
        "second ? p.b_hh[1] : p.b_ih[1]",
        "second ? p.b_hh[1] : p.b_ih[0]",
        "a copied name",
        "test_stepwise",
    ),
    Bug(
        "prepare: h0 by its padded pitch",
        PREPARE,
        "p.h0[row * p.P + u]",
        "p.h0[i]",
        "the same where P is a multiple of 8",
        "test_stepwise",
    ),
    Bug(
        "prepare: stride of w_hh's vectors",
        DRIVER,
        "view.vector_stride = p.H * p.P",
        "view.vector_stride = p.H * p.H",
        "the same without a projection",
        "test_stepwise",
    ),
    Bug(
        "prepare: pitch of w_hh's vectors is their depth",
        DRIVER,
        "view.pitch = int(up_to_8(p.H))",
        "view.pitch = int(p.H)",
        "the same where H is a multiple of 8",
        "test_stepwise",
    ),
    Bug(
        "prepare: stride of the units of w_hr",
        FORWARD_CU,
        "view.unit_stride = H;",
        "view.unit_stride = P;",
        "rows of w_hr have H numbers",
        "test_stepwise",
    ),
    Bug(
        "driver: h is not filled with the sentinel",
        FORWARD_CU,
        "    if (kPersistent)\n      fill_bytes(args_.hidden, 0xff,",
        "    if (false)\n      fill_bytes(args_.hidden, 0xff,",
        "readers take what memory holds",
        "test_what_is_exchanged_is_marked_before",
    ),
    Bug(
        "driver: a part of h is filled with the sentinel",
        FORWARD_CU,
        "size_t(hidden_ ? Pp : P) * sizeof(S), stream",
        "size_t(hidden_ ? Pp : P), stream",
        "numbers, not bytes",
        "test_what_is_exchanged_is_marked_before",
    ),
    Bug(
        "driver: gate gradients are not filled with the sentinel",
        BACKWARD_CU,
        "if (kPersistent) fill_bytes(",
        "if (false) fill_bytes(",
        "readers take what memory holds",
        "test_what_is_exchanged_is_marked_before",
    ),
    Bug(
        "driver: y serves as h",
        FORWARD_CU,
        "if (Pp != P) hidden_",
        "if (P % 4 != 0) hidden_",
        "its rows cannot be read 16 bytes at a time",
        "test_few_multiprocessors",
    ),
    Bug(
        "driver: saved steps of an inference",
        FORWARD_CU,
        "p.saved ? p.B * V * H : 0",
        "p.B * V * H",
        "there is room for one",
        "test_inference_is_training_without_what_backward_needs",
    ),
    Bug(
        "driver: projection into what the second product reads",
        FORWARD_CU,
        "Cell::kSecondGates == 0 && Cell::kSaved",
        "Cell::kSaved",
        "the first product overwrites it",
        "test_stepwise",
    ),
    Bug(
        "driver: no pass for the initial states",
        BACKWARD_CU,
        "int(p.T) + 1;",
        "int(p.T);",
        "their gradients lack the first step",
    ),
    Bug(
        "driver: dc0 without steps",
        BACKWARD_CU,
        "if (has_step || p.T == 0) Units",
        "if (has_step) Units",
        "nobody writes it",
        "test_no_steps_hand_through_the_gradients_of_the_states",
    ),
    Bug(
        "driver: a persistent launch that is not cooperative",
        DRIVER,
        "const Together together = {Product::kResident && !kShape.cluster,",
        "const Together together = {false,",
        "blocks wait for one that has not begun",
    ),
    Bug(
        "ops: gate order of dx",
        OPS,
        "by_vector.push_back(w_ih[gate_of(j)])",
        "by_vector.push_back(w_ih[j])",
        "GRU's gradients have another order",
        "test_stepwise",
    ),
    Bug(
        "ops: the second direction overwrites dx",
        OPS,
        "      dx.addmm_(input, weights);",
        "      at::mm_out(dx, input, weights);",
        "it adds to the first",
        "test_stepwise",
    ),
    Bug(
        "ops: x of finished rows is not masked",
        OPS,
        "return x.masked_fill(finished, 0).view(",
        "return x.view(",
        "NaN times 0",
        "test_finished_rows_may_hold_anything",
    ),
    Bug(
        "ops: recompute keeps what it writes to",
        OPS,
        "Tensor recompute(Layer layer,",
        "Tensor recompute(Layer& layer,",
        "the outputs are gone when backward reads them",
        "test_recompute_gives_the_same_gradients",
    ),
    Bug(
        "ops: h before each step is h at each step",
        BACKWARD_CU,
        "const int before = carried_time(p.d, t, length);",
        "const int before = t;",
        "the gradient of w_hh",
        "test_stepwise",
    ),
    Bug(
        "ops: pitch of a projection that lies in saved",
        OPS,
        "rows * pitch, pitch}, workspace",
        "rows * gates, gates}, workspace",
        "the same for LSTM",
        "test_stepwise",
    ),
    Bug(
        "product: weights that are not rounded to TF32",
        MMA,
        "return {float_of(to_tf32(bits_of(weight.value)))};",
        "return weight;",
        "mma cuts off what is not rounded",
        "test_tf32_is_rounded_to_nearest",
    ),
    Bug(
        "product: numbers that are not rounded to TF32",
        MMA,
        "mma_tf32(d, a, to_tf32(b0), to_tf32(b1));",
        "mma_tf32(d, a, b0, b1);",
        "mma cuts off what is not rounded",
        "test_tf32_is_rounded_to_nearest",
    ),
    Bug(
        "prepare: padded rows hold the next block's weights",
        PREPARE,
        "unit < kUnits && at.k < K",
        "at.k < K && u >= 0 && view.units < 0",
        "no weights at all",
    ),
    Bug(
        "cluster: one slot",
        CLUSTER,
        "slots_ + current_ * slot_bytes_",
        "slots_",
        "slots are used in turns",
        "test_clusters",
    ),
    Bug(
        "cluster: the parity of the first use, always",
        CLUSTER,
        "parity = uses_ >> 1 & 1;",
        "parity = 0;",
        "later uses are not waited for",
        "test_clusters",
    ),
    Bug(
        "cluster: the tile's rows, not those that exist",
        STEPS,
        "smaller(Tile::kBatch, args.rows.B - group * Tile::kBatch)",
        "Tile::kBatch",
        "bytes that never come are waited for",
        "test_clusters",
    ),
    Bug(
        "cluster: a row begins with the wrong lane's numbers",
        CLUSTER,
        "(k - mine) * int(sizeof(S))",
        "k * int(sizeof(S))",
        "right for the first lane only",
        "test_clusters",
    ),
    Bug(
        "cluster: some blocks get nothing",
        CLUSTER,
        "rank < cluster_blocks(); rank += kLanes",
        "rank + 1 < cluster_blocks(); rank += kLanes",
        "off by one",
        "test_clusters",
    ),
    Bug(
        "cluster: initial rows are looked for in the inbox",
        STEPS,
        "Step::is_initial(sources, row) ? at : exchange.received(at, row)",
        "exchange.received(at, row)",
        "nobody has sent them",
        "test_clusters",
    ),
    Bug(
        "cluster: sends before the last pass of a group only",
        STEPS,
        "const bool next_has = pass + 1 < passes.end &&",
        "const bool next_has = pass + 2 < passes.end &&",
        "the last pass waits in vain, or does not wait",
        "test_clusters",
    ),
    Bug(
        "choose: twice the slices",
        CHOOSE,
        "tile.slices * kWarps * product.slice() * tile.split < product.K",
        "tile.slices * kWarps * product.slice() * tile.split * 2 < product.K",
        "the end of a row is left out",
        "test_what_does_not_fit_is_not_persistent",
    ),
    Bug(
        "choose: half of the slices",
        CHOOSE,
        "tile.slices * kWarps * product.slice() * tile.split < product.K",
        "tile.slices * kWarps * product.slice() * tile.split / 2 < product.K",
        "a layer that fits does not become persistent",
        "test_long_sums",
    ),
    Bug(
        "choose: shared memory is not checked",
        CHOOSE,
        "    if (shared_bytes(tile, product) > chip.shared_bytes) continue;\n",
        "",
        "the launch fails",
        "test_what_does_not_fit_is_not_persistent",
    ),
    Bug(
        "choose: more blocks than multiprocessors",
        CHOOSE,
        " || blocks > chip.multiprocessors) continue;",
        ") continue;",
        "a division by 0",
        "test_what_does_not_fit_is_not_persistent",
    ),
    Bug(
        "choose: blocks of one direction",
        CHOOSE,
        "/ units * tile.split * D;",
        "/ units * tile.split;",
        "two directions do not fit and fall back",
        "test_blocks_of_both_directions_are_counted",
    ),
    Bug(
        "choose: all groups together",
        CHOOSE,
        "std::min(groups, chip.multiprocessors / blocks)",
        "std::min<int64_t>(groups, chip.multiprocessors)",
        "tiles of few rows seem faster than they are",
        "test_the_fastest_by_the_model_is_chosen",
    ),
    Bug(
        "sums: the last block's part left out",
        SUMS,
        "for (int rank = 0; rank < kSplit; ++rank)",
        "for (int rank = 0; rank < kSplit - 1; ++rank)",
        "a block of the cluster multiplies for nothing",
        "test_split_sums",
    ),
    Bug(
        "sums: the parity of the first use, always",
        SUMS,
        "use >> 1 & 1",
        "0",
        "from the third pass on, every other wait is none",
        "test_bits_of_clusters_do_not_depend_on_the_schedule",
    ),
    Bug(
        "sums: handed to the neighbour",
        SUMS,
        "unsigned(first / kOwnRows), own_sums",
        "(unsigned(first / kOwnRows) + 1) % kSplit, own_sums",
        "whoever owns the units gets them",
        "test_split_sums",
    ),
    Bug(
        "sums: fewer bytes announced than sent",
        SUMS,
        "kBytes = kSplit * kBatch * kOwnRows * int(sizeof(float))",
        "kBytes = kBatch * kOwnRows * int(sizeof(float))",
        "the wait ends before all parts are there",
        "test_split_sums",
    ),
    Bug(
        "tile: streamed slices dealt out",
        TILE,
        "if constexpr (kSlices == 0) return i;",
        "",
        "weights and numbers of different k meet",
        "test_long_sums",
    ),
    Bug(
        "tile: blocks that split K multiply the same part",
        TILE,
        "sharer * kSplit + int(blockIdx.x % kSplit)",
        "sharer * kSplit",
        "each has a part of its own",
        "test_split_sums",
    ),
    Bug(
        "tile: resident slices side by side",
        TILE,
        "return slice * kSharers * kSplit + sharer % kSharers * kSplit + sharer / kSharers;",
        "return i;",
        "weights and numbers of different k meet",
        "test_long_sums",
    ),
    Bug(
        "prepare: the first block's units alone",
        PREPARE,
        "constexpr int kUnits = Product::Tile::kUnits * Product::kSplit;",
        "constexpr int kUnits = Product::Tile::kUnits;",
        "blocks that split K multiply for the units of all",
        "test_split_sums",
    ),
    Bug(
        "wgmma: the warpgroup does not meet",
        WGMMA,
        "      warpgroup_meet(warpgroup());\n",
        "",
        "a product reads what other warps have not written yet",
        race=True,
    ),
    Bug(
        "wgmma: sums not waited for",
        WGMMA,
        "    wgmma_wait(sum);\n",
        "",
        "the product is still under way",
        "test_warpgroups",
    ),
    Bug(
        "wgmma: a wait for the first pieces alone",
        WGMMA,
        "    wgmma_wait(sum);\n    guard.start_over();",
        "    guard.start_over();\n    if (kTogether == Slices) wgmma_wait(sum);",
        "the last product is still under way",
        "test_warpgroups",
    ),
    Bug(
        "wgmma: pieces staged in the place of the first",
        WGMMA,
        "((first + p) * kPiece / kVector + vector)",
        "(p * kPiece / kVector + vector)",
        "a product that is under way reads them",
        "test_warpgroups",
    ),
    Bug(
        "wgmma: rows staged in another order",
        WGMMA,
        "(8 * n + lane % 8) * 16",
        "(8 * n + lane / 4) * 16",
        "rows get each other's numbers",
        "test_warpgroups",
    ),
    Bug(
        "wgmma: k order of the packed weights",
        WGMMA,
        "16 * (step % kSteps) + 8 * (reg / 2)",
        "16 * (step % kSteps) + 8 * (reg % 2)",
        "weights and numbers of different k meet",
        "test_warpgroups",
    ),
    Bug(
        "wgmma: warpgroups multiply the same part",
        WGMMA,
        "first_slice<kSlices, kParts, kSplit>(warpgroup(), kSlices)",
        "first_slice<kSlices, kParts, kSplit>(0, kSlices)",
        "each has a part of its own",
        "test_warpgroups",
    ),
    Bug(
        "wgmma: core matrices at the wrong distance",
        WGMMA,
        "kVectorBytes, 8 * 16);",
        "8 * 16, kVectorBytes);",
        "the two strides mean different things",
        "test_warpgroups",
    ),
    Bug(
        "choose: more groups of rows than are resident",
        CHOOSE,
        "if (groups >= path.groups) return path;",
        "return path;",
        "a cooperative launch fails",
        "test_clusters_that_do_not_fill_the_chip",
    ),
]


class Copy:
    """A copy of the repository with few cells, in which bugs are planted."""

    def __init__(self, folder: Path, cells: dict[str, str]):
        self.root, self.clean = folder / "copy", folder / "clean"
        for part in ("csrc", "fastrnn", "tests"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", self.root)
        listed = " ".join(f"X({name}, {struct})" for name, struct in cells.items())
        self.edit("csrc/cells/list.h", r"#define FASTRNN_CELLS(?s:.*)", f"#define FASTRNN_CELLS(X) {listed}\n")
        self.edit("tests/cases.py", r"for cell in CELLS\]", f"for cell in {list(cells)}]")
        # Rounds without progress after which the emulator reports a dead-lock.
        self.edit("tests/emulator/emulate.h", r"idle > 200000", "idle > 5000")

    def edit(self, file: str, pattern: str, to: str):
        path = self.root / file
        text, count = re.subn(pattern, to, path.read_text())
        assert count == 1, f"{file}: {pattern}"
        path.write_text(text)

    def keep(self):
        """What is there now, with all that is built, is what restore() restores."""
        shutil.copytree(self.root, self.clean)

    def restore(self):
        shutil.rmtree(self.root)
        shutil.copytree(self.clean, self.root)

    def plant(self, bug: Bug):
        path = self.root / "csrc" / "cuda" / bug.file
        path.write_text(path.read_text().replace(bug.old, bug.new))

    def test(self, *arguments: str, cpu_seconds: int = CPU_SECONDS) -> tuple[int, str]:
        """Runs pytest; returns its exit status and what it printed."""
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-x", "--tb=short", "-p", "no:cacheprovider", *arguments],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(self.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 10)),
        )
        if -process.returncode in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            raise RuntimeError("Somebody ended the tests.")
        if process.returncode > 1:  # pytest's own errors, such as a test that does not exist
            raise RuntimeError(process.stdout)
        return process.returncode, process.stdout


class Worker:
    """Copies for the two kinds of bugs."""

    def __init__(self, folder: Path):
        gru = {"lstm": "Lstm", "gru": "Gru"}
        self.results = Copy(folder / "results", gru | {"gru_reset_before": "GruResetBefore"})
        self.races = Copy(folder / "races", gru | {"rnn_tanh": "ElmanTanh"})

    def run_results(self, first: str = "") -> tuple[int, str]:
        if first:
            status, output = self.results.test(f"{TESTS}::{first}", cpu_seconds=FIRST_CPU_SECONDS)
            if status:
                return status, output
        # Left out: what needs all cells, and what is run for races alone.
        skipped = [f"--deselect={TESTS}::{name}" for name in ("test_every_kernel_is_executed", RACE_TEST)]
        return self.results.test(*skipped, TESTS)

    def run_races(self) -> tuple[int, str]:
        return self.races.test(f"{TESTS}::{RACE_TEST}")

    def build(self):
        """What bugs are planted in: compiled without optimization, since most end the tests early."""
        self.results.edit("tests/emulator/__init__.py", r'"-O1", "-g0"', '"-O0", "-g0"')
        status, output = self.results.test(f"{TESTS}::test_lengths_are_clamped")
        if status:
            raise RuntimeError(f"The unchanged copy does not build.\n{output}")
        self.results.keep()
        self.races.keep()

    def check_unchanged(self, kinds: set[bool]):
        for race, run in ((False, self.run_results), (True, self.run_races)):
            if race not in kinds:
                continue
            status, output = run()
            if status:
                raise RuntimeError(f"The unchanged copy fails.\n{output}")

    def notice(self, bug: Bug) -> str | None:
        """Who notices the bug, or None."""
        copy = self.races if bug.race else self.results
        copy.restore()
        copy.plant(bug)
        status, output = self.run_races() if bug.race else self.run_results(bug.first)
        if "Error building extension" in output or "CalledProcessError" in output:
            raise RuntimeError(f"{bug.name}: does not compile.\n{output}")
        if bug.race:
            return "ThreadSanitizer" if "ThreadSanitizer: data race" in output else None
        tests = re.findall(rf"^{TESTS}::(.+?)(?: (?:PASSED|FAILED|ERROR|Fatal).*| )?$", output, re.MULTILINE)
        return tests[-1] if status else None


def check_bugs(bugs: list[Bug]):
    for bug in bugs:
        count = (ROOT / "csrc" / "cuda" / bug.file).read_text().count(bug.old)
        if count != 1:
            sys.exit(f"{bug.name}: {count} times in {bug.file}: {bug.old}")
    if not bugs:
        sys.exit("There is no bug of this name.")


def main():
    parser = argparse.ArgumentParser(description="Plants bugs in the CUDA kernels; prints which test notices each.")
    parser.add_argument("part", nargs="?", default="", help="of the names of the bugs to plant")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at the same time")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if options.part in bug.name]
    check_bugs(bugs)
    jobs = max(1, min(options.jobs, len(bugs)))
    width = max(len(bug.name) for bug in bugs)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        workers = [Worker(Path(folder) / str(i)) for i in range(jobs)]
        workers[0].check_unchanged({bug.race for bug in bugs})
        print("the unchanged copy passes", flush=True)
        list(pool.map(Worker.build, workers))
        free = Queue()
        for worker in workers:
            free.put(worker)

        def notice(bug):
            worker, start = free.get(), time.monotonic()
            try:
                noticed = worker.notice(bug)
            finally:
                free.put(worker)
            print(f"{bug.name:{width}}  {time.monotonic() - start:5.0f} s  {noticed or 'MISSED'}", flush=True)
            return noticed

        missed = [bug for bug, noticed in zip(bugs, pool.map(notice, bugs), strict=True) if not noticed]
    print(f"{len(bugs)} bugs planted, {len(missed)} missed")
    for bug in missed:
        print(f"missed: {bug.name} ({bug.reason})")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
