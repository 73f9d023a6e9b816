// The driver of the forward recurrence.
#include "../cells/generated.h"
#include "driver.h"
#include "forward.h"
#include "recurrence.h"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, int I>
class Forward {
 public:
  using A = Accumulator<S>;
  static constexpr const auto& kShapes = ShapesOf<S>::kForward;
  static constexpr bool kPersistent = kShapes[I].slices > 0, kTwoProducts = Cell::kSecondGates > 0,
                        kMayProject = Cell::kCarried > 0 && !kPersistent;

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
    biases_ = memory_.take<A>(p.D * 2 * Cell::kGates * p.H);
    h_init_ = memory_.take<S>(rows * Pp);
    if (Cell::kCarried) c_ = memory_.take<A>(rows * H);
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
    if constexpr (kPersistent) {
      Whole::run(w_hh(0, Cell::kGates), args_, whole_, Pp, 0, int(p.T), call);
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

  // `gates` gates of w_hh [G*H, P] from gate `first` on.
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
      First::pack(w_hh(0, kFirstGates<Cell>), p.D, Pp, first_, stream);
      Second::pack(w_hh(kFirstGates<Cell>, Cell::kSecondGates), p.D, Hp, second_, stream);
    } else {
      Whole::pack(w_hh(0, Cell::kGates), p.D, Pp, whole_, stream);
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
    args_.projection_direction = projection.direction, args_.projection_row = projection.row;
    args_.biases = biases_, args_.h_init = h_init_;
    args_.hidden = hidden_ ? hidden_ : as<S>(p.y);
    args_.hidden_direction = hidden_ ? p.T * p.B * Pp : P, args_.hidden_row = hidden_ ? Pp : p.D * p.P;
    args_.y = hidden_ ? as<S>(p.y) : nullptr;
    args_.keeps_saved = p.saved;
    args_.saved = p.saved ? as<S>(p.saved) : step_saved_;
    args_.saved_row = V * H, args_.saved_time = p.saved ? p.B * V * H : 0;
    args_.saved_direction = (p.saved ? p.T : 1) * p.B * V * H;
    args_.saved_c = as<A>(p.saved_c), args_.operand = operand_;
    args_.h_n = as<S>(p.h_n), args_.c = c_, args_.c_n = as<S>(p.c_n);
  }

  void prepare(Stream stream) const {
    ForwardStates<S> states = {p.D,          int(p.B), H,  P,       Pp,           Cell::kGates, as<S>(p.h0),
                               as<S>(p.c0),  {},       {}, h_init_, as<S>(p.h_n), c_,           biases_,
                               as<S>(p.c_n), status_};
    for (int d = 0; d < p.D; ++d) states.b_ih[d] = as<S>(p.weights[d].b_ih), states.b_hh[d] = as<S>(p.weights[d].b_hh);
    constexpr int kBlocks = 64;
    launch(prepare_forward<S>, dim3(kBlocks), 0, {}, stream, states);
    if (kPersistent)
      fill_bytes(args_.hidden, 0xff, size_t(p.T * p.B * p.D) * size_t(hidden_ ? Pp : P) * sizeof(S), stream);
    pack(stream);
  }

  void run_step(int pass, const Call& call) const {
    if constexpr (kTwoProducts) {
      First::run(w_hh(0, kFirstGates<Cell>), args_, first_, Pp, pass, pass + 1, call);
      Second::run(w_hh(kFirstGates<Cell>, Cell::kSecondGates), args_, second_, Hp, pass, pass + 1, call);
    } else if constexpr (!kPersistent) {
      Whole::run(w_hh(0, Cell::kGates), args_, whole_, Pp, pass, pass + 1, call);
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
  return with_tile<Cell, Cell::kGates, ShapesOf<S>::kForward>(path.tile, [&](auto tile) {
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
  return with_tile<Cell, Cell::kGates, ShapesOf<S>::kForward>(
      path.tile, [&](auto tile) { return Forward<Cell, S, decltype(tile)::value>(layer, {}, nullptr).bytes(); });
}

template <class Cell, class S>
void run(const Layer& layer, const Path& path, const Projection& projection, void* workspace, const Multiply& multiply,
         Stream stream) {
  with_tile<Cell, Cell::kGates, ShapesOf<S>::kForward>(path.tile, [&](auto tile) {
    Forward<Cell, S, decltype(tile)::value>(layer, projection, workspace).run(path.groups, multiply, stream);
  });
}

}  // namespace

bool may_project_into_saved(const Layer& layer) {
  static constexpr bool kByCell[] = {
#define FASTRNN_IN_SAVED(name, Cell) Cell::kSecondGates == 0 && Cell::kSaved >= Cell::kGates,
      FASTRNN_CELLS(FASTRNN_IN_SAVED, FASTRNN_NOT_HERE)
#undef FASTRNN_IN_SAVED
  };
  return layer.saved && kByCell[layer.cell];
}

bool has_kernels(const Layer& layer) {
#define FASTRNN_COUNT(name, Cell) +1
  return layer.cell < 0 FASTRNN_CELLS(FASTRNN_COUNT, FASTRNN_NOT_HERE);
#undef FASTRNN_COUNT
}

Chip current_chip() { return chip_of_current_device(); }

Path forward_path(const Layer& layer) {
#define FASTRNN_GROUPS(name, Cell)                                                               \
  {resident_groups<Cell, float>, resident_groups<Cell, double>, resident_groups<Cell, BFloat16>, \
   resident_groups<Cell, Float16>, resident_groups<Cell, TFloat32>},
  static constexpr int (*kByCell[][5])(const Layer&, const Path&) = {FASTRNN_CELLS(FASTRNN_GROUPS, FASTRNN_NOT_HERE)};
  const Chip chip = chip_of_current_device();
  const Path path = choose(layer, Pass::kForward, chip);
  return limit_groups(layer, Pass::kForward, chip, path, kByCell[layer.cell][storage_index(layer)](layer, path));
}

size_t forward_workspace(const Layer& layer, const Path& path) {
#define FASTRNN_MEASURE(name, Cell)                                                              \
  {measure<Cell, float>, measure<Cell, double>, measure<Cell, BFloat16>, measure<Cell, Float16>, \
   measure<Cell, TFloat32>},
  static constexpr size_t (*kByCell[][5])(const Layer&,
                                          const Path&) = {FASTRNN_CELLS(FASTRNN_MEASURE, FASTRNN_NOT_HERE)};
  return kByCell[layer.cell][storage_index(layer)](layer, path);
}

void forward(const Layer& layer, const Path& path, const Projection& projection, void* workspace,
             const Multiply& multiply, Stream stream) {
#define FASTRNN_RUN(name, Cell) \
  {run<Cell, float>, run<Cell, double>, run<Cell, BFloat16>, run<Cell, Float16>, run<Cell, TFloat32>},
  static constexpr void (*kByCell[][5])(const Layer&, const Path&, const Projection&, void*, const Multiply&,
                                        Stream) = {FASTRNN_CELLS(FASTRNN_RUN, FASTRNN_NOT_HERE)};
  kByCell[layer.cell][storage_index(layer)](layer, path, projection, workspace, multiply, stream);
}

}  // namespace fastrnn::cuda
