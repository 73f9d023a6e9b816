// A number for the contents of a layer's weights: it tells whether a packed copy is still theirs, also after writes
// that no version counter sees. Every byte is read, at the speed of memory.
#include "kernels.h"
#include "panels.h"
#include "threads.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

typedef uint64_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

constexpr int kChains = 8;                  // independent, to hide the latency of the multiplication
constexpr int64_t kPieceBytes = 128 << 10;  // of one task
constexpr int64_t kMinParallelBytes = 1 << 20;
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15, kOtherOdd = 0xbf58476d1ce4e5b9;

// One to one, so that a difference never gets lost. A multiplication spreads a difference upwards, the shift brings it
// down; the second multiplication keeps what a few high bits become (say, of signs) from being undone by a few high
// bits of the next word.
template <class T>
FASTRNN_INLINE T mixed(T x) {
  x *= kOdd;
  x ^= x >> 32;
  return x * kOtherOdd;
}

uint64_t hash_piece(const char* data, int64_t bytes, uint64_t seed) {
  constexpr int64_t kBlock = kChains * sizeof(Words);
  Words chains[kChains] = {};
  const auto add = [&](const char* block) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) {
      Words words;
      memcpy(&words, block + j * sizeof words, sizeof words);
      chains[j] = mixed(chains[j] ^ words);
    }
  };
  int64_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) add(data + i);
  if (i < bytes) {
    char last[kBlock] = {};
    memcpy(last, data + i, size_t(bytes - i));
    add(last);
  }
  uint64_t hash = seed;
  for (const Words& chain : chains)
    for (size_t lane = 0; lane < sizeof chain / sizeof chain[0]; ++lane) hash = mixed(hash ^ chain[lane]);
  return hash;
}

struct Piece {
  const void* data;
  int64_t bytes;
};

constexpr int kTensors = 12;  // at most

int64_t pieces_of(const Piece& tensor) { return (tensor.bytes + kPieceBytes - 1) / kPieceBytes; }

// The tensors of all directions, in a fixed order.
int tensors_of(const Layer& p, Piece* tensors) {
  constexpr int64_t kSizes[] = {4, 8, 2, 2};  // by DType
  const int64_t gates = p.gates * p.H, recurrent = p.recurrent * p.H, size = kSizes[int(p.dtype)];
  int count = 0;
  for (int d = 0; d < p.D; ++d) {
    const Weights& w = p.weights[d];
    const Piece all[] = {{w.w_ih, gates * p.I * size}, {w.w_hh, recurrent * p.P * size},
                         {w.b_ih, gates * size},       {w.b_hh, recurrent * size},
                         {w.w_hr, p.P * p.H * size},   {w.w_own, p.unit_weights * p.H * size}};
    for (const Piece& tensor : all) tensors[count++] = tensor.data ? tensor : Piece{nullptr, 0};
  }
  return count;
}

}  // namespace

uint64_t fingerprint(const Layer& layer) {
  Piece tensors[kTensors];
  const int count = tensors_of(layer, tensors);
  int64_t tasks = 0, bytes = 0;
  for (int i = 0; i < count; ++i) tasks += pieces_of(tensors[i]), bytes += tensors[i].bytes;
  uint64_t sum = 0;
  const int64_t sizes[] = {layer.cell, int(layer.dtype), layer.I, layer.H, layer.P, layer.D, int(layer.products)};
  for (const int64_t size : sizes) sum = mixed(sum ^ uint64_t(size));
  parallel_for(bytes < kMinParallelBytes ? 1 : layer.threads, int(tasks), [&](int task, int) {
    int64_t piece = task;
    int tensor = 0;
    while (piece >= pieces_of(tensors[tensor])) piece -= pieces_of(tensors[tensor++]);
    const int64_t begin = piece * kPieceBytes;
    const uint64_t hash =
        hash_piece(static_cast<const char*>(tensors[tensor].data) + begin,
                   smaller(kPieceBytes, tensors[tensor].bytes - begin), uint64_t(tensor) << 32 | uint64_t(piece));
    __atomic_fetch_add(&sum, mixed(hash), __ATOMIC_RELAXED);
  });
  return sum;
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
