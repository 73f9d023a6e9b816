// What is left of a chunk once its gate gradients are there: dx = dG W_ih, dW += dG^T [x or h or operand], and the sums
// of the gate gradients for the biases, with all rows of the chunk at once.
#pragma once

#include "backward_plan.h"
#include "states.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// What the rows of a chunk add to the gradients of x and of the weights. A task has its own part of one output.
template <class S, class E>
class LargeProducts {
 public:
  using Plan = BackwardPlan<S, E>;
  using T = Accumulator<S>;
  static constexpr int64_t width = kPlain * kLanes<T>;
  static constexpr int64_t kVectors = 4;  // of a sum over rows: one alone would wait for each of its additions

  LargeProducts(const Plan& plan, Chunk chunk)
      : p(plan.p),
        cell(plan.cell),
        plan(plan),
        chunk(chunk),
        rows(chunk.rows(p)),
        splits(plan.tasks.threads()),
        column_splits(plan.packs_on_the_way() ? splits : 1) {}

  // Two rounds, the second for the reverse direction's part of dx, which may be of the same rows as the forward one's.
  int tasks(int round) const {
    const int inputs = int(plan.out.x ? (rows + plan.row_block() - 1) / plan.row_block() * column_splits : 0);
    return round == 0 ? weight_tasks() + inputs : p.D == 2 ? inputs : 0;
  }

  void run(int round, int task, typename Plan::Scratch own) const {
    if (round == 1) return input_grads(1, task, own);
    if (task >= weight_tasks()) return input_grads(0, task - weight_tasks(), own);
    const int d = task / splits % p.D, part = task % splits;
    switch (task / splits / p.D) {
      case 0:
        return w_ih_grads(d, part, own);
      case 1:
        return w_hh_grads(d, part, own);
      case 2:
        return w_second_grads(d, part, own);
      case 3:
        return w_hr_grads(d, part, own);
      case 4:
        return w_own_grads(d, part, own);
      case 5:
        return gain_grads(d, part);
      default:
        return put_steps(d, part);
    }
  }

 private:
  // One weight matrix, or rows of it: grad[m, :] = sum over k of a[k, column(m)] * row(k), and the sum of a itself for
  // a bias.
  struct Target {
    T *sum, *bias_sum;
    S *grad, *bias;
    int64_t begin, end, N;  // rows [begin, end) of [., N]
  };

  int weight_tasks() const {
    return (plan.out.steps && !plan.gates_are_steps() ? 7 : cell.gains ? 6 : cell.unit_weights ? 5 : 4) * splits * p.D;
  }

  // The gradients of the products and the sums of their rows; `grads` as they lie in the cell's own vectors. Those of
  // normalized products are others than those of what the biases are added to.
  template <class Row>
  void products_grads(int d, Target target, const int* grads, int first, typename Plan::Scratch own, Row row) const {
    static constexpr int kInOrder[4] = {0, 1, 2, 3};
    const E* const from = plan.gates(d, chunk);
    if (!cell.gains) return sum_outer_products(d, target, from, plan.Gp, p.H, grads, own, row);
    Target biases = target;
    biases.sum = nullptr, target.bias_sum = nullptr;
    sum_outer_products(d, biases, from, plan.Gp, p.H, grads, own, row);
    sum_outer_products(d, target, from + (cell.grads + first) * p.H, plan.Gp, p.H, kInOrder, own, row);
  }

  Target part_of(int64_t begin, int64_t end, int part, int64_t N, T* sum, T* bias_sum, void* grad, void* bias) const {
    const int64_t count = end - begin;
    return {sum, bias_sum, as<S>(grad), as<S>(bias), begin + count * part / splits, begin + count * (part + 1) / splits,
            N};
  }

  void w_ih_grads(int d, int part, typename Plan::Scratch own) const {
    const auto& from = plan.directions[d];
    const WeightGrads& to = plan.out.weights[d];
    const Target target = part_of(0, cell.gates * p.H, part, p.I, from.sum_w_ih, from.sum_b_ih, to.w_ih, to.b_ih);
    products_grads(d, target, cell.input_grad, 0, own,
                   [&](int64_t t, int64_t b) { return as<S>(p.x) + (t * p.B + b) * p.I; });
  }

