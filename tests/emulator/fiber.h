// Stacks to switch between. On x86-64 a switch is a dozen instructions; elsewhere, and under AddressSanitizer, which
// must see it, it is swapcontext, with its two system calls. ThreadSanitizer is told that each fiber is a thread: to it
// they run at once, and a switch orders nothing.
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
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// What keeps the books of all fibers: one runs at a time, so its accesses are no races, as ThreadSanitizer would think.
#define EMULATE_UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulate {

// The i-th stack, kept for the next fiber that takes it.
inline char* stack(size_t i, size_t bytes) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.emplace_back(new char[bytes]);
  return stacks[i].get();
}

// ThreadSanitizer's i-th thread, kept like the stack; the one that it sees now; the one that it sees from now on.
#ifdef __SANITIZE_THREAD__
inline void* watched(size_t i) {
  static std::vector<void*> threads;
  while (threads.size() <= i) threads.push_back(__tsan_create_fiber(0));
  return threads[i];
}
inline void* watched_now() { return __tsan_get_current_fiber(); }
inline void watch(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
#else
inline void* watched(size_t) { return nullptr; }
inline void* watched_now() { return nullptr; }
inline void watch(void*) {}
#endif

#ifdef EMULATE_SWITCH

// Saves what a function must leave as it was, then goes on where `to` was saved.
__attribute__((naked, noinline)) EMULATE_UNWATCHED inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

class Context {
 public:
  void start(size_t i, void (*run)()) {
    constexpr size_t kBytes = 64 << 10, kSaved = 6;
    const size_t shift = i % 64 * 64;  // the ends of all stacks would be in the same few lines of the cache
    auto* const top =
        reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack(i, kBytes) + kBytes - shift) / 16 * 16);
    uint64_t* const frame = top - 2 - kSaved;  // saved registers, then the return address, 8 below a multiple of 16
    frame[kSaved] = reinterpret_cast<uint64_t>(run);
    at_ = frame;
  }
  EMULATE_UNWATCHED void switch_to(Context& other) { switch_stacks(&at_, other.at_); }

 private:
  void* at_ = nullptr;
};

#else

class Context {
 public:
  void start(size_t i, void (*run)()) {
    constexpr size_t kBytes = 256 << 10;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack(i, kBytes);
    context_.uc_stack.ss_size = kBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, run, 0);
  }
  EMULATE_UNWATCHED void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

class Fiber {
 public:
  // What this thread of the operating system runs already.
  void adopt() { watched_ = watched_now(); }
  // On stack i; `run` must not return.
  void start(size_t i, void (*run)()) {
    context_.start(i, run);
    watched_ = watched(i);
  }
  EMULATE_UNWATCHED void switch_to(Fiber& other) {
    watch(other.watched_);
    context_.switch_to(other.context_);
  }

 private:
  Context context_;
  void* watched_ = nullptr;
};

}  // namespace emulate
