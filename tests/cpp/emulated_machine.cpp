#include "emulated_machine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "fiber.h"

namespace gemma_norm::device {

Here here;

namespace {

constexpr int kMostThreads = 1024;  // of a block, on every GPU

enum class State {
  kReady,
  kExchanges,  // with other lanes of its wave
  kAtBarrier,  // of its block
  kArrived,    // at the cluster's barrier. It goes on only after others, as that order shows most mistakes.
  kAtCluster,  // waits for the others to arrive there
  kDone,
  kFailed
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  State state;
  int distance;  // of the exchange it waits for
  float
      value[2];  // offered to other lanes, in turns: the next exchange may begin before all lanes have read this value
  int turn;
  int arrivals, waits;  // at the cluster's barrier
  bool waited_for_previous_kernel;
};

constexpr char kGarbage = '\xff';

// A variable in a block's shared memory.
struct SharedVariable {
  void* data;
  size_t size;
  bool* used;  // by a block that has run since it was filled with garbage

  void fill() const {
    std::memset(data, kGarbage, size);
    *used = false;
  }
};
std::vector<SharedVariable>& all_shared() {
  static std::vector<SharedVariable> all;  // Variables are added before main(), in any order of source files.
  return all;
}

// A block of the cluster that runs now.
struct Block {
  bool started;
  // Its variables, while another block of its cluster runs. Those that no block has used are empty: they are garbage.
  std::vector<std::vector<char>> shared;
};

// Runs one launch at a time.
class Machine {
 public:
  EmulatedGpu gpu{32, int64_t{1} << 42, 1, 0};
  const std::vector<SharedVariable>& shared = all_shared();
  std::set<const void*> launched;
  bool runs_kernels = true;

  Error run_grid(int64_t blocks, int threads, int cluster, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    error_.clear();
    random_.seed(gpu.order);
    if (threads < 1 || threads > kMostThreads || threads % gpu.wave_width)
      fail("a block of " + std::to_string(threads) + " threads, which is no number of whole waves up to 1024");
    else if (blocks < 1 || blocks > std::min<int64_t>(INT32_MAX, gpu.max_threads / threads))
      fail("a launch of " + std::to_string(blocks) + " blocks");
    else if (cluster < 1 || cluster > gpu.max_cluster || blocks % cluster)
      fail("a cluster of " + std::to_string(cluster) + " blocks");
    if (!error_.empty()) return error_.c_str();
    if (!runs_kernels) return kSuccess;
    here = {0, threads, gpu.wave_width, 0, 0, cluster, false};
    blocks_.resize(cluster);
    while (threads_.size() < static_cast<size_t>(threads * cluster)) {
      threads_.emplace_back();
      threads_.back().fiber = std::make_unique<Fiber>([this] { (*kernel_)(), current().state = State::kDone; });
    }
    for (const int64_t first : order(blocks / cluster)) {
      run_cluster(first * cluster);
      if (error_.empty()) continue;
      threads_.clear();  // Their fibers are in the middle of the kernel.
      return error_.c_str();
    }
    return kSuccess;
  }

  // The following are called by kernels, on a fiber.
  void wait(State state) {
    Thread& thread = current();
    thread.state = state;
    thread.waited_for_previous_kernel = here.waited_for_previous_kernel;
    thread.fiber->give_way();
  }
  float value_of_lane(int distance, float v) {
    Thread& thread = current();
    const int turn = thread.turn ^= 1;
    thread.distance = distance;
    thread.value[turn] = v;
    wait(State::kExchanges);
    return (&current() + ((here.thread ^ distance) - here.thread))->value[turn];
  }
  void cluster_arrive() {
    ++current().arrivals;
    wait(State::kArrived);
  }
  void cluster_wait() {
    if (++current().waits > current().arrivals) fail_here("a wait for the cluster without having arrived");
    wait(State::kAtCluster);
  }
  void store_in_block(float* to, int rank, float v) {
    if (!blocks_[rank].started) fail_here("a store into a block of the cluster that has not started");
    if (count(State::kDone, rank * here.block_threads) > 0)
      fail_here("a store into a block of the cluster that may have ended");
    char* const address = reinterpret_cast<char*>(to);
    for (size_t i = 0; i < shared.size(); ++i) {
      const auto offset = address - static_cast<char*>(shared[i].data);
      if (offset < 0 || offset >= static_cast<int64_t>(shared[i].size)) continue;
      std::vector<char>& others = blocks_[rank].shared[i];
      if (others.empty()) others.assign(shared[i].size, kGarbage);
      std::memcpy(rank == here.cluster_rank ? address : &others[offset], &v, sizeof v);
      return;
    }
    fail_here("a store into a block of the cluster that is not to shared memory");
  }
  void fail_here(const char* what) {
    fail("block " + std::to_string(here.block) + ", thread " + std::to_string(here.thread) + ": " + what);
    wait(State::kFailed);
  }

 private:
  Thread& current() { return threads_[here.cluster_rank * here.block_threads + here.thread]; }

  void fail(std::string what) { error_ = std::move(what); }

  template <class Int>
  std::vector<Int> order(Int count) {
    std::vector<Int> all(count);
    std::iota(all.begin(), all.end(), Int{0});
    if (gpu.order) std::shuffle(all.begin(), all.end(), random_);
    return all;
  }

  // How many of the `threads` from `begin` on (0: those of a block) have this state.
  int count(State state, int begin, int threads = 0) const {
    const auto first = threads_.begin() + begin;
    return static_cast<int>(std::count_if(first, first + (threads ? threads : here.block_threads),
                                          [=](const Thread& t) { return t.state == state; }));
  }
  void change(State from, State to, int begin, int threads) {
    for (int i = begin; i < begin + threads; ++i)
      if (threads_[i].state == from) threads_[i].state = to;
  }

