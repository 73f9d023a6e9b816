// The driver of the backward recurrence.
#include "backward.h"
#include "driver.h"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, int I>
class Backward {
 public:
  using A = Accumulator<S>;
  static constexpr const auto& kShapes = ShapesOf<S>::kBackward;
  static constexpr bool kPersistent = kShapes[I].slices > 0, kOneLaunch = kPersistent || kShapes[I].scan,
                        kTwoProducts = Cell::kSecondGates > 0,
                        kMayProject = Cell::kCarried > 0 && !kTwoProducts && !kOneLaunch;

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
        K(Cell::kFirstGates * Hp),
        second_K(Cell::kSecondGates * Hp) {
    const int64_t rows = p.D * p.B;
    status_ = memory_.take<uint32_t>(1);
    carry_ = memory_.take<A>(rows * P);
    if (Cell::kCarried) dc_ = memory_.take<A>(rows * Cell::kCarried * H);
    hidden_ = memory_.take<S>(Whole::scratch_size(p.D, p.B, P, K));
    if constexpr (kTwoProducts) first_ = memory_.take<S>(First::scratch_size(p.D, p.B, H, second_K));
    if constexpr (kMayProject)
      if (p.projected) units_ = memory_.take<S>(Units::scratch_size(p.D, p.B, H, Pp));
    fill(grads, out);
  }

  size_t bytes() const { return memory_.used(); }

  void run(const LayerGrads& grads, int groups, const Multiply& multiply, Stream stream) const {
    prepare(grads, stream);
    const Call call = {groups, status_, multiply, stream};
    const int passes = int(p.T) + 1;  // the last one leaves the gradients of the initial states
    if constexpr (kOneLaunch) {
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
    args_.saved = as<S>(p.saved);
    args_.saved_c = as<A>(p.saved_c);
    args_.y = as<S>(p.y), args_.h0 = as<S>(p.h0), args_.c0 = as<S>(p.c0), args_.grad_y = as<S>(grads.y);
    args_.grads = as<S>(out.gates), args_.projected = as<S>(out.projected);
    args_.carry = carry_, args_.dc = dc_;
    args_.grad_h0 = as<S>(grads.h0), args_.grad_c0 = as<S>(grads.c0);
    fill_given<S>(args_, p, Cell::kMasks);
  }

  void prepare(const LayerGrads& grads, Stream stream) const {
    constexpr int kBlocks = 64;
    const BackwardStates<S> states = {
        p.D * p.B * p.P, p.D * p.B * Cell::kCarried * p.H, as<S>(grads.h_n), as<S>(grads.c_n), carry_, dc_, status_};
    launch(prepare_backward<S>, dim3(kBlocks), 0, {}, stream, states);
    if (kPersistent) fill_bytes(args_.grads, 0xff, size_t(p.D * p.T * p.B) * Cell::kGrads * Hp * sizeof(S), stream);
    Whole::pack(transposed_w_hh<S>(p, 0), p.D, K, hidden_, stream);
    if constexpr (kTwoProducts) First::pack(transposed_w_hh<S>(p, Cell::kFirstGates), p.D, second_K, first_, stream);
    if constexpr (kMayProject)
      if (p.projected) Units::pack(transposed_w_hr(), p.D, Pp, units_, stream);
  }

  void run_step(int pass, const Call& call) const {
    const bool has_step = pass < p.T;
    const WeightView<S> hidden = transposed_w_hh<S>(p, 0);
    if constexpr (kTwoProducts) {
      Second::run(hidden, args_, hidden_, K, pass, pass + 1, call);
      if (has_step) First::run(transposed_w_hh<S>(p, Cell::kFirstGates), args_, first_, second_K, pass, pass + 1, call);
    } else if constexpr (kMayProject) {
      if (!p.projected) return Whole::run(hidden, args_, hidden_, K, pass, pass + 1, call);
      Outputs::run(hidden, args_, hidden_, K, pass, pass + 1, call);
      if (has_step || p.T == 0) Units::run(transposed_w_hr(), args_, units_, Pp, pass, pass + 1, call);
    } else if constexpr (!kOneLaunch) {
      Whole::run(hidden, args_, hidden_, K, pass, pass + 1, call);
    }
  }

  const Layer& p;
  Workspace memory_;
  const int H, P, Hp, Pp, K, second_K;
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
      return Pass::Whole::groups(layer.D, int(layer.H), Cell::kFirstGates * int(up_to_8(layer.H)), path.groups, chip);
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

template <class Cell, int variant>
constexpr BackwardKernels backward_kernels_of() {
  using S = StorageOf<variant>;
  return {resident_groups<Cell, S>, measure<Cell, S>, run<Cell, S>};
}

}  // namespace

FASTRNN_DEFINE_LOOKUP(backward_kernels, BackwardKernels)

}  // namespace fastrnn::cuda