  void w_hh_grads(int d, int part, typename Plan::Scratch own) const {
    if (!cell.first_gates) return;
    const auto& from = plan.directions[d];
    const WeightGrads& to = plan.out.weights[d];
    const Target target = part_of(0, cell.first_gates * p.H, part, p.P, from.sum_w_hh, from.sum_b_hh, to.w_hh, to.b_hh);
    products_grads(d, target, cell.recurrent_grad, cell.gates, own,
                   [&](int64_t t, int64_t b) { return previous_h<S>(p, d, t, b); });
  }

  void w_second_grads(int d, int part, typename Plan::Scratch own) const {
    if (!cell.second_gates) return;
    const auto& from = plan.directions[d];
    const WeightGrads& to = plan.out.weights[d];
    const Target target = part_of(cell.first_gates * p.H, cell.recurrent_gates() * p.H, part, p.P, from.sum_w_hh,
                                  from.sum_b_hh, to.w_hh, to.b_hh);
    sum_outer_products(
        d, target, plan.gates(d, chunk), plan.Gp, p.H, cell.recurrent_grad, own,
        [&](int64_t t, int64_t b) { return plan.saved(d, chunk, t * p.B + b) + cell.saved_operand * p.H; });
  }

  void w_hr_grads(int d, int part, typename Plan::Scratch own) const {
    if (!plan.has_projection()) return;
    const auto& from = plan.directions[d];
    const Target target = part_of(0, p.P, part, p.H, from.sum_w_hr, nullptr, plan.out.weights[d].w_hr, nullptr);
    static constexpr int kOneBlock[1] = {0};
    sum_outer_products(d, target, from.projected, p.P, p.P, kOneBlock, own,
                       [&](int64_t t, int64_t b) { return plan.saved(d, chunk, t * p.B + b) + cell.saved * p.H; });
  }

  // The gradient of a unit weight is, like a bias's, a sum of vectors over all rows.
  void w_own_grads(int d, int part, typename Plan::Scratch own) const {
    if (!cell.unit_weights) return;
    const auto& from = plan.directions[d];
    const Target target =
        part_of(0, cell.unit_weights * p.H, part, 0, nullptr, from.sum_w_own, nullptr, plan.out.weights[d].w_own);
    sum_outer_products(d, target, plan.gates(d, chunk), plan.Gp, p.H, cell.unit_grad, own,
                       [](int64_t, int64_t) -> const S* { return nullptr; });
  }

  // The gradient of a gain sums the gradients of what it is multiplied with, times the normalized products.
  void gain_grads(int d, int part) const {
    const auto& from = plan.directions[d];
    if (!cell.gains || !from.sum_w_own) return;
    const int64_t first = cell.unit_weights * p.H;
    const Target to =
        part_of(first, cell.own_rows() * p.H, part, 0, nullptr, from.sum_w_own, nullptr, plan.out.weights[d].w_own);
    constexpr int64_t L = kLanes<T>;
    if (chunk.end == p.T) memset(to.bias_sum + to.begin, 0, size_t(to.end - to.begin) * sizeof(T));
    for (int64_t m = to.begin, count; m < to.end; m += count) {
      const int64_t gate = (m - first) / p.H, u = (m - first) % p.H;
      count = smaller(smaller(kVectors * L, to.end - m), p.H - u);
      add_gain_grads(to.bias_sum + m, d, int(gate), u, count);
    }
    if (!Plan::kStoresDirectly && chunk.begin == 0) round_target(to);
  }

