#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace pbsp {
namespace {

std::atomic<Team> current_team{nullptr};

struct Shared {
  int64_t count;
  int64_t step;
  const std::function<void(int64_t, int64_t)>* work;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

void take_ranges(void* argument) {
  Shared& shared = *static_cast<Shared*>(argument);
  for (;;) {
    const int64_t low = shared.next.fetch_add(shared.step);
    if (low >= shared.count) return;
    try {
      (*shared.work)(low, std::min(low + shared.step, shared.count));
    } catch (...) {
      if (!shared.failed.exchange(true)) shared.error = std::current_exception();
      shared.next.store(shared.count);
    }
  }
}

void own_threads(Shared& shared, int threads) {
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(take_ranges, &shared);
  } catch (const std::system_error&) {
    // The system gives no more threads; those that run, and this one, do the work.
  }
  take_ranges(&shared);
  for (std::thread& other : others) other.join();
}

}  // namespace

void use_team(Team team) { current_team.store(team); }

void parallel(int64_t count, int64_t step, int threads, const std::function<void(int64_t, int64_t)>& work) {
  step = std::max<int64_t>(step, 1);
  threads = static_cast<int>(std::min<int64_t>(threads, (count + step - 1) / step));
  Shared shared{};
  shared.count = count;
  shared.step = step;
  shared.work = &work;
  if (threads <= 1) {
    take_ranges(&shared);
  } else if (const Team team = current_team.load()) {
    team(take_ranges, &shared, static_cast<unsigned>(threads), 0);
  } else {
    own_threads(shared, threads);
  }
  if (shared.failed) std::rethrow_exception(shared.error);
}

}  // namespace pbsp
