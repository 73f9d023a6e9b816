// Stacks to switch between. On x86-64 a switch is a dozen instructions; elsewhere, and under AddressSanitizer, which
// must see it, it is swapcontext, with its two system calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define EMULATE_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulate {

// The i-th stack, kept for the next fiber that takes it.
inline char* stack(size_t i, size_t bytes) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.emplace_back(new char[bytes]);
  return stacks[i].get();
}

#ifdef EMULATE_SWITCH

// Saves what a function must leave as it was, then goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

class Fiber {
 public:
  // On stack i; `run` must not return.
  void start(size_t i, void (*run)()) {
    constexpr size_t kBytes = 64 << 10, kSaved = 6;
    auto* const top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack(i, kBytes) + kBytes) / 16 * 16);
    uint64_t* const frame = top - 2 - kSaved;  // saved registers, then the return address, 8 below a multiple of 16
    frame[kSaved] = reinterpret_cast<uint64_t>(run);
    at_ = frame;
  }
  void switch_to(Fiber& other) { switch_stacks(&at_, other.at_); }

 private:
  void* at_ = nullptr;
};

#else

class Fiber {
 public:
  void start(size_t i, void (*run)()) {
    constexpr size_t kBytes = 256 << 10;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack(i, kBytes);
    context_.uc_stack.ss_size = kBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, run, 0);
  }
  void switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace emulate
