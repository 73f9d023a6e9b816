// The driver of the forward recurrence.
#include "driver.h"
#include "forward.h"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, int I>
class Forward {
 public:
  using A = Accumulator<S>;
  static constexpr const auto& kShapes = ShapesOf<S>::kForward;
  static constexpr bool kPersistent = kShapes[I].slices > 0, kOneLaunch = kPersistent || kShapes[I].scan,
                        kTwoProducts = Cell::kSecondGates > 0,
                        kMayProject = Cell::kCarried > 0 && !kTwoProducts && !kOneLaunch;
  static constexpr int kRecurrent = Cell::kFirstGates + Cell::kSecondGates;

  template <class Tile>
  using WholeStep = ForwardStep<Cell, S, ForwardPhase::kWhole, Tile>;
  template <class Tile>
  using FirstStep = ForwardStep<Cell, S, ForwardPhase::kFirst, Tile>;
  template <class Tile>
  using SecondStep = ForwardStep<Cell, S, ForwardPhase::kSecond, Tile>;
  template <class Tile>
  using ProjectStep = ForwardStep<Cell, S, ForwardPhase::kProject, Tile>;
  using Whole = Kernel<WholeStep, S, kShapes, I>;
  using First = Kernel<FirstStep, S, kShapes, I>;
  using Second = Kernel<SecondStep, S, kShapes, I>;
  using Project = Kernel<ProjectStep, S, kShapes, I>;

  // From a null workspace it only measures.
  Forward(const Layer& layer, const Projection& projection, void* workspace)
      : p(layer), memory_(workspace), H(int(layer.H)), P(int(layer.P)), Hp(up_to_8(H)), Pp(up_to_8(P)) {
    const int64_t rows = p.D * p.B;
    status_ = memory_.take<uint32_t>(1);
    biases_ = memory_.take<A>(p.D * (Cell::kGates + kRecurrent) * p.H);
    h_init_ = memory_.take<S>(rows * Pp);
    if (Cell::kCarried) c_ = memory_.take<A>(rows * Cell::kCarried * H);
    // y serves if its rows can be read 16 bytes at a time.
    if (Pp != P) hidden_ = memory_.take<S>(p.T * rows * Pp);
    if (kTwoProducts || p.projected) operand_ = memory_.take<S>(rows * Hp);
    if (kTwoProducts && !p.saved) step_saved_ = memory_.take<S>(rows * Cell::kSaved * H);
    take_scratch();
    fill(projection);
  }

  size_t bytes() const { return memory_.used(); }

  void run(int groups, const Multiply& multiply, Stream stream) const {
    prepare(stream);
    const Call call = {groups, status_, multiply, stream};
    if constexpr (kOneLaunch) {
      Whole::run(w_hh(0, kRecurrent), args_, whole_, Pp, 0, int(p.T), call);
    } else {
      for (int pass = 0; pass < p.T; ++pass) run_step(pass, call);
    }
  }

 private:
  static WeightView<S> view_of(const Weights* weights, const void* Weights::* matrix, int D, int64_t first) {
    WeightView<S> view = {};
    for (int d = 0; d < D; ++d) view.weights[d] = as<S>(weights[d].*matrix) + first;
    view.k_stride = 1;
    return view;
  }

  // `gates` gates of w_hh [R*H, P] from gate `first` on.
  WeightView<S> w_hh(int first, int gates) const {
    WeightView<S> view = view_of(p.weights, &Weights::w_hh, p.D, first * p.H * p.P);
    view.units = H, view.gates = gates, view.gate_stride = p.H * p.P, view.unit_stride = P;
    view.depth = P, view.pitch = Pp;
    return view;
  }
  WeightView<S> w_hr() const {
    WeightView<S> view = view_of(p.weights, &Weights::w_hr, p.D, 0);
    view.units = P, view.gates = 1, view.unit_stride = H;
    view.depth = H, view.pitch = Hp;
    return view;
  }

  void take_scratch() {
    if constexpr (kTwoProducts) {
      first_ = memory_.take<S>(First::scratch_size(p.D, p.B, H, Pp));
      second_ = memory_.take<S>(Second::scratch_size(p.D, p.B, H, Hp));
    } else {
      whole_ = memory_.take<S>(Whole::scratch_size(p.D, p.B, H, Pp));
    }
    if constexpr (kMayProject) {
      if (p.projected) project_ = memory_.take<S>(Project::scratch_size(p.D, p.B, P, Hp));
    }
  }

  void pack(Stream stream) const {
    if constexpr (kTwoProducts) {
      First::pack(w_hh(0, Cell::kFirstGates), p.D, Pp, first_, stream);
      Second::pack(w_hh(Cell::kFirstGates, Cell::kSecondGates), p.D, Hp, second_, stream);
    } else {
      Whole::pack(w_hh(0, Cell::kFirstGates), p.D, Pp, whole_, stream);
    }
    if constexpr (kMayProject) {
      if (p.projected) Project::pack(w_hr(), p.D, Hp, project_, stream);
    }
  }

