// What is the same for all cells: the chip, and the h before each step.
#include "driver.h"
#include "recurrence.h"

namespace fastrnn::cuda {
namespace {

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

Chip current_chip() { return chip_of_current_device(); }

void previous_h(const Layer& layer, int d, void* to, Stream stream) {
  static constexpr void (*kByType[])(const Layer&, int, void*, Stream) = {gather<float>, gather<double>,
                                                                          gather<BFloat16>, gather<Float16>};
  kByType[int(layer.dtype)](layer, d, to, stream);
}

}  // namespace fastrnn::cuda
