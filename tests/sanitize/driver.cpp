// Runs the core on many layers, for a sanitizer to watch. Every array is allocated at exactly its size. Besides what
// the sanitizer finds, a layer must write every element of its outputs, and one thread with its scratch full of zeros
// must leave the same bits as several threads with theirs full of NaNs.
//
//   driver --isas    prints the instruction sets that this machine can run
//   driver ROUNDS    runs so many rounds of layers, the same ones each time it is called; not 0 if anything is wrong
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cells.h"
#include "../../csrc/cpu/dispatch.h"

namespace {

using namespace fastrnn;
using Random = std::mt19937;

#ifdef __SANITIZE_THREAD__
constexpr bool kCanFork = false;  // ThreadSanitizer does not support threads in a forked child
#else
constexpr bool kCanFork = true;
#endif

// ---- what is run

// What a layer may have or not have, as bits.
enum Option : uint32_t {
  kH0 = 1 << 0,
  kC0 = 1 << 1,
  kInputBias = 1 << 2,
  kStateBias = 1 << 3,
  kLengths = 1 << 4,
  kResets = 1 << 5,
  kEmptyIsNull = 1 << 6,  // an array without elements is a null pointer; else one to no bytes
  kBackward = 1 << 7,     // forward saves what backward needs, and backward follows
  kGivenY = 1 << 8,
  kGivenHn = 1 << 9,
  kGivenCn = 1 << 10,
  kWantX = 1 << 11,
  kWantH0 = 1 << 12,
  kWantC0 = 1 << 13,
  kWantInputWeight = 1 << 14,
  kWantStateWeight = 1 << 15,
  kWantInputBias = 1 << 16,
  kWantStateBias = 1 << 17,
  kWantProjection = 1 << 18,
  kRecompute = 1 << 19,  // forward saves the states alone
  kPacked = 1 << 20,     // the weights are packed beforehand
  kRounded = 1 << 21,    // float32: products that may round to bfloat16, or without backward...
  kInt8 = 1 << 22,       // ...of int8 or
  kNarrow = 1 << 23,     // ...of weights rounded to bfloat16
  kGivenSteps = 1 << 24,
  kWantSteps = 1 << 25,
  kGivenValues = 1 << 26,
};

struct Sizes {
  int64_t T, B, I, H, P;  // P = 0: no projection
  int D;
};

struct Case {
  int cell;
  DType dtype;
  Sizes sizes;
  int threads;
  uint32_t options, seed;

  bool has(Option option) const { return options & option; }
  const CellInfo& info() const { return cell_info(cell); }
};

const int kCellCount = built_in_cells();
constexpr int kRandomCases = 50;  // of a round

// Layers that are too large to be drawn often, each of which goes another way through the core.
constexpr Sizes kLargeSizes[] = {
    {5, 3, 20, 259, 0, 1},    // few rows and much work per step: a team of threads
    {6, 1, 300, 460, 0, 1},   // the same for a single row
    {1, 1, 600, 481, 0, 1},   // hardly a row: weights that are not packed, read by a team
    {1, 23, 600, 97, 0, 1},   // a step: rows by rows of a weight as it lies, panels packed on the way
    {2, 2, 40, 481, 0, 1},    // the same, with a state to hand on
    {60, 17, 7, 40, 0, 2},    // many rows, shared among threads; several blocks of rows, chunks of steps
    {20, 13, 35, 64, 27, 2},  // a projection, likewise
    {4, 3, 20, 400, 0, 2},    // a team for each direction
    {4, 3, 20, 300, 90, 1}    // a team and a projection
};

int64_t between(Random& random, int64_t least, int64_t most) { return least + random() % (most - least + 1); }

Case random_case(Random& random, int cell) {
  Case c = {};
  c.cell = cell;
  c.dtype = DType(between(random, 0, 3));
  c.sizes.T = between(random, 0, 9), c.sizes.B = between(random, 0, 9), c.sizes.I = between(random, 0, 40);
  c.sizes.H = between(random, 1, 70);
  c.sizes.P = between(random, 0, 2) ? 0 : between(random, 1, 70);
  c.sizes.D = int(between(random, 1, 2));
  c.threads = int(between(random, 1, 6));
  c.options = random();
  if (between(random, 0, 3)) c.options |= kBackward;
  c.seed = random();
  return c;
}

// Makes of a case that cannot be one that can.
void repair(Case& c) {
  if (!c.info().may_project) c.sizes.P = 0;
  if (!cpu::has_kernels(c.cell, kFloat64)) c.dtype = DType::kFloat32, c.options &= ~(kRounded | kInt8 | kNarrow);
}

std::vector<Case> cases_of_round(Random& random) {
  std::vector<Case> cases;
  for (int i = 0; i < kRandomCases; ++i) cases.push_back(random_case(random, i % kCellCount));
  for (const Sizes& sizes : kLargeSizes) {
    for (int cell = 0; cell < kCellCount; ++cell) {
      cases.push_back(random_case(random, cell));
      cases.back().sizes = sizes;
      cases.back().threads = int(between(random, 2, 6));
    }
  }
  for (Case& c : cases) repair(c);
  return cases;
}

// One in four, of every kind: three callers on few cores, whose threads wait for each other, take their time.
std::vector<Case> some_of(const std::vector<Case>& cases) {
  std::vector<Case> some;
  for (size_t i = 0; i < cases.size(); i += 4) some.push_back(cases[i]);
  return some;
}

void describe(const Case& c) {
  const Sizes& n = c.sizes;
  fprintf(stderr, "%s dtype=%d T=%ld B=%ld I=%ld H=%ld P=%ld D=%d threads=%d options=%#x\n", c.info().name.c_str(),
          int(c.dtype), long(n.T), long(n.B), long(n.I), long(n.H), long(n.P), n.D, c.threads, c.options);
}

// ---- its arrays

size_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Cut off, not rounded; below 2^-14, where float16 is no longer normal, 0.
uint16_t to_16_bits(float value, DType dtype) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == DType::kBFloat16) return uint16_t(bits >> 16);
  const uint32_t magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000, least = (127 - 14) << 23;
  return uint16_t(sign | (magnitude < least ? 0 : ((magnitude - least) >> 13) + 0x400));
}

