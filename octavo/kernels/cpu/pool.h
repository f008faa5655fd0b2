// A small thread pool that spins shortly between jobs and then sleeps, and per-thread scratch.
// The caller works too and never waits for a worker that has not begun: a late worker finds the
// job closed. So a descheduled (or, after fork, absent) worker costs nothing but its help.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "native.h"

namespace octavo {

// Grow-only buffers of one thread, by slot; contents do not survive a job.
class Scratch {
 public:
  ~Scratch();
  float* floats(int slot, size_t count);

 private:
  static constexpr int kSlots = 8;
  float* buffers_[kSlots] = {};
  size_t sizes_[kSlots] = {};
};

class Pool {
 public:
  Pool(int threads, Isa isa, bool rounds_to_int8);
  ~Pool();
  int threads() const { return static_cast<int>(scratch_.size()); }
  Isa isa() const { return isa_; }
  // Whether block formats are multiplied with activations rounded to int8.
  bool rounds_to_int8() const { return rounds_to_int8_; }
  // One op at a time: ctypes releases the GIL, so two Python threads may arrive together.
  std::mutex& op_mutex() { return op_mutex_; }
  // Buffers of the op that holds the mutex.
  Scratch& shared() { return shared_; }

  // Calls body(index, scratch) for every index below count, `grain` consecutive ones at a time.
  template <class Body>
  void run(int64_t count, int64_t grain, const Body& body) {
    start(count, grain, 0, body);
  }

  // The same for indices of equal cost, in ever smaller portions, `least` at least: a thread stays
  // long where it reads on in order, and none waits long for the last portion of another.
  template <class Body>
  void share(int64_t count, int64_t least, const Body& body) {
    start(count, least, 2 * threads(), body);
  }

 private:
  const Isa isa_;
  const bool rounds_to_int8_;
  Scratch shared_;

  template <class Body>
  void start(int64_t count, int64_t grain, int64_t parts, const Body& body) {
    auto call = [](const void* context, int64_t begin, int64_t end, Scratch& scratch) {
      const Body& typed = *static_cast<const Body*>(context);
      for (int64_t index = begin; index < end; ++index) typed(index, scratch);
    };
    dispatch(call, &body, count, grain, parts);
  }

  using Call = void (*)(const void*, int64_t, int64_t, Scratch&);
  void dispatch(Call call, const void* context, int64_t count, int64_t grain, int64_t parts);
  void work(Scratch& scratch);
  void serve(int thread);
  bool join(uint64_t seen);

  // state_: generation << 16 | open << 15 | workers inside
  static constexpr uint64_t kOpen = 1u << 15, kWorkers = kOpen - 1;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  int64_t parts_ = 0;  // a portion is the rest over this; 0: grain_ indices
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex op_mutex_, sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
  std::vector<std::thread> workers_;
};

}  // namespace octavo
