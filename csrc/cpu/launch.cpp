#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "../ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lowcontext {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

// Memory that a thread keeps between calls.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* get(size_t floats) {
    if (floats > size_) {
      const size_t bytes = (floats * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(kHugePage, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      prefer_huge_pages(data_, bytes);
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// Partial results of split items, kept by the calling thread.
Scratch& call_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace

float* thread_scratch(size_t floats) {
  thread_local Scratch scratch;
  return scratch.get(floats);
}

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void launch(const Problem& p) {
  const KernelTable& kernels = active_kernels();
  if (p.batch * p.q_heads * p.q_len == 0) return;
  const Plan plan = make_plan(p, kernels.shape);
  const size_t scratch_floats = kernels.scratch_floats(p, plan);
  const int64_t partial_floats = plan.partial_floats(p.head_dim);
  float* partials = nullptr;
  int32_t* finished = nullptr;  // splits of an item that are done
  if (plan.splits > 1) {
    const int64_t groups = plan.items / plan.splits;
    partials = call_scratch().get(static_cast<size_t>(plan.items * partial_floats + groups));
    finished = reinterpret_cast<int32_t*>(partials + plan.items * partial_floats);
    std::fill(finished, finished + groups, 0);
  }

  int64_t counter = 0;
  const auto work = [&](int64_t, int64_t) {
    float* scratch = thread_scratch(scratch_floats);
    ItemQueue queue(p, plan, &counter);
    while (const Item* next = queue.peek()) {
      const Item item = *next;
      const int64_t i = queue.index();
      queue.pop();
      if (plan.splits == 1) {
        kernels.run(p, plan, item, queue, scratch, nullptr);
        continue;
      }
      kernels.run(p, plan, item, queue, scratch, partials + i * partial_floats);
      int32_t* count = finished + item.first_item / plan.splits;
      if (__atomic_add_fetch(count, 1, __ATOMIC_ACQ_REL) == plan.splits) {
        kernels.combine(p, plan, item, scratch, partials + item.first_item * partial_floats);
      }
    }
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), plan.items);
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

}  // namespace lowcontext
