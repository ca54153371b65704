// Products with 8-bit rows (docs/format.md: signed bytes, then a float16 scale), for embeddings used as heads.
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

constexpr int kByteLanes = 64;
constexpr int kByteRows = 4;  // activation rows that a row of bytes, once converted, is multiplied with

template <int Rows>
void multiply_byte_row(const ByteProduct& product, int64_t row, int64_t first) {
  const int64_t columns = product.columns;
  const uint8_t* bytes = product.packed + row * (columns + 2);
  const int8_t* codes = reinterpret_cast<const int8_t*>(bytes);
  const float* x = product.x + first * columns;
  float sums[Rows][kByteLanes] = {};
  int64_t column = 0;
  for (; column + kByteLanes <= columns; column += kByteLanes) {
    float values[kByteLanes];
    for (int lane = 0; lane < kByteLanes; ++lane) values[lane] = static_cast<float>(codes[column + lane]);
    for (int r = 0; r < Rows; ++r) {
      const float* numbers = x + r * columns + column;
      for (int lane = 0; lane < kByteLanes; ++lane) sums[r][lane] += values[lane] * numbers[lane];
    }
  }
  uint16_t half;
  std::memcpy(&half, bytes + columns, 2);
  const float scale = half_to_float(half);
  for (int r = 0; r < Rows; ++r) {
    float rest = 0;
    for (int64_t left = column; left < columns; ++left) {
      rest += static_cast<float>(codes[left]) * x[r * columns + left];
    }
    for (int width = kByteLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sums[r][lane] += sums[r][lane + width];
    }
    product.y[(first + r) * product.rows + row] = (sums[r][0] + rest) * scale;
  }
}

inline void multiply_bytes(const ByteProduct& product, int64_t low, int64_t high) {
  for (int64_t row = low; row < high; ++row) {
    int64_t first = 0;
    for (; first + kByteRows <= product.x_rows; first += kByteRows) multiply_byte_row<kByteRows>(product, row, first);
    for (; first < product.x_rows; ++first) multiply_byte_row<1>(product, row, first);
  }
}

}  // namespace
}  // namespace pbsp