  void diverged(int begin, int threads) {
    fail("block " + std::to_string(here.block) + ", of " + std::to_string(threads) + " threads " +
         std::to_string(count(State::kAtBarrier, begin, threads)) + " wait at a barrier, " +
         std::to_string(count(State::kAtCluster, begin, threads)) + " for the cluster, " +
         std::to_string(count(State::kExchanges, begin, threads)) + " for other lanes, and " +
         std::to_string(count(State::kDone, begin, threads)) + " have returned");
  }

  void fill_used() {
    for (const SharedVariable& variable : shared)
      if (*variable.used) variable.fill();
  }

  // Runs one block after another, each until it waits for others.
  void run_cluster(int64_t first) {
    const int all = here.block_threads * here.cluster_blocks;
    fill_used();
    for (Block& block : blocks_) {
      block.started = false;
      block.shared.assign(shared.size(), {});
    }
    for (int i = 0; i < all; ++i) {
      Thread& thread = threads_[i];
      thread.state = State::kReady;
      thread.turn = thread.arrivals = thread.waits = 0;
      thread.waited_for_previous_kernel = false;
    }
    while (count(State::kDone, 0, all) < all) {
      const std::vector<int> ranks = order(here.cluster_blocks);
      const auto rank = std::find_if(ranks.begin(), ranks.end(), [&](int r) { return can_go_on(r); });
      if (rank == ranks.end()) return diverged(0, all);
      here.cluster_rank = *rank;
      here.block = static_cast<uint32_t>(first + *rank);
      run_block();
      if (!error_.empty()) return;
    }
  }

  bool can_go_on(int rank) const {
    const int begin = rank * here.block_threads, all = static_cast<int>(here.block_threads * blocks_.size());
    if (count(State::kReady, begin) || count(State::kArrived, begin)) return true;
    const int arrivals = threads_[begin].arrivals;
    return count(State::kAtCluster, begin) == here.block_threads &&
           std::all_of(threads_.begin(), threads_.begin() + all,
                       [=](const Thread& t) { return t.arrivals >= arrivals; });
  }

  // Runs a block until it is done or waits for other blocks of its cluster.
  void run_block() {
    const int threads = here.block_threads, begin = here.cluster_rank * threads;
    Block& block = blocks_[here.cluster_rank];
    block.started = true;
    if (blocks_.size() > 1) {
      fill_used();
      for (size_t i = 0; i < shared.size(); ++i)
        if (!block.shared[i].empty()) {
          std::memcpy(shared[i].data, block.shared[i].data(), shared[i].size);
          *shared[i].used = true;
        }
    }
    change(State::kArrived, State::kReady, begin, threads);
    change(State::kAtCluster, State::kReady, begin, threads);
    while (count(State::kReady, begin) > 0) {
      for (const int wave : order(threads / gpu.wave_width)) {
        run_wave(begin + wave * gpu.wave_width);
        if (!error_.empty()) return;
      }
      const int at_barrier = count(State::kAtBarrier, begin);
      if (at_barrier == threads)
        change(State::kAtBarrier, State::kReady, begin, threads);
      else if (at_barrier > 0)
        return diverged(begin, threads);
    }
    if (blocks_.size() == 1) return;
    for (size_t i = 0; i < shared.size(); ++i) {
      const char* const data = static_cast<const char*>(shared[i].data);
      if (*shared[i].used) block.shared[i].assign(data, data + shared[i].size);
    }
  }

  // Runs a wave until each of its lanes is done or waits for other waves.
  void run_wave(int begin) {
    const int width = gpu.wave_width;
    for (;;) {
      for (const int lane : order(width)) {
        Thread& thread = threads_[begin + lane];
        if (thread.state != State::kReady) continue;
        here.thread = begin + lane - here.cluster_rank * here.block_threads;
        here.waited_for_previous_kernel = thread.waited_for_previous_kernel;
        thread.fiber->resume();
        if (!error_.empty()) return;
      }
      const int exchanging = count(State::kExchanges, begin, width);
      if (exchanging == 0) return;
      if (exchanging != width) return diverged(begin, width);
      for (int i = begin; i < begin + width; ++i)
        if (threads_[i].distance != threads_[begin].distance)
          return fail("lanes of one wave exchange over different distances");
      change(State::kExchanges, State::kReady, begin, width);
    }
  }

  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
  std::mt19937 random_;
};

Machine machine;

}  // namespace

void set_machine(const EmulatedGpu& gpu) { machine.gpu = gpu; }
void add_shared_variable(void* data, size_t size, bool* used) { all_shared().push_back({data, size, used}); }
const std::set<const void*>& launched_kernels() { return machine.launched; }
void run_kernels(bool run) { machine.runs_kernels = run; }

void block_barrier() { machine.wait(State::kAtBarrier); }
float value_of_lane(int distance, float v) { return machine.value_of_lane(distance, v); }
void cluster_arrive() { machine.cluster_arrive(); }
void cluster_wait() { machine.cluster_wait(); }
void store_in_block(float* shared, int rank, float v) { machine.store_in_block(shared, rank, v); }
void fail(const char* what) {
  machine.fail_here(what);
  std::abort();  // nobody resumes a fiber that failed
}

Error facts(DeviceFacts* result, const void*) {
  *result = {machine.gpu.wave_width, machine.gpu.max_threads, false, machine.gpu.max_cluster, machine.gpu.processors};
  return kSuccess;
}
Error run_grid(const void* kernel, int64_t blocks, int threads, int cluster, const std::function<void()>& thread) {
  machine.launched.insert(kernel);
  return machine.run_grid(blocks, threads, cluster, thread);
}

}  // namespace gemma_norm::device
