// Hands out pieces of the caller's workspace. Laid out over a null base it only counts the bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "isa.h"

namespace fastrnn::cpu::FASTRNN_ISA {

class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
