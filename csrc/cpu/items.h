// Work items on torch's threads, each thread taking the next one that nobody has.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace lowcontext {

// Calls run(item) for every item in [0, items); on one thread if the work is small.
template <typename Run>
void run_items(int64_t items, bool small, const Run& run) {
  int64_t counter = 0;
  const auto work = [&](int64_t, int64_t) {
    for (;;) {
      const int64_t item = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      run(item);
    }
  };
  const int64_t threads = small ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), items);
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

}  // namespace lowcontext
