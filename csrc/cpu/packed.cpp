// See packed.h.
#include "packed.h"

#include <algorithm>
#include <vector>

namespace torch_attn::cpu {
namespace {

const Parallel kThisThread = {1, nullptr, [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
                                for (int64_t i = 0; i < count; ++i) task(context, i);
                              }};

struct Work {
  const AttentionProblem& problem;
  void (*run)(void*, const Sequence&, const Parallel&);
  void* context;
  std::vector<int64_t> shared_out;  // batch entries that one thread runs each
  int64_t next = 0;

  void run_entry(int64_t batch, const Parallel& parallel) const { run(context, Sequence(problem, batch), parallel); }
};

void run_the_next(void* context, int64_t) {
  Work& work = *static_cast<Work*>(context);
  const auto count = static_cast<int64_t>(work.shared_out.size());
  for (;;) {
    const int64_t i = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
    if (i >= count) return;
    work.run_entry(work.shared_out[static_cast<size_t>(i)], kThisThread);
  }
}

}  // namespace

void for_each_sequence(const AttentionProblem& p, const Parallel& parallel,
                       void (*run)(void*, const Sequence&, const Parallel&), void* context) {
  Work work{p, run, context, {}};
  if (parallel.threads <= 1) {
    for (int64_t batch = 0; batch < p.batch; ++batch) work.run_entry(batch, kThisThread);
    return;
  }
  const auto cost = [&p](int64_t batch) {
    const Sequence sequence(p, batch);
    return static_cast<double>(sequence.query_length() + 1) * static_cast<double>(sequence.key_length() + 1);
  };
  double total = 0;
  for (int64_t batch = 0; batch < p.batch; ++batch) total += cost(batch);
  const double long_one = total / (4.0 * parallel.threads);
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    if (cost(batch) > long_one) {
      work.run_entry(batch, parallel);
    } else {
      work.shared_out.push_back(batch);
    }
  }
  if (work.shared_out.empty()) return;
  std::stable_sort(work.shared_out.begin(), work.shared_out.end(),
                   [&](int64_t left, int64_t right) { return cost(left) > cost(right); });
  const auto count = static_cast<int64_t>(work.shared_out.size());
  parallel.run(parallel.context, std::min<int64_t>(parallel.threads, count), run_the_next, &work);
}

}  // namespace torch_attn::cpu
