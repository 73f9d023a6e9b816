#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../added_kernels.h"
#include "kernels.h"

namespace fastrnn::cpu {
namespace {

// Whether numbers rounded to bfloat16 are multiplied as they are, and by what.
enum class BFloat16Products { kNone, kVectors, kMatrixUnit };

struct Kernels {
  const char* name;
  bool (*runs_here)();
  ForwardKernels (*forward)(int cell, int variant);
  BackwardKernels (*backward)(int cell, int variant);
  uint64_t (*fingerprint)(const Layer&);
  double (*multiply_add_rate)(DType, int);
  Int8Tile (*int8_tile)(int, int, int);
  BFloat16Products bfloat16_products;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

Int8Tile int8_tile_avx2(int vectors, int rows, int panels) {
  static const bool has_instruction = __builtin_cpu_supports("avxvnni");
  return (has_instruction ? avxvnni::int8_tile : avx2::int8_tile)(vectors, rows, panels);
}

Int8Tile int8_tile_avx512(int vectors, int rows, int panels) {
  static const bool has_instruction = __builtin_cpu_supports("avx512vnni");
  return (has_instruction ? avx512vnni::int8_tile : avx512::int8_tile)(vectors, rows, panels);
}

// Whether this processor has the unit and lets this process use it: Linux keeps its registers for those that have
// asked.
bool has_matrix_unit() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// The instruction that multiplies bfloat16 numbers takes twice the time of float32 ones on Intel's processors: it is of
// use on AMD's, and where the matrix unit stands in for it.
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && (__builtin_cpu_is("amd") || has_matrix_unit());
}

// Those of avx512bf16, or where it has none of its own, of avx512.
ForwardKernels forward_kernels_avx512bf16(int cell, int variant) {
  const ForwardKernels own = avx512bf16::forward_kernels(cell, variant);
  return own.run ? own : avx512::forward_kernels(cell, variant);
}

BackwardKernels backward_kernels_avx512bf16(int cell, int variant) {
  const BackwardKernels own = avx512bf16::backward_kernels(cell, variant);
  return own.run ? own : avx512::backward_kernels(cell, variant);
}
#endif

#define FASTRNN_KERNELS(name, isa, condition, forward, backward, int8_tile, bfloat16_products) \
  {name,      []() -> bool { return condition; }, forward, backward, isa::fingerprint, isa::multiply_add_rate,   \
   int8_tile, BFloat16Products::bfloat16_products}

constexpr Kernels kAll[] = {
    FASTRNN_KERNELS("base", base, true, base::forward_kernels, base::backward_kernels, base::int8_tile, kNone),
#if defined(__x86_64__)
    FASTRNN_KERNELS("avx2", avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                    avx2::forward_kernels, avx2::backward_kernels, int8_tile_avx2, kNone),
    FASTRNN_KERNELS("avx512", avx512, has_avx512(), avx512::forward_kernels, avx512::backward_kernels, int8_tile_avx512,
                    kNone),
    FASTRNN_KERNELS("avx512bf16", avx512, has_avx512bf16(), forward_kernels_avx512bf16, backward_kernels_avx512bf16,
                    int8_tile_avx512, kVectors),
    FASTRNN_KERNELS("amx", avx512, has_avx512bf16() && has_matrix_unit(), forward_kernels_avx512bf16,
                    backward_kernels_avx512bf16, int8_tile_avx512, kMatrixUnit),
#endif
};

const Kernels& choose() {
  const char* forced = std::getenv("FASTRNN_CPU_ISA");
  const Kernels* widest = nullptr;
  for (const Kernels& kernels : kAll) {
    if (!kernels.runs_here()) continue;
    if (forced && *forced && std::string(forced) == kernels.name) return kernels;
    widest = &kernels;
  }
  if (!forced || !*forced) return *widest;
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  throw std::runtime_error("FASTRNN_CPU_ISA=" + std::string(forced) +
                           " is not available; this build and machine have: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

AddedKernels<ForwardKernels, BackwardKernels> added;

[[noreturn]] void refuse(const Layer& layer) {
  static constexpr const char* kNames[] = {
      "float32",         "float64", "bfloat16", "float16", "weights rounded to bfloat16", "products of bfloat16",
      "products of int8"};
  throw std::runtime_error("cell " + cell_info(layer.cell).name + ": this process has no kernels for " +
                           kNames[variant_of(layer)] + "; fastrnn.ops.prepare() compiles them");
}

template <class Kernels>
Kernels checked(Kernels found, const Layer& layer) {
  if (!found.run) refuse(layer);
  return found;
}

ForwardKernels forward_kernels(const Layer& layer) {
  return checked(added.forward(kernels().forward, layer.cell, variant_of(layer)), layer);
}
BackwardKernels backward_kernels(const Layer& layer) {
  return checked(added.backward(kernels().backward, layer.cell, variant_of(layer)), layer);
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels& kernels : kAll)
    if (kernels.runs_here()) names.push_back(kernels.name);
  return names;
}

std::string isa_in_use() { return kernels().name; }

double peak_flops(DType dtype, int threads) { return kernels().multiply_add_rate(dtype, threads); }

bool has_bfloat16_products() { return kernels().bfloat16_products != BFloat16Products::kNone; }

bool uses_matrix_unit() { return kernels().bfloat16_products == BFloat16Products::kMatrixUnit; }

Int8Tile int8_tile(int vectors, int rows, int panels) { return kernels().int8_tile(vectors, rows, panels); }

bool has_kernels(int cell, int variant) { return added.forward(kernels().forward, cell, variant).run != nullptr; }

void load_kernels(int cell, int variant, const std::string& path) { added.load(cell, variant, path); }

size_t packed_size(const Layer& layer) { return forward_kernels(layer).pack(layer, nullptr); }

void pack(const Layer& layer, void* packed) { forward_kernels(layer).pack(layer, packed); }

uint64_t fingerprint(const Layer& layer) { return kernels().fingerprint(layer); }

size_t forward_workspace(const Layer& layer) { return forward_kernels(layer).workspace(layer); }

void forward(const Layer& layer, void* workspace) { forward_kernels(layer).run(layer, workspace); }

size_t backward_workspace(const Layer& layer, const LayerGrads& grads) {
  return backward_kernels(layer).workspace(layer, grads);
}

void backward(const Layer& layer, const LayerGrads& grads, void* workspace) {
  backward_kernels(layer).run(layer, grads, workspace);
}

}  // namespace fastrnn::cpu