// At most 1/8, so that no sum comes near the largest float16.
void put_random(Random& random, DType dtype, char* to) {
  const double value = (random() / 4294967296.0 - 0.5) / 4;
  const float rounded = float(value);
  const uint16_t narrow = to_16_bits(rounded, dtype);
  const size_t bytes = bytes_of(dtype);
  memcpy(to, bytes == 8 ? (const void*)&value : bytes == 4 ? (const void*)&rounded : &narrow, bytes);
}

// All arrays of a call but its scratch.
class Arrays {
 public:
  explicit Arrays(const Case& c) : case_(c), random_(c.seed) {}

  Random& random() { return random_; }

  template <class T>
  T* allocate(int64_t count) {
    if (count == 0 && case_.has(kEmptyIsNull)) return nullptr;
    arrays_.push_back(std::make_unique<char[]>(size_t(count) * sizeof(T)));
    return reinterpret_cast<T*>(arrays_.back().get());
  }

  void* input(int64_t count) { return input(count, case_.dtype); }

  void* input(int64_t count, DType dtype) {
    const size_t bytes = bytes_of(dtype);
    char* const array = allocate<char>(count * int64_t(bytes));
    for (int64_t i = 0; i < count; ++i) put_random(random_, dtype, array + i * bytes);
    return array;
  }

  void* output(int64_t count) { return output(count, case_.dtype); }

  // Starts as NaNs.
  void* output(int64_t count, DType dtype) {
    const size_t bytes = size_t(count) * bytes_of(dtype);
    char* const array = allocate<char>(int64_t(bytes));
    if (array) memset(array, 0xff, bytes);
    outputs_.push_back({array, bytes, bytes_of(dtype)});
    return array;
  }

  // The bytes of all outputs, one after the other.
  std::string outputs() const {
    std::string all;
    for (const Output& output : outputs_) all.append(output.array, output.bytes);
    return all;
  }

  bool outputs_are_written() const {
    const char nan[] = "\xff\xff\xff\xff\xff\xff\xff\xff";
    for (const Output& output : outputs_)
      for (size_t i = 0; i < output.bytes; i += output.step)
        if (!memcmp(output.array + i, nan, output.step)) return false;
    return true;
  }

 private:
  struct Output {
    const char* array;
    size_t bytes, step;
  };

  const Case& case_;
  Random random_;
  std::vector<std::unique_ptr<char[]>> arrays_;
  std::vector<Output> outputs_;
};

