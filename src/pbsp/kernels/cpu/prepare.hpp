// Activations as integers; a part of isa.hpp.
#pragma once

#include "numbers.hpp"
#include "planes.hpp"
#include "rotation.hpp"

namespace pbsp {
namespace {

// What a block's digits count: the largest number becomes 127 in each digit, or with three or four digits a
// little less, because the division rounds.
inline float unit_of(uint32_t largest_bits, int digits) {
  if (largest_bits >= 0x7f800000u) return float_of(0x7fc00000u);  // not a number, and so is every sum with it
  const float largest = float_of(largest_bits);
  if (largest < float_of(0x0d800000u)) return 0.0f;  // 2^-100: a unit's inverse would overflow
  return largest / (digits == 1 ? 127.0f : digits == 2 ? 32639.0f : digits == 3 ? 8355710.0f : 2139061760.0f);
}

// Writes the digits, units and starts of a tile; `row` has room for a row of floats.
template <class Isa>
void prepare_tile(const Product& product, const Tile& tile, const void* x, float* row) {
  const Matrix& matrix = *product.matrix;
  const int digits = product.digits;
  const int64_t stride = static_cast<int64_t>(tile.rows) * digits * kChunk;
  for (int index = 0; index < tile.rows; ++index) {
    load_row(x, product.dtype, (tile.first_row + index) * matrix.columns, matrix.columns, row);
    if (matrix.rotation > 1) rotate_row(row, matrix.columns, matrix.rotation);
    int64_t segment = 0;
    for (int64_t block = 0; block < matrix.blocks; ++block) {
      const int64_t first = block * matrix.scale_block;
      const int64_t last =
          first + matrix.scale_block < matrix.columns ? first + matrix.scale_block : matrix.columns;
      uint32_t largest = 0;
      for (int64_t column = first; column < last; ++column) {
        const uint32_t magnitude = bits_of(row[column]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
      const float unit = unit_of(largest, digits);
      const double inverse = unit > 0.0f ? 1.0 / static_cast<double>(unit) : 0.0;
      tile.units[block * tile.rows + index] = unit;
      typename Isa::Ints sums[kMaxDigits];
      for (int digit = 0; digit < digits; ++digit) sums[digit] = Isa::zero();
      for (; segment < product.block_ends[block]; ++segment) {
        const Segment& part = product.segments[segment];
        int32_t numbers[kChunk] = {};
        int32_t* inside = numbers + part.first % kChunk;
        // What is not finite is told by the unit; converting it to an integer is undefined.
        if (inverse > 0.0) {
          for (int64_t i = 0; i < part.count; ++i) {
            inside[i] = static_cast<int32_t>(__builtin_rint(row[part.first + i] * inverse));
          }
        }
        int8_t* target = tile.digits + segment * stride + static_cast<int64_t>(index) * digits * kChunk;
        for (int digit = 0; digit < digits; ++digit) {
          for (int i = 0; i < kChunk; ++i) {
            target[i] = static_cast<int8_t>(numbers[i] & 255);
            numbers[i] = (numbers[i] - target[i]) >> 8;
          }
          if (Isa::kLanes) sums[digit] = Isa::dot(sums[digit], Isa::weights(0, 0), target);
          target += kChunk;
        }
      }
      for (int digit = 0; digit < digits && Isa::kLanes; ++digit) {
        int32_t* start = tile.starts + ((block * tile.rows + index) * digits + digit) * Isa::kLanes;
        std::memcpy(start, &sums[digit], Isa::kLanes * sizeof(int32_t));
        for (int lane = 0; lane < Isa::kLanes; ++lane) start[lane] = -start[lane];
      }
    }
  }
}

}  // namespace
}  // namespace pbsp
