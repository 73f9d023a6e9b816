// The driver of the backward recurrence.
#include "../cells/generated.h"
#include "backward.h"
#include "driver.h"
#include "recurrence.h"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, int I>
class Backward {
 public:
  using A = Accumulator<S>;
  static constexpr const auto& kShapes = ShapesOf<S>::kBackward;
  static constexpr bool kPersistent = kShapes[I].slices > 0, kTwoProducts = Cell::kSecondGates > 0;

  template <class Tile>
  using WholeStep = BackwardStep<Cell, S, BackwardPhase::kWhole, Tile>;
  template <class Tile>
  using SecondStep = BackwardStep<Cell, S, BackwardPhase::kSecond, Tile>;
  template <class Tile>
  using FirstStep = BackwardStep<Cell, S, BackwardPhase::kFirst, Tile>;
  template <class Tile>
  using OutputsStep = BackwardStep<Cell, S, BackwardPhase::kOutputs, Tile>;
  template <class Tile>
  using UnitsStep = BackwardStep<Cell, S, BackwardPhase::kUnits, Tile>;
  using Whole = Kernel<WholeStep, S, kShapes, I>;
  using Second = Kernel<SecondStep, S, kShapes, I>;
  using First = Kernel<FirstStep, S, kShapes, I>;
  using Outputs = Kernel<OutputsStep, S, kShapes, I>;
  using Units = Kernel<UnitsStep, S, kShapes, I>;

  // From a null workspace it only measures.
  Backward(const Layer& layer, const LayerGrads& grads, const GateGrads& out, void* workspace)
      : p(layer),
        memory_(workspace),
        H(int(layer.H)),
        P(int(layer.P)),
        Hp(up_to_8(H)),
        Pp(up_to_8(P)),
        K(kFirstGates<Cell> * Hp) {
    const int64_t rows = p.D * p.B;
    status_ = memory_.take<uint32_t>(1);
    carry_ = memory_.take<A>(rows * P);
    if (Cell::kCarried) dc_ = memory_.take<A>(rows * H);
    hidden_ = memory_.take<S>(Whole::scratch_size(p.D, p.B, P, K));
    if (kTwoProducts) first_ = memory_.take<S>(First::scratch_size(p.D, p.B, H, Hp));
    if (p.projected) units_ = memory_.take<S>(Units::scratch_size(p.D, p.B, H, Pp));
    fill(grads, out);
  }

  size_t bytes() const { return memory_.used(); }

  void run(const LayerGrads& grads, int groups, const Multiply& multiply, Stream stream) const {
    prepare(grads, stream);
    const Call call = {groups, status_, multiply, stream};
    const int passes = int(p.T) + 1;  // the last one leaves the gradients of the initial states
    if constexpr (kPersistent) {
      Whole::run(transposed_w_hh<S>(p, 0), args_, hidden_, K, 0, passes, call);
    } else {
      for (int pass = 0; pass < passes; ++pass) run_step(pass, call);
    }
  }

 private:
  WeightView<S> transposed_w_hr() const {
    WeightView<S> view = {};
    for (int d = 0; d < p.D; ++d) view.weights[d] = as<S>(p.weights[d].w_hr);
    view.units = H, view.gates = 1, view.unit_stride = 1;
    view.depth = P, view.pitch = Pp, view.k_stride = H;
    return view;
  }

  void fill(const LayerGrads& grads, const GateGrads& out) {
    args_.rows = rows_of(p);
    args_.D = p.D, args_.H = H, args_.P = P, args_.Hp = Hp, args_.Pp = Pp;
    args_.saved = as<S>(p.saved), args_.saved_row = int((Cell::kSaved + p.projected) * p.H);
    args_.saved_c = as<A>(p.saved_c);
    args_.y = as<S>(p.y), args_.h0 = as<S>(p.h0), args_.c0 = as<S>(p.c0), args_.grad_y = as<S>(grads.y);
    args_.grads = as<S>(out.gates), args_.projected = as<S>(out.projected);
    args_.carry = carry_, args_.dc = dc_;
    args_.grad_h0 = as<S>(grads.h0), args_.grad_c0 = as<S>(grads.c0);
  }