  // Of `count` units from u on, at most kVectors vectors.
  void add_gain_grads(T* sum, int d, int gate, int64_t u, int64_t count) const {
    constexpr int64_t L = kLanes<T>;
    const auto& from = plan.directions[d];
    const bool is_input = gate < cell.gates;
    const int place = is_input ? cell.input_grad[gate] : cell.recurrent_grad[gate - cell.gates];
    const int own_saved = cell.saved - cell.gains;
    Vec<T> total[kVectors];
    for (int64_t v = 0; v * L < count; ++v) total[v] = load(sum + v * L, count - v * L);
    for (int64_t row = 0; row < rows; ++row) {
      const S* const raw = plan.saved(d, chunk, chunk.first_row(p, d) + row) + (own_saved + gate) * p.H + u;
      const E* const grad = plan.gates(d, chunk) + row * plan.Gp + place * p.H + u;
      const Norm<T> norm = from.norms[row * cell.gains + gate];
      const auto add = [&](int64_t v, int64_t n) {
        total[v] = fma(load(grad + v * L, n), norm(load(raw + v * L, n)), total[v]);
      };
      if (count == kVectors * L) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) add(v, L);
      } else {
        for (int64_t v = 0; v * L < count; ++v) add(v, count - v * L);
      }
    }
    for (int64_t v = 0; v * L < count; ++v) store(sum + v * L, total[v], count - v * L);
  }

  // The gate gradients themselves.
  void put_steps(int d, int part) const {
    const int64_t size = cell.grads * p.H, end = rows * (part + 1) / splits;
    S* const to = as<S>(plan.out.steps) + (d * p.T * p.B + chunk.first_row(p, d)) * size;
    for (int64_t row = rows * part / splits; row < end; ++row)
      convert(to + row * size, plan.gates(d, chunk) + row * plan.Gp, size);
  }

  // Row m of the target belongs to gate m / block, whose gradient is block `blocks[gate]` of a's columns. row(t, b) is
  // asked of active rows alone.
  template <class Row>
  void sum_outer_products(int d, const Target& to, const E* a, int64_t lda, int64_t block, const int* blocks,
                          typename Plan::Scratch own, Row row) const {
    if (!to.sum && !to.bias_sum) return;
    int64_t t = chunk.first_time(p, d), b = 0;
    const auto next_row = [&](int64_t) {
      const S* const found = row_is_active(p, t, b) ? row(t, b) : nullptr;
      if (++b == p.B) b = 0, ++t;
      return found;
    };
    const bool is_first = chunk.end == p.T, is_last = chunk.begin == 0;
    if (rows == 0 && to.sum) memset(to.sum + to.begin * to.N, 0, size_t((to.end - to.begin) * to.N) * sizeof(T));
    if (is_first && to.bias_sum) memset(to.bias_sum + to.begin, 0, size_t(to.end - to.begin) * sizeof(T));
    for (int64_t k = 0; k < rows; k += kBlockK) {
      const int64_t depth = smaller(kBlockK, rows - k);
      if (to.sum) pack_rows(own.b, depth, to.N, next_row);
      int64_t count;
      for (int64_t m = to.begin; m < to.end; m += count) {
        count = smaller(smaller(kBlockM, to.end - m), block - m % block);
        const E* columns = a + k * lda + (blocks ? blocks[m / block] * block : 0) + m % block;
        if (to.bias_sum) add_rows(to.bias_sum + m, columns, lda, depth, count);
        if (to.sum) multiply_add(columns, lda, depth, count, to.N, own, is_first && k == 0, to.sum + m * to.N);
      }
    }
    if (!Plan::kStoresDirectly && is_last) round_target(to);
  }

  // columns [depth, count] as the left operand of a product, where several panels read them: as they are, next to each
  // other; in pairs, as rows [count, depth].
  static Operand<E> copy_columns(E* to, const E* columns, int64_t lda, int64_t depth, int64_t count) {
    constexpr int64_t L = kLanes<T>;
    if constexpr (kInPairs<E>) {
      const int64_t pitch = round_up(depth, 2 * L);
      for (int64_t k = 0; k < depth; k += 2 * L)
        for (int64_t j = 0; j < count; j += L)
          transpose_pairs(columns + k * lda + j, lda, smaller(2 * L, depth - k), smaller(L, count - j),
                          to + j * pitch + k, pitch);
      return rows_of(to, pitch);
    } else {
      const int64_t pitch = round_up(count, L);
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < count; j += L) store(to + k * pitch + j, load(columns + k * lda + j, count - j));
      return {to, 1, pitch};
    }
  }

  static void add_rows(T* sum, const E* rows, int64_t lda, int64_t depth, int64_t count) {
    constexpr int64_t L = kLanes<T>;
    for (int64_t j = 0; j < count; j += kVectors * L) {
      const int64_t here = smaller(kVectors * L, count - j);
      Vec<T> total[kVectors];
      for (int64_t v = 0; v * L < here; ++v) total[v] = load(sum + j + v * L, here - v * L);
      if (here == kVectors * L) {
        for (int64_t i = 0; i < depth; ++i)
#pragma GCC unroll 4
          for (int64_t v = 0; v < kVectors; ++v) total[v] = total[v] + load(rows + i * lda + j + v * L);
      } else {
        for (int64_t i = 0; i < depth; ++i)
          for (int64_t v = 0; v * L < here; ++v) total[v] = total[v] + load(rows + i * lda + j + v * L, here - v * L);
      }
      for (int64_t v = 0; v * L < here; ++v) store(sum + j + v * L, total[v], here - v * L);
    }
  }

  static Operand<E> left_operand(const E* columns, int64_t lda, int64_t depth, int64_t M, int64_t N,
                                 typename Plan::Scratch own) {
    if constexpr (!kInPairs<E>)
      if (N <= 2 * width) return {columns, 1, lda};
    return copy_columns(own.a, columns, lda, depth, M);
  }

  // c [M, N] += columns^T [M, depth] * own.b [depth, N], where `is_first` to zero.
  static void multiply_add(const E* columns, int64_t lda, int64_t depth, int64_t M, int64_t N,
                           typename Plan::Scratch own, bool is_first, T* c) {
    const Operand<E> left = left_operand(columns, lda, depth, M, N, own);
    for (int64_t n = 0; n < N; n += width)
      gemm_panels(M, smaller(width, N - n), 1, 0, depth, left, own.b + n * round_up(depth, kGroup<E>),
                  Init<T>{is_first ? nullptr : c + n, N}, c + n, N);
  }

  static void round_target(const Target& to) {
    if (to.sum) convert(to.grad + to.begin * to.N, to.sum + to.begin * to.N, (to.end - to.begin) * to.N);
    if (to.bias_sum) convert(to.bias + to.begin, to.bias_sum + to.begin, to.end - to.begin);
  }

  // dx from one direction, for a block of the chunk's rows and some of the columns.
  void input_grads(int d, int task, typename Plan::Scratch own) const {
    const int64_t m = task / column_splits * plan.row_block(), count = smaller(plan.row_block(), rows - m);
    int64_t from, to;
    Share{task % column_splits, column_splits}.part(p.I, width, &from, &to);
    const int64_t at = (chunk.first_row(p, d) + m) * p.I + from, depth = cell.gates * p.H;
    const bool rounds = !Plan::kStoresDirectly && !plan.sum_x;
    T* dx = plan.sum_x ? plan.sum_x + at : rounds ? own.dx : as<T>(plan.out.x) + at;
    const E* const gates = plan.gates(d, chunk) + m * plan.Gp + plan.input_vectors_at() * p.H;
    const Operand<E> grads = rows_of(gates, plan.Gp);
    const Init<T> init{plan.sum_x ? dx : nullptr, p.I};
    if (plan.packs_on_the_way()) {
      gemm_of_rows(
          count, to - from, depth, grads, [&](int64_t k) { return plan.w_ih_row(d, k) + from; }, own.panel, init, dx,
          p.I);
    } else {
      gemm(count, p.I, depth, grads, plan.directions[d].w_ih, init, dx, p.I);
    }
    for (int64_t r = 0; rounds && r < count; ++r) convert(as<S>(plan.out.x) + at + r * p.I, dx + r * p.I, to - from);
  }

  const Layer& p;
  const CellSizes& cell;
  const Plan& plan;
  const Chunk chunk;
  const int64_t rows;
  const int splits, column_splits;  // of weight gradients; of dx
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
