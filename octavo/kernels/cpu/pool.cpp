#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace octavo {

namespace {

constexpr auto kSpin = std::chrono::microseconds(80);
constexpr int kPauses = 64;  // between two looks at the clock, or two yields; some 2 us

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

Scratch::~Scratch() {
  for (float* buffer : buffers_) std::free(buffer);
}

float* Scratch::floats(int slot, size_t count) {
  if (sizes_[slot] < count) {
    std::free(buffers_[slot]);
    const size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
    buffers_[slot] = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (buffers_[slot] == nullptr) throw std::bad_alloc();
    sizes_[slot] = bytes / sizeof(float);
  }
  return buffers_[slot];
}

Pool::Pool(int threads, Isa isa, bool rounds_to_int8)
    : isa_(isa), rounds_to_int8_(rounds_to_int8) {
  for (int i = 0; i < threads; ++i) scratch_.push_back(std::make_unique<Scratch>());
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
  stop_.store(true);
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
}

void Pool::dispatch(Call call, const void* context, int64_t count, int64_t grain, int64_t parts) {
  if (workers_.empty() || count <= grain) {
    if (count > 0) call(context, 0, count, *scratch_[0]);
    return;
  }
  call_ = call;
  context_ = context;
  count_ = count;
  grain_ = grain;
  parts_ = parts;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t generation = (state_.load(std::memory_order_relaxed) >> 16) + 1;
  state_.store(generation << 16 | kOpen, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
  work(*scratch_[0]);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  // Where other processes keep the cores busy, the worker may wait for this very core: yield it.
  for (int i = 1; state_.load(std::memory_order_acquire) & kWorkers; ++i) {
    if (i % kPauses == 0) std::this_thread::yield();
    relax();
  }
}

void Pool::work(Scratch& scratch) {
  const int64_t count = count_, grain = grain_, parts = parts_;
  int64_t begin = next_.load(std::memory_order_relaxed), end;
  for (;;) {
    do {
      if (begin >= count) return;
      const int64_t share = parts ? (count - begin) / parts : 0;
      end = std::min(count, begin + std::max(grain, share));
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    call_(context_, begin, end, scratch);
    begin = next_.load(std::memory_order_relaxed);
  }
}

bool Pool::join(uint64_t seen) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while ((state & kOpen) && (state >> 16) != seen) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

void Pool::serve(int thread) {
  uint64_t seen = 0;
  auto idle_since = std::chrono::steady_clock::now();
  const auto waiting = [&] {
    const uint64_t state = state_.load(std::memory_order_seq_cst);
    return !((state & kOpen) && (state >> 16) != seen) && !stop_.load();
  };
  while (!stop_.load(std::memory_order_relaxed)) {
    if (join(seen)) {
      seen = state_.load(std::memory_order_relaxed) >> 16;
      work(*scratch_[thread]);
      state_.fetch_sub(1, std::memory_order_acq_rel);
      idle_since = std::chrono::steady_clock::now();
      continue;
    }
    for (int i = 0; i < kPauses && waiting(); ++i) relax();
    std::this_thread::yield();
    if (!waiting() || std::chrono::steady_clock::now() - idle_since < kSpin) continue;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (waiting()) wake_.wait(lock);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    idle_since = std::chrono::steady_clock::now();
  }
}

}  // namespace octavo