  void prepare(const LayerGrads& grads, Stream stream) const {
    constexpr int kBlocks = 64;
    const BackwardStates<S> states = {p.D * p.B * p.P, p.D * p.B * p.H, as<S>(grads.h_n), as<S>(grads.c_n), carry_, dc_,
                                      status_};
    launch(prepare_backward<S>, dim3(kBlocks), 0, {}, stream, states);
    if (kPersistent) fill_bytes(args_.grads, 0xff, size_t(p.D * p.T * p.B) * Cell::kGrads * Hp * sizeof(S), stream);
    Whole::pack(transposed_w_hh<S>(p, 0), p.D, K, hidden_, stream);
    if (kTwoProducts) First::pack(transposed_w_hh<S>(p, kFirstGates<Cell>), p.D, Hp, first_, stream);
    if (p.projected) Units::pack(transposed_w_hr(), p.D, Pp, units_, stream);
  }

  void run_step(int pass, const Call& call) const {
    const bool has_step = pass < p.T;
    const WeightView<S> hidden = transposed_w_hh<S>(p, 0);
    if constexpr (kTwoProducts) {
      Second::run(hidden, args_, hidden_, K, pass, pass + 1, call);
      if (has_step) First::run(transposed_w_hh<S>(p, kFirstGates<Cell>), args_, first_, Hp, pass, pass + 1, call);
    } else if constexpr (Cell::kCarried) {
      if (!p.projected) return Whole::run(hidden, args_, hidden_, K, pass, pass + 1, call);
      Outputs::run(hidden, args_, hidden_, K, pass, pass + 1, call);
      if (has_step || p.T == 0) Units::run(transposed_w_hr(), args_, units_, Pp, pass, pass + 1, call);
    } else {
      Whole::run(hidden, args_, hidden_, K, pass, pass + 1, call);
    }
  }

  const Layer& p;
  Workspace memory_;
  const int H, P, Hp, Pp, K;
  uint32_t* status_;
  A *carry_, *dc_ = nullptr;
  S *hidden_, *first_ = nullptr, *units_ = nullptr;  // scratch of each product
  BackwardArgs<S> args_ = {};
};

template <class Cell, class S>
int resident_groups(const Layer& layer, const Path& path) {
  const Chip chip = chip_of_current_device();
  return with_tile<Cell, 1, ShapesOf<S>::kBackward>(path.tile, [&](auto tile) {
    using Pass = Backward<Cell, S, decltype(tile)::value>;
    if constexpr (Pass::kPersistent) {
      return Pass::Whole::groups(layer.D, int(layer.H), kFirstGates<Cell> * int(up_to_8(layer.H)), path.groups, chip);
    } else {
      return path.groups;
    }
  });
}

template <class Cell, class S>
size_t measure(const Layer& layer, const Path& path) {
  return with_tile<Cell, 1, ShapesOf<S>::kBackward>(
      path.tile, [&](auto tile) { return Backward<Cell, S, decltype(tile)::value>(layer, {}, {}, nullptr).bytes(); });
}

template <class Cell, class S>
void run(const Layer& layer, const LayerGrads& grads, const Path& path, const GateGrads& out, void* workspace,
         const Multiply& multiply, Stream stream) {
  with_tile<Cell, 1, ShapesOf<S>::kBackward>(path.tile, [&](auto tile) {
    Backward<Cell, S, decltype(tile)::value>(layer, grads, out, workspace).run(grads, path.groups, multiply, stream);
  });
}

// ---- the h before each step

template <class S>
struct PreviousH {
  Rows rows;
  int d, D, P;
  const S *y, *h0;
  S* to;
};

