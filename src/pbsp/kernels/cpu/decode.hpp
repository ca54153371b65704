// Rows of the matrix as numbers; a part of isa.hpp.
#pragma once

#include "numbers.hpp"
#include "planes.hpp"
#include "rows.hpp"

namespace pbsp {
namespace {

// Adds a lattice's plane to a row of numbers.
inline void add_vectors(const Matrix& matrix, const Plane& plane, int64_t index, const float* scale_of,
                        const uint8_t* scales, float* row) {
  const uint8_t* codes = row_of(matrix, plane, index).signs;
  uint64_t vectors[kChunk / kVector];
  int8_t entries[kChunk];
  for (int64_t first = 0; first < matrix.columns; first += kChunk) {
    load_vectors(plane, codes + first / kChunk * plane.code_bits, vectors);
    std::memcpy(entries, vectors, sizeof entries);
    for (int64_t column = first; column < first + kChunk && column < matrix.columns; ++column) {
      row[column] += static_cast<float>(entries[column - first]) * scale_of[scales[column / matrix.scale_block]];
    }
  }
}

// Rows low…high as numbers, summed in float32 in plane order and rounded once.
template <class Isa>
void decode_rows(const Matrix& matrix, int64_t low, int64_t high, void* dense, Dtype dtype, uint64_t* words,
                 float* row) {
  const bool even = matrix.scale_block % 16 == 0 || matrix.blocks == 1;
  for (int64_t index = low; index < high; ++index) {
    std::memset(row, 0, matrix.chunks * kChunk * sizeof(float));
    for (int number = 0; number < matrix.planes; ++number) {
      const float* scale_of = matrix.scale_of[number];
      const uint8_t* scales = matrix.scales + index * matrix.row_scales + matrix.plane[number].scales_at;
      if (matrix.plane[number].code_bits) {
        add_vectors(matrix, matrix.plane[number], index, scale_of, scales, row);
        continue;
      }
      const Row expanded = expand<Isa>(matrix, matrix.plane[number], index, words, words + matrix.chunks);
      for (int64_t column = 0; column < matrix.columns; column += 16) {
        const uint64_t support = load_word(expanded.support + column / kChunk * 8) >> column % kChunk;
        const uint64_t plus = expanded.plus[column / kChunk] >> column % kChunk;
        if (even) {
          const float scale = scale_of[scales[column / matrix.scale_block]];
          Isa::add_16(static_cast<uint16_t>(support), static_cast<uint16_t>(plus), scale, row + column);
          continue;
        }
        for (int64_t i = 0; i < 16 && column + i < matrix.columns; ++i) {
          const float scale = scale_of[scales[(column + i) / matrix.scale_block]];
          if (support >> i & 1) row[column + i] += plus >> i & 1 ? scale : -scale;
        }
      }
    }
    store_row(row, dtype, (index - low) * matrix.columns, matrix.columns, dense);
  }
}

}  // namespace
}  // namespace pbsp
