// Rows of the runtime layout, spread to two bits for each column; a part of isa.hpp.
#pragma once

#include "numbers.hpp"
#include "planes.hpp"

namespace pbsp {
namespace {

inline uint64_t load_word(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

// 64 bits from any bit of a stream on; up to nine bytes are read.
inline uint64_t load_bits(const uint8_t* bytes, int64_t at) {
  const uint64_t word = load_word(bytes + at / 8);
  const int shift = static_cast<int>(at % 8);
  return shift ? word >> shift | static_cast<uint64_t>(bytes[at / 8 + 8]) << (64 - shift) : word;
}

// Where a plane of a row has a bit for each column: 1 = kept, and 1 = kept and plus.
struct Row {
  const uint8_t* support;
  const uint64_t* plus;
};

// Spreads the signs of a plane of a row to `plus`; `whole` is ones, the support of planes without a bitmap.
template <class Isa>
inline Row expand(const Matrix& matrix, const Plane& plane, int64_t row, const uint64_t* whole, uint64_t* plus) {
  const uint8_t* signs = matrix.layout + row * matrix.row_bytes + plane.signs_at;
  const uint8_t* support = matrix.layout + row * matrix.row_bytes + plane.support_at;
  const int64_t chunks = matrix.chunks;
  if (plane.kept == plane.group) {
    std::memcpy(plus, signs, 8 * chunks);
    support = reinterpret_cast<const uint8_t*>(whole);
  } else if (plane.chunk_bits && plane.chunk_bits % 8 == 0) {
    const int64_t step = plane.chunk_bits / 8;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, signs += step) {
      plus[chunk] = Isa::deposit(load_word(signs), load_word(support + 8 * chunk));
    }
  } else {
    int64_t at = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const uint64_t kept = load_word(support + 8 * chunk);
      plus[chunk] = Isa::deposit(load_bits(signs, at), kept);
      at += __builtin_popcountll(kept);
    }
  }
  return {support, plus};
}

}  // namespace
}  // namespace pbsp