// A block takes rows of [T*B] in turns.
template <class S>
__global__ void gather_previous_h(const PreviousH<S> p) {
  const int64_t count = int64_t(p.rows.T) * p.rows.B;
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const int t = int(row / p.rows.B), b = int(row % p.rows.B), length = p.rows.length(b);
    const int reset = p.rows.resets && t < length ? restart_time(p.d, t, length) : -1;
    const bool live = t < length && !(reset >= 0 && p.rows.resets[size_t(reset) * p.rows.B + b]);
    const int before = carried_time(p.d, t, length);
    const S* const from = !live         ? nullptr
                          : before >= 0 ? p.y + ((size_t(before) * p.rows.B + b) * p.D + p.d) * p.P
                          : p.h0        ? p.h0 + (size_t(p.d) * p.rows.B + b) * p.P
                                        : nullptr;
    for (int i = threadIdx.x; i < p.P; i += kThreads) p.to[row * p.P + i] = from ? from[i] : S{};
  }
}

template <class S>
void gather(const Layer& p, int d, void* to, Stream stream) {
  constexpr int64_t kMostBlocks = 4096;
  const int64_t rows = p.T * p.B;
  if (rows == 0) return;
  const PreviousH<S> args = {rows_of(p), d, p.D, int(p.P), as<S>(p.y), as<S>(p.h0), as<S>(to)};
  launch(gather_previous_h<S>, dim3(unsigned(rows < kMostBlocks ? rows : kMostBlocks)), 0, {}, stream, args);
}

}  // namespace

Path backward_path(const Layer& layer) {
#define FASTRNN_GROUPS(name, Cell)                                                               \
  {resident_groups<Cell, float>, resident_groups<Cell, double>, resident_groups<Cell, BFloat16>, \
   resident_groups<Cell, Float16>, resident_groups<Cell, TFloat32>},
  static constexpr int (*kByCell[][5])(const Layer&, const Path&) = {FASTRNN_CELLS(FASTRNN_GROUPS, FASTRNN_NOT_HERE)};
  const Chip chip = chip_of_current_device();
  const Path path = choose(layer, Pass::kBackward, chip);
  return limit_groups(layer, Pass::kBackward, chip, path, kByCell[layer.cell][storage_index(layer)](layer, path));
}

size_t backward_workspace(const Layer& layer, const Path& path) {
#define FASTRNN_MEASURE(name, Cell)                                                              \
  {measure<Cell, float>, measure<Cell, double>, measure<Cell, BFloat16>, measure<Cell, Float16>, \
   measure<Cell, TFloat32>},
  static constexpr size_t (*kByCell[][5])(const Layer&,
                                          const Path&) = {FASTRNN_CELLS(FASTRNN_MEASURE, FASTRNN_NOT_HERE)};
  return kByCell[layer.cell][storage_index(layer)](layer, path);
}

void backward(const Layer& layer, const LayerGrads& grads, const Path& path, const GateGrads& out, void* workspace,
              const Multiply& multiply, Stream stream) {
#define FASTRNN_RUN(name, Cell) \
  {run<Cell, float>, run<Cell, double>, run<Cell, BFloat16>, run<Cell, Float16>, run<Cell, TFloat32>},
  static constexpr void (*kByCell[][5])(const Layer&, const LayerGrads&, const Path&, const GateGrads&, void*,
                                        const Multiply&, Stream) = {FASTRNN_CELLS(FASTRNN_RUN, FASTRNN_NOT_HERE)};
  kByCell[layer.cell][storage_index(layer)](layer, grads, path, out, workspace, multiply, stream);
}

void previous_h(const Layer& layer, int d, void* to, Stream stream) {
  static constexpr void (*kByType[])(const Layer&, int, void*, Stream) = {gather<float>, gather<double>,
                                                                          gather<BFloat16>, gather<Float16>};
  kByType[int(layer.dtype)](layer, d, to, stream);
}

}  // namespace fastrnn::cuda
