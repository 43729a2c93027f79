// Threads of control within one thread of the operating system, which give way to each other by hand.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <functional>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gemma_norm {

// A fiber runs `body` again and again, and gives way after each time. If a body never returns, its fiber can only be
// destroyed.
class Fiber {
 public:
  explicit Fiber(std::function<void()> body) : body_(std::move(body)) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) std::abort();
    stack_ = static_cast<char*>(memory);
  }
  ~Fiber() {
    forget(stack_, kStackBytes);
    munmap(stack_, kStackBytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber from where it gave way until it does so again.
  void resume() {
    leaving(&home_frames_, stack_, kStackBytes);
    if (started_) {
      exchange(home_, at_);
    } else {
      started_ = true;
      start();
    }
    arrived(home_frames_);
  }

  // Called on the fiber: back to whoever resumed it.
  void give_way() {
    leaving(&frames_, home_stack_, home_stack_bytes_);
    exchange(at_, home_);
    arrived(frames_, &home_stack_, &home_stack_bytes_);
  }

 private:
  static constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;

  // The compiler's own setjmp and longjmp take a few instructions, where swapcontext makes a system call. They must not
  // be called in one function, hence `go`.
  using Place = void* [5];
  __attribute__((noinline, no_sanitize("address"))) static void go(Place& to) { __builtin_longjmp(to, 1); }
  __attribute__((noinline, no_sanitize("address"))) static void exchange(Place& from, Place& to) {
    if (__builtin_setjmp(from) == 0) go(to);
  }

  // The first entry, on the new stack.
  __attribute__((noinline, no_sanitize("address"))) void start() {
    if (__builtin_setjmp(home_) != 0) return;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    starting_ = this;
    makecontext(&context, &Fiber::run, 0);
    setcontext(&context);
  }
  static void run() {
    Fiber* const self = starting_;
    arrived(nullptr, &self->home_stack_, &self->home_stack_bytes_);
    for (;;) {
      self->body_();
      self->give_way();
    }
  }

  // AddressSanitizer must be told of every change of stack, and when a stack is gone. It may keep local variables in
  // frames of its own (detect_stack_use_after_return, on by default from GCC 13 on). Who leaves a stack takes these
  // along as `frames`, and gives them back on return.
#ifdef __SANITIZE_ADDRESS__
  static void forget(const void* stack, size_t bytes) { __asan_unpoison_memory_region(stack, bytes); }
  static void leaving(void** frames, const void* to, size_t bytes) {
    __sanitizer_start_switch_fiber(frames, to, bytes);
  }
  static void arrived(void* frames, const void** from = nullptr, size_t* bytes = nullptr) {
    __sanitizer_finish_switch_fiber(frames, from, bytes);
  }
#else
  static void forget(const void*, size_t) {}
  static void leaving(void**, const void*, size_t) {}
  static void arrived(void*, const void** = nullptr, size_t* = nullptr) {}
#endif

  static inline Fiber* starting_ = nullptr;
  std::function<void()> body_;
  char* stack_;
  bool started_ = false;
  Place at_, home_;
  const void* home_stack_ = nullptr;
  size_t home_stack_bytes_ = 0;
  void *frames_ = nullptr, *home_frames_ = nullptr;
};

}  // namespace gemma_norm
