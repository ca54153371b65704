// A row of activations in the basis of rotated planes, see docs/format.md; a part of isa.hpp.
#pragma once

#include <cmath>
#include <cstdint>

namespace pbsp {
namespace {

// -1 or 1 for a column: the mixing at the end of MurmurHash3.
inline float column_sign(uint32_t column) {
  uint32_t mixed = column;
  mixed = (mixed ^ mixed >> 16) * 0x85ebca6bu;
  mixed = (mixed ^ mixed >> 13) * 0xc2b2ae35u;
  return (mixed ^ mixed >> 16) & 1u ? -1.0f : 1.0f;
}

// Signs and 1/√size (exact: sizes are powers of four), then a fast Hadamard transform of every run of columns.
inline void rotate_row(float* row, int64_t columns, int64_t size) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (int64_t i = 0; i < columns; ++i) row[i] *= column_sign(static_cast<uint32_t>(i)) * scale;
  for (float* run = row; run < row + columns; run += size) {
    for (int64_t half = 1; half < size; half *= 2) {
      for (int64_t first = 0; first < size; first += 2 * half) {
        for (int64_t i = first; i < first + half; ++i) {
          const float low = run[i], high = run[i + half];
          run[i] = low + high;
          run[i + half] = low - high;
        }
      }
    }
  }
}

}  // namespace
}  // namespace pbsp