Products products_of(const Case& c) {
  if (c.dtype != DType::kFloat32) return Products::kExact;
  if (!c.has(kBackward) && c.has(kInt8)) return Products::kInt8;
  if (!c.has(kBackward) && c.has(kNarrow)) return Products::kBFloat16Weights;
  return c.has(kRounded) ? Products::kBFloat16 : Products::kExact;
}

Layer make_layer(const Case& c, int threads, Arrays& arrays) {
  const Sizes& n = c.sizes;
  const int64_t P = n.P ? n.P : n.H, gates = c.info().gates * n.H, saved_vectors = c.info().saved + (n.P ? 1 : 0);
  const int64_t recurrent = c.info().recurrent_gates() * n.H, own = c.info().own_rows() * n.H;
  const int64_t carried = c.info().carried * n.H, masks = c.info().masks * n.H;
  Layer layer = {};
  set_cell(layer, c.cell), layer.dtype = c.dtype;
  layer.T = n.T, layer.B = n.B, layer.I = n.I, layer.H = n.H, layer.P = P, layer.D = n.D;
  layer.threads = threads, layer.projected = n.P != 0;
  layer.products = products_of(c);

  layer.x = arrays.input(n.T * n.B * n.I);
  if (c.has(kH0)) layer.h0 = arrays.input(n.D * n.B * P);
  if (c.has(kC0) && carried) layer.c0 = arrays.input(n.D * n.B * carried);
  layer.mask_steps = c.seed % 2 ? n.T : 1;
  if (masks) layer.masks = arrays.input(n.D * layer.mask_steps * n.B * masks);
  for (int d = 0; d < n.D; ++d) {
    Weights& w = layer.weights[d];
    w.w_ih = arrays.input(gates * n.I);
    if (recurrent) w.w_hh = arrays.input(recurrent * P);
    if (own) w.w_own = arrays.input(own);
    if (c.has(kInputBias)) w.b_ih = arrays.input(gates);
    if (c.has(kStateBias) && recurrent) w.b_hh = arrays.input(recurrent);
    if (n.P) w.w_hr = arrays.input(P * n.H);
  }
  if (c.has(kLengths)) {
    int64_t* const lengths = arrays.allocate<int64_t>(n.B);
    for (int64_t b = 0; b < n.B; ++b) lengths[b] = between(arrays.random(), 0, n.T);
    layer.lengths = lengths;
  }
  if (c.has(kResets)) {
    bool* const resets = arrays.allocate<bool>(n.T * n.B);
    for (int64_t i = 0; i < n.T * n.B; ++i) resets[i] = between(arrays.random(), 0, 2) == 0;
    layer.resets = resets;
  }

  layer.y = arrays.output(n.T * n.B * n.D * P), layer.h_n = arrays.output(n.D * n.B * P);
  if (carried) layer.c_n = arrays.output(n.D * n.B * carried);
  if (!c.has(kBackward)) return layer;
  if (!c.has(kRecompute) || c.info().is_normalized())
    layer.saved = arrays.output(n.D * n.T * n.B * saved_vectors * n.H);
  if (carried) layer.saved_c = arrays.output(n.D * n.T * n.B * carried, accumulator_of(c.dtype));
  return layer;
}

LayerGrads make_grads(const Case& c, const Layer& layer, Arrays& arrays) {
  const int64_t rows = layer.T * layer.B, states = layer.D * layer.B, gates = c.info().gates * layer.H;
  const int64_t recurrent = c.info().recurrent_gates() * layer.H, carried = c.info().carried * layer.H;
  LayerGrads grads = {};
  if (c.has(kGivenY)) grads.y = arrays.input(rows * layer.D * layer.P);
  if (c.has(kGivenHn)) grads.h_n = arrays.input(states * layer.P);
  if (c.has(kGivenCn) && carried) grads.c_n = arrays.input(layer.D * layer.B * carried);
  if (c.has(kGivenSteps) && carried) grads.saved_c = arrays.input(layer.D * rows * carried, accumulator_of(c.dtype));
  const int64_t of_steps = layer.D * rows * c.info().grads * layer.H;
  if (c.has(kGivenValues)) grads.values = arrays.input(of_steps);
  if (c.has(kWantSteps)) grads.steps = arrays.output(of_steps);
  if (c.has(kWantX)) grads.x = arrays.output(rows * layer.I);
  if (c.has(kWantH0)) grads.h0 = arrays.output(states * layer.P);
  if (c.has(kWantC0) && carried) grads.c0 = arrays.output(layer.D * layer.B * carried);
  for (int d = 0; d < layer.D; ++d) {
    const Weights& has = layer.weights[d];
    WeightGrads& w = grads.weights[d];
    if (c.has(kWantInputWeight)) w.w_ih = arrays.output(gates * layer.I);
    if (c.has(kWantStateWeight) && has.w_hh) w.w_hh = arrays.output(recurrent * layer.P);
    if (c.has(kWantStateWeight) && has.w_own) w.w_own = arrays.output(c.info().own_rows() * layer.H);
    if (c.has(kWantInputBias) && has.b_ih) w.b_ih = arrays.output(gates);
    if (c.has(kWantStateBias) && has.b_hh) w.b_hh = arrays.output(recurrent);
    if (c.has(kWantProjection) && has.w_hr) w.w_hr = arrays.output(layer.P * layer.H);
  }
  return grads;
}

