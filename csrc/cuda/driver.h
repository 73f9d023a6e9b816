// What the drivers of both passes share: scratch memory, packing, and launching a step in one of its tile shapes.
#pragma once

#include <algorithm>
#include <tuple>

#include "kernels.h"
#include "launch.h"
#include "pointwise.h"
#include "prepare.h"
#include "product_fma.h"
#include "product_mma.h"
#include "product_wgmma.h"
#include "steps.h"

namespace fastrnn::cuda {

template <class Int>
constexpr Int up_to_8(Int n) {
  return (n + 7) / 8 * 8;
}

// Hands out pieces of scratch memory; from a null base it only adds them up.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class N>
  N* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    char* const piece = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(count) * sizeof(N) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<N*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

template <class S>
struct ShapesOf {
  static constexpr const auto& kForward = kForward16;
  static constexpr const auto& kBackward = kBackward16;
};
template <>
struct ShapesOf<float> {
  static constexpr const auto& kForward = kForward32;
  static constexpr const auto& kBackward = kBackward32;
};
template <>
struct ShapesOf<TFloat32> {
  static constexpr const auto& kForward = kForwardTf32;
  static constexpr const auto& kBackward = kBackwardTf32;
};
template <>
struct ShapesOf<double> {
  static constexpr const auto& kForward = kBoth64;
  static constexpr const auto& kBackward = kBoth64;
};

template <const auto& Shapes, int I>
using TileAt = Tile<Shapes[I].units, Shapes[I].batch, Shapes[I].turns>;

// The product of a step with so many rows per unit, in tile I of a list.
template <class S, int RowsPerUnit, const auto& Shapes, int I>
auto product_of() {
  constexpr TileShape kShape = Shapes[I];
  constexpr int kRows = kShape.units * kShape.split * RowsPerUnit;
  using TileOf = TileAt<Shapes, I>;
  if constexpr (kShape.wgmma) {
    static_assert(kRows <= 64 && kShape.register_slices == kShape.slices);
    return WgmmaProduct<S, TileOf, kShape.slices, kShape.split>();
  } else if constexpr (kUsesMma<S>) {
    return MmaProduct<S, (kRows + 15) / 16 * 16, TileOf, kShape.slices, kShape.register_slices, kShape.cluster,
                      kShape.split>();
  } else {
    return FmaProduct<S, kRows, TileOf, kShape.slices>();
  }
}

// What all launches of a call share.
struct Call {
  int groups;        // of rows that are walked at the same time
  uint32_t* status;  // 0; 1: a wait gave up
  const Multiply& multiply;
  Stream stream;
};

// One product of a layer, by a kernel of ours, with what follows it. Step<Tile> is a ForwardStep or BackwardStep.
template <template <class Tile> class Step, class S, const auto& Shapes, int I>
struct OwnProduct {
  static constexpr TileShape kShape = Shapes[I];
  using StepOf = Step<TileAt<Shapes, I>>;
  using Product = decltype(product_of<S, StepOf::kRowsPerUnit, Shapes, I>());
  using Args = typename StepOf::Args;
  static size_t shared(int K) {
    return size_t(Product::Sums::kBytes + Product::kSharedBytes + SumsOf<Product, StepOf::kRowsPerUnit>::kSharedBytes) +
           (kShape.cluster ? size_t(mail_bytes(kShape.batch, K, sizeof(S))) : 0);
  }

  static int slices(int K) {
    constexpr int kNumbers = kWarps * Product::kSlice;
    return Product::kResident ? Product::kSlices : (K + kNumbers - 1) / kNumbers;
  }
  static int block_size(int K) { return kWarps * slices(K) * Product::kSlice * Product::kRows; }
  static int sharers(int units) {  // of units: a block each, or the blocks that split K
    constexpr int kUnits = kShape.units * kShape.split;
    return (up_to_8(units) + kUnits - 1) / kUnits;
  }
  static int blocks(int units) { return sharers(units) * kShape.split; }

  // Of the weights as a launch reads them, in numbers.
  static int64_t scratch_size(int D, int64_t /*B*/, int units, int K) {
    return int64_t(D) * blocks(units) * block_size(K);
  }

  static void pack(const WeightView<S>& view, int D, int K, S* packed, Stream stream) {
    const int size = block_size(K) * kShape.split, pieces = (size + 4 * kThreads - 1) / (4 * kThreads);
    launch(pack_weights<S, Product>, dim3(pieces, sharers(view.units), D), 0, {}, stream, view, K, size, packed);
  }

  // As much shared memory as the shape can ever take, so that a call cannot take away what another one was allowed.
  static void allow_most_shared() {
    allow_shared(run_steps<StepOf, Product>, shared(Product::kSlices * kWarps * Product::kSlice));
  }

  // How many groups of rows, of `wanted`, the device can walk at the same time.
  static int groups(int D, int units, int K, int wanted, const Chip& chip) {
    const auto kernel = run_steps<StepOf, Product>;
    allow_most_shared();
    if (kShape.cluster) return resident_clusters(kernel, blocks(units), shared(K)) > 0 ? wanted : 0;
    const int resident = kShape.split > 1 ? resident_clusters(kernel, kShape.split, shared(K))
                                          : resident_blocks(kernel, shared(K), chip);
    return std::min(wanted, resident / (D * sharers(units)));
  }