  void fill(const Projection& projection) {
    const int64_t V = Cell::kSaved + p.projected;
    args_.rows = rows_of(p);
    args_.D = p.D, args_.H = H, args_.P = P, args_.Hp = Hp, args_.Pp = Pp, args_.projected = p.projected;
    args_.projection = as<S>(projection.data);
    args_.projection_direction = projection.direction, args_.projection_row = uint32_t(projection.row);
    args_.biases = biases_, args_.h_init = h_init_;
    args_.hidden = hidden_ ? hidden_ : as<S>(p.y);
    args_.hidden_direction = hidden_ ? p.T * p.B * Pp : P, args_.hidden_row = uint32_t(hidden_ ? Pp : p.D * p.P);
    args_.y = as<S>(p.y), args_.separate_y = hidden_ != nullptr;
    args_.keeps_saved = p.saved;
    args_.saved = p.saved ? as<S>(p.saved) : step_saved_;
    args_.saved_row = uint32_t(V * H);
    args_.saved_direction = (p.saved ? p.T : 1) * p.B * V * H;
    args_.saved_c = as<A>(p.saved_c), args_.operand = operand_;
    args_.h_n = as<S>(p.h_n), args_.c = c_, args_.c_n = as<S>(p.c_n);
    fill_given<S>(args_, p, Cell::kMasks);
  }

  void prepare(Stream stream) const {
    ForwardStates<S> states = {};
    states.D = p.D, states.B = int(p.B), states.H = H, states.P = P, states.Pp = Pp;
    states.carried = Cell::kCarried, states.gates = Cell::kGates, states.recurrent = kRecurrent;
    states.h0 = as<S>(p.h0), states.c0 = as<S>(p.c0), states.h_init = h_init_, states.h_n = as<S>(p.h_n);
    states.c = c_, states.biases = biases_, states.c_n = as<S>(p.c_n), states.status = status_;
    for (int d = 0; d < p.D; ++d) states.b_ih[d] = as<S>(p.weights[d].b_ih), states.b_hh[d] = as<S>(p.weights[d].b_hh);
    constexpr int kBlocks = 64;
    launch(prepare_forward<S>, dim3(kBlocks), 0, {}, stream, states);
    if (kPersistent)
      fill_bytes(args_.hidden, 0xff, size_t(p.T * p.B * p.D) * size_t(hidden_ ? Pp : P) * sizeof(S), stream);
    pack(stream);
  }

  void run_step(int pass, const Call& call) const {
    if constexpr (kTwoProducts) {
      First::run(w_hh(0, Cell::kFirstGates), args_, first_, Pp, pass, pass + 1, call);
      Second::run(w_hh(Cell::kFirstGates, Cell::kSecondGates), args_, second_, Hp, pass, pass + 1, call);
    } else if constexpr (!kOneLaunch) {
      Whole::run(w_hh(0, Cell::kFirstGates), args_, whole_, Pp, pass, pass + 1, call);
      if constexpr (kMayProject) {
        if (p.projected) Project::run(w_hr(), args_, project_, Hp, pass, pass + 1, call);
      }
    }
  }

  const Layer& p;
  Workspace memory_;
  const int H, P, Hp, Pp;
  uint32_t* status_;
  A *biases_, *c_ = nullptr;
  S *h_init_, *hidden_ = nullptr, *operand_ = nullptr, *step_saved_ = nullptr;
  S *whole_ = nullptr, *first_ = nullptr, *second_ = nullptr, *project_ = nullptr;  // scratch of each product
  ForwardArgs<S> args_ = {};
};

template <class Cell, class S>
int resident_groups(const Layer& layer, const Path& path) {
  const Chip chip = chip_of_current_device();
  return with_tile<Cell, Cell::kFirstGates, ShapesOf<S>::kForward>(path.tile, [&](auto tile) {
    using Pass = Forward<Cell, S, decltype(tile)::value>;
    if constexpr (Pass::kPersistent) {
      return Pass::Whole::groups(layer.D, int(layer.H), int(up_to_8(layer.P)), path.groups, chip);
    } else {
      return path.groups;
    }
  });
}

template <class Cell, class S>
size_t measure(const Layer& layer, const Path& path) {
  return with_tile<Cell, Cell::kFirstGates, ShapesOf<S>::kForward>(
      path.tile, [&](auto tile) { return Forward<Cell, S, decltype(tile)::value>(layer, {}, nullptr).bytes(); });
}

template <class Cell, class S>
void run(const Layer& layer, const Path& path, const Projection& projection, void* workspace, const Multiply& multiply,
         Stream stream) {
  with_tile<Cell, Cell::kFirstGates, ShapesOf<S>::kForward>(path.tile, [&](auto tile) {
    Forward<Cell, S, decltype(tile)::value>(layer, projection, workspace).run(path.groups, multiply, stream);
  });
}

template <class Cell, int variant>
constexpr ForwardKernels forward_kernels_of() {
  using S = StorageOf<variant>;
  return {resident_groups<Cell, S>, measure<Cell, S>, run<Cell, S>};
}

}  // namespace

FASTRNN_DEFINE_LOOKUP(forward_kernels, ForwardKernels)

}  // namespace fastrnn::cuda
