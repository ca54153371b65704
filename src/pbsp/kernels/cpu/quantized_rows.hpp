// Products with rows of 8 or 4 bits a number (docs/format.md), for embeddings used as heads.
//
// Plain loops over lanes that the compiler turns into the instructions of the file it stands in. A row's sum is
// always taken in the same order: results are the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.hpp"
#include "planes.hpp"

namespace pbsp {
namespace {

constexpr int kProductRows = 4;  // activation rows that a row of numbers, once converted, is multiplied with

inline float half_at(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  return half_to_float(half);
}

// A row of signed bytes, then a scale for all of them.
struct ByteRows {
  static constexpr int kLanes = 64;
  static int64_t row_bytes(int64_t columns) { return columns + 2; }
  static float scale(const uint8_t* row, int64_t columns) { return half_at(row + columns); }
  static void values(const uint8_t* row, int64_t column, int count, float* values) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(row) + column;
    for (int lane = 0; lane < count; ++lane) values[lane] = static_cast<float>(codes[lane]);
  }
};

// Groups of 32 columns: their nibbles, the low ones first, then a scale, which must come before the sum.
struct NibbleRows {
  static constexpr int kLanes = 32;
  static constexpr int kGroupBytes = kLanes / 2 + 2;
  static int64_t row_bytes(int64_t columns) { return columns / kLanes * kGroupBytes; }
  static float scale(const uint8_t*, int64_t) { return 1.0f; }
  static void values(const uint8_t* row, int64_t column, int, float* values) {
    const uint8_t* pairs = row + column / kLanes * kGroupBytes;
    const float scale = half_at(pairs + kLanes / 2);
    for (int lane = 0; lane < kLanes / 2; ++lane) {
      values[lane] = (static_cast<float>(pairs[lane] & 15) - 7.5f) * scale;
      values[kLanes / 2 + lane] = (static_cast<float>(pairs[lane] >> 4) - 7.5f) * scale;
    }
  }
};

template <class Format, int Rows>
void multiply_row(const RowProduct& product, int64_t row, int64_t first) {
  constexpr int kLanes = Format::kLanes;
  const int64_t columns = product.columns;
  const uint8_t* packed = product.packed + row * Format::row_bytes(columns);
  const float* x = product.x + first * columns;
  float sums[Rows][kLanes] = {};
  float values[kLanes];
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    Format::values(packed, column, kLanes, values);
    for (int r = 0; r < Rows; ++r) {
      const float* numbers = x + r * columns + column;
      for (int lane = 0; lane < kLanes; ++lane) sums[r][lane] += values[lane] * numbers[lane];
    }
  }
  const int left = static_cast<int>(columns - column);
  if (left) Format::values(packed, column, left, values);
  const float scale = Format::scale(packed, columns);
  for (int r = 0; r < Rows; ++r) {
    float rest = 0;
    for (int lane = 0; lane < left; ++lane) rest += values[lane] * x[r * columns + column + lane];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sums[r][lane] += sums[r][lane + width];
    }
    product.y[(first + r) * product.rows + row] = (sums[r][0] + rest) * scale;
  }
}

template <class Format>
void multiply_quantized(const RowProduct& product, int64_t low, int64_t high) {
  for (int64_t row = low; row < high; ++row) {
    int64_t first = 0;
    for (; first + kProductRows <= product.x_rows; first += kProductRows) {
      multiply_row<Format, kProductRows>(product, row, first);
    }
    for (; first < product.x_rows; ++first) multiply_row<Format, 1>(product, row, first);
  }
}

}  // namespace
}  // namespace pbsp
