// The points of the lattice E8 that are nearest to groups of eight numbers; a part of isa.hpp.
//
// Points are doubled: their entries are all even or all odd, and add up to a multiple of 4. Each kind's nearest point
// rounds every entry and, where the sum is wrong, one of them to its other side: the one that loses least (Conway and
// Sloane 1982). Plain loops over lanes, as in quantized_rows.hpp; a lane is a group, and its operations are the same in
// every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "planes.hpp"

namespace pbsp {
namespace {

constexpr int kPointLanes = 16;
constexpr float kFarthest = 1 << 20;    // from there on neighbouring floats are too far apart to round
constexpr float kRounding = 3 << 22;    // a float so large that adding it leaves no fraction

using PointLanes = float[kVector][kPointLanes];

// The nearest points of even entries (odd = 0) or of odd ones (1), and the squares of their distances.
inline void nearest_of_kind(const PointLanes& values, float odd, PointLanes& points, float* distances) {
  alignas(64) PointLanes left;
  alignas(64) float largest[kPointLanes];
  alignas(64) int32_t sums[kPointLanes] = {}, places[kPointLanes] = {};
  for (int lane = 0; lane < kPointLanes; ++lane) largest[lane] = -1.0f;
  for (int place = 0; place < kVector; ++place) {
    for (int lane = 0; lane < kPointLanes; ++lane) {
      const float half = (values[place][lane] - odd) * 0.5f;
      const float point = (half + kRounding) - kRounding;
      points[place][lane] = point;
      left[place][lane] = half - point;
      sums[lane] += static_cast<int32_t>(point);
      const float size = __builtin_fabsf(half - point);
      places[lane] = size > largest[lane] ? place : places[lane];
      largest[lane] = size > largest[lane] ? size : largest[lane];
    }
  }
  std::memset(distances, 0, sizeof(float) * kPointLanes);
  for (int place = 0; place < kVector; ++place) {
    for (int lane = 0; lane < kPointLanes; ++lane) {
      const float other = left[place][lane] < 0 ? -1.0f : 1.0f;
      const float turned = (sums[lane] & 1) && places[lane] == place ? other : 0.0f;
      const float point = 2.0f * (points[place][lane] + turned) + odd;
      const float apart = values[place][lane] - point;
      points[place][lane] = point;
      distances[lane] += apart * apart;
    }
  }
}

// `values` and `found` are (groups, kVector); values beyond kFarthest count as that.
inline void nearest_points(const float* values, float* found, int64_t low, int64_t high) {
  alignas(64) PointLanes given, even, odd;
  alignas(64) float even_distances[kPointLanes], odd_distances[kPointLanes];
  for (int64_t group = low; group < high; group += kPointLanes) {
    const int count = static_cast<int>(high - group < kPointLanes ? high - group : kPointLanes);
    if (count < kPointLanes) std::memset(given, 0, sizeof given);
    for (int lane = 0; lane < count; ++lane) {
      for (int place = 0; place < kVector; ++place) {
        const float value = values[(group + lane) * kVector + place];
        const float above = value > -kFarthest ? value : -kFarthest;
        given[place][lane] = above < kFarthest ? above : kFarthest;
      }
    }
    nearest_of_kind(given, 0.0f, even, even_distances);
    nearest_of_kind(given, 1.0f, odd, odd_distances);
    for (int lane = 0; lane < count; ++lane) {
      const PointLanes& nearer = odd_distances[lane] < even_distances[lane] ? odd : even;
      for (int place = 0; place < kVector; ++place) found[(group + lane) * kVector + place] = nearer[place][lane];
    }
  }
}

}  // namespace
}  // namespace pbsp