// Scratch at its exact size and alignment.
class Workspace {
 public:
  Workspace(size_t bytes, int fill) : data_(::operator new(bytes, kAlignment)) { memset(data_, fill, bytes); }
  Workspace(const Workspace&) = delete;
  ~Workspace() { ::operator delete(data_, kAlignment); }

  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* const data_;
};

// ---- running it

std::atomic<int> failures{0};
std::atomic<const Case*> running{nullptr};

void fail(const Case& c, const char* what) {
  ++failures;
  fprintf(stderr, "%s: ", what);
  describe(c);
}

// A sanitizer that is told to abort at an error is asked here which layer it was.
void on_abort(int) {
  if (const Case* c = running) describe(*c);
}

// Forward and, if the case says so, backward. Returns the bytes of all outputs.
std::string run(const Case& c, int threads, int scratch_fill) {
  Arrays arrays(c);
  Layer layer = make_layer(c, threads, arrays);
  const Workspace packed(cpu::packed_size(layer), scratch_fill);
  const std::string fingerprint = std::to_string(cpu::fingerprint(layer));
  if (c.has(kPacked)) {
    cpu::pack(layer, packed.data());
    layer.packed = packed.data();
  }
  cpu::forward(layer, Workspace(cpu::forward_workspace(layer), scratch_fill).data());
  if (c.has(kBackward)) {
    const LayerGrads grads = make_grads(c, layer, arrays);
    cpu::backward(layer, grads, Workspace(cpu::backward_workspace(layer, grads), scratch_fill).data());
  }
  if (!arrays.outputs_are_written()) fail(c, "not written in full");
  return arrays.outputs() + fingerprint;
}

void check(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    running = &c;
    if (run(c, 1, 0) != run(c, c.threads, 0xff)) fail(c, "other bits with more threads");
  }
}

void check_with_three_callers(const std::vector<Case>& cases) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back([&] { check(cases); });
  for (std::thread& caller : callers) caller.join();
}

// The child inherits a pool whose threads it does not have.
void check_in_forked_child(const std::vector<Case>& cases) {
  const pid_t child = fork();
  if (child == 0) {
    check(cases);
    _exit(failures != 0);
  }
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
    ++failures;
    fprintf(stderr, "the forked child failed, status %#x\n", status);
  }
}

void check_peak_flops() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    if (cpu::peak_flops(dtype, 2) > 0) continue;
    ++failures;
    fprintf(stderr, "peak_flops is not positive\n");
  }
}

int run_rounds(int rounds) {
  signal(SIGABRT, on_abort);
  Random random(1);
  size_t alone = 0;
  for (int i = 0; i < rounds; ++i) {
    const std::vector<Case> cases = cases_of_round(random);
    check(cases);
    alone += cases.size();
  }
  const std::vector<Case> cases = some_of(cases_of_round(random));
  check_with_three_callers(cases);
  const size_t forked = kCanFork ? cases.size() : 0;
  if (kCanFork) check_in_forked_child(cases);
  check_peak_flops();
  printf("%s: %zu layers alone, %zu by each of three callers at once, %zu in a forked child: %d failures\n",
         cpu::isa_in_use().c_str(), alone, cases.size(), forked, failures.load());
  return failures != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s --isas | ROUNDS\n", argv[0]);
    return 2;
  }
  if (strcmp(argv[1], "--isas") != 0) return run_rounds(atoi(argv[1]));
  for (const std::string& isa : cpu::available_isas()) puts(isa.c_str());
  return 0;
}
