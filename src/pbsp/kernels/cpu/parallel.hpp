// Work on several threads: those that torch already has where we know how to ask for them, else our own.
#pragma once

#include <cstdint>
#include <functional>

namespace pbsp {

// GOMP_parallel of the OpenMP library that torch has loaded. Two pools of threads on one machine take each
// other's cores: a pool that has just worked keeps its threads spinning.
using Team = void (*)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);
void use_team(Team team);

// Calls `work(low, high)` for ranges of about `step` items that cover 0…count, on at most `threads` threads.
// The first exception that a range throws is thrown again here.
void parallel(int64_t count, int64_t step, int threads, const std::function<void(int64_t, int64_t)>& work);

}  // namespace pbsp