  // Passes [begin, end), all in one persistent launch or each in one of its own.
  static void run(const WeightView<S>&, Args args, S* packed, int K, int begin, int end, const Call& call) {
    if (args.rows.B == 0 || begin >= end) return;
    args.weights = packed;
    const dim3 grid(blocks(StepOf::units(args)), call.groups, args.D);
    const int64_t weight_bytes = int64_t(block_size(K)) * int64_t(sizeof(S));
    const Passes passes = {begin, end, slices(K), weight_bytes, call.status, wait_limit()};
    const Together together = {Product::kResident && !kShape.cluster, kShape.cluster ? grid.x : unsigned(kShape.split)};
    if (begin == 0) allow_most_shared();  // once, not for every step
    launch(run_steps<StepOf, Product>, grid, shared(K), together, call.stream, args, passes);
  }
};

// Of kernels with a thread for each (unit, row).
template <class TileOf>
dim3 grid_of(int units, int groups, int D) {
  return dim3((units + TileOf::kUnits - 1) / TileOf::kUnits, groups, D);
}

// The same with the product by the caller's matrix library: of a single pass.
template <template <class Tile> class Step, class S, const auto& Shapes, int I>
struct GivenProduct {
  using TileOf = TileAt<Shapes, I>;
  using StepOf = Step<TileOf>;
  using Args = typename StepOf::Args;
  using A = Accumulator<S>;

  // Of the sums of a step, in numbers of S.
  static int64_t scratch_size(int D, int64_t B, int units, int /*K*/) {
    return D * B * units * StepOf::kRowsPerUnit * int64_t(sizeof(A) / sizeof(S));
  }

  static void pack(const WeightView<S>&, int, int, S*, Stream) {}

  static void run(const WeightView<S>& view, Args args, S* scratch, int K, int pass, int /*end*/, const Call& call) {
    A* const sums = reinterpret_cast<A*>(scratch);
    const int64_t B = args.rows.B, columns = int64_t(view.gates) * view.units;
    if (B == 0) return;
    for (int d = 0; d < args.D; ++d) {
      const auto rows = StepOf::operand(args, d, pass);
      if (!rows.at) continue;
      call.multiply({B, K, columns, rows.at, rows.pitch, view.weights[d], view.k_stride == 1, sums + d * B * columns});
    }
    args.weights = sums;
    const dim3 grid = grid_of<TileOf>(view.units, call.groups, args.D);
    launch(finish_step<StepOf, A, TileOf>, grid, 0, {}, call.stream, args, pass);
  }
};

// Without a product: all passes at once.
template <template <class Tile> class Step, class S, const auto& Shapes, int I>
struct NoProduct {
  using TileOf = TileAt<Shapes, I>;
  using StepOf = Step<TileOf>;
  using Args = typename StepOf::Args;

  static int64_t scratch_size(int, int64_t, int, int) { return 0; }
  static void pack(const WeightView<S>&, int, int, S*, Stream) {}

  static void run(const WeightView<S>& view, const Args& args, S*, int /*K*/, int /*begin*/, int end,
                  const Call& call) {
    if (args.rows.B == 0) return;
    const dim3 grid = grid_of<TileOf>(view.units, call.groups, args.D);
    launch(scan_steps<StepOf, TileOf>, grid, 0, {}, call.stream, args, end);
  }
};

template <template <class Tile> class Step, class S, const auto& Shapes, int I>
using Kernel = std::conditional_t<
    Shapes[I].scan, NoProduct<Step, S, Shapes, I>,
    std::conditional_t<Shapes[I].gemm, GivenProduct<Step, S, Shapes, I>, OwnProduct<Step, S, Shapes, I>>>;

template <class S>
const S* as(const void* p) {
  return static_cast<const S*>(p);
}
template <class S>
S* as(void* p) {
  return static_cast<S*>(p);
}

// By a variant of kernels.h.
template <int variant>
using StorageOf = std::tuple_element_t<variant, std::tuple<float, double, BFloat16, Float16, TFloat32>>;

inline Rows rows_of(const Layer& layer) {
  return {int(layer.T), int(layer.B), layer.lengths, reinterpret_cast<const uint8_t*>(layer.resets)};
}

// The view of w_hh [G*H, P] that carries gate gradients back: dL/dh of output u from `gates` gates, the first at
// `first`.
template <class S>
WeightView<S> transposed_w_hh(const Layer& p, int first) {
  const int64_t from = first * p.H * p.P;
  WeightView<S> view = {};
  for (int d = 0; d < p.D; ++d) view.weights[d] = as<S>(p.weights[d].w_hh) + from;
  view.units = int(p.P), view.gates = 1, view.unit_stride = 1;
  view.depth = int(p.H), view.pitch = int(up_to_8(p.H)), view.vector_stride = p.H * p.P, view.k_stride = p.P;
  return view;
}

// Persistent kernels exist for cells with one product per step, scans for those without.
template <class Cell>
constexpr bool has_kernels(const TileShape& shape, int rows_per_unit) {
#ifdef FASTRNN_ONLY_CELL
  if (is_variant(shape)) return false;
#endif
  if (Cell::kFirstGates == 0) return shape.scan;
  return shape.slices == 0 ? !shape.scan : Cell::kSecondGates == 0 && has_wgmma_rows(shape, rows_per_unit);
}

// run(Index<tile>) for a tile of a list that is known at run time; has_kernels says whether it may be, and `choose`
// takes no other. The last tile of each list is the scan.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <class Cell, int RowsPerUnit, const auto& Shapes, int I = 0, class Run>
auto with_tile(int tile, Run run) {
  if constexpr (I + 1 < count_of(Shapes)) {
    if (tile != I) return with_tile<Cell, RowsPerUnit, Shapes, I + 1>(tile, run);
  }
  constexpr int kFallback = Cell::kFirstGates == 0 ? count_of(Shapes) - 1 : 0;
  return run(Index<has_kernels<Cell>(Shapes[I], RowsPerUnit) ? I : kFallback>{});
}

}  // namespace fastrnn::cuda
