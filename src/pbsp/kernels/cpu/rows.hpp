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

// Where a plane of a row has a bit for each column: 1 = kept, and 1 = kept and plus. Or, where all chunks have
// the same whole bytes of signs, where these are: then they can be spread when they are needed.
struct Row {
  const uint8_t* support;
  const uint64_t* plus;
  const uint8_t* signs;
  int64_t sign_bytes;  // of a chunk; 0 if it must be `plus`
};

inline Row row_of(const Matrix& matrix, const Plane& plane, int64_t row) {
  const uint8_t* layout = matrix.layout + row * matrix.row_bytes;
  const bool even = !plane.code_bits && plane.kept < plane.group && plane.chunk_bits % 8 == 0;
  return {layout + plane.support_at, nullptr, layout + plane.signs_at, even ? plane.chunk_bits / 8 : 0};
}

// The vectors of a chunk's eight codes, each as a word of eight signed bytes.
inline void load_vectors(const Plane& plane, const uint8_t* codes, uint64_t (&vectors)[kChunk / kVector]) {
  const uint32_t mask = (1u << plane.code_bits) - 1;
  for (int index = 0; index < kChunk / kVector; ++index) {
    uint16_t code;
    if (plane.code_bits == 8) {
      code = codes[index];
    } else {  // every other width ends a chunk's last code at the end of two bytes
      std::memcpy(&code, codes + index * plane.code_bits / 8, 2);
      code = static_cast<uint16_t>(code >> index * plane.code_bits % 8 & mask);
    }
    std::memcpy(&vectors[index], plane.vectors + kVector * code, 8);
  }
}

// Spreads the signs of a plane of a row to `plus`; `whole` is ones, the support of planes without a bitmap.
template <class Isa>
inline Row expand(const Matrix& matrix, const Plane& plane, int64_t row, const uint64_t* whole, uint64_t* plus) {
  Row result = row_of(matrix, plane, row);
  const int64_t chunks = matrix.chunks;
  if (plane.kept == plane.group) {
    std::memcpy(plus, result.signs, 8 * chunks);
    result.support = reinterpret_cast<const uint8_t*>(whole);
  } else if (result.sign_bytes) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const uint64_t signs = load_word(result.signs + result.sign_bytes * chunk);
      plus[chunk] = Isa::deposit(signs, load_word(result.support + 8 * chunk));
    }
  } else {
    int64_t at = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const uint64_t kept = load_word(result.support + 8 * chunk);
      plus[chunk] = Isa::deposit(load_bits(result.signs, at), kept);
      at += __builtin_popcountll(kept);
    }
  }
  result.plus = plus;
  return result;
}

// The memory is slow to start on what nobody asked for yet; this far ahead of the row in work is enough.
inline void fetch_ahead(const Matrix& matrix, int64_t row) {
  constexpr int64_t kAheadBytes = 2048;
  const uint8_t* ahead = matrix.layout + row * matrix.row_bytes + kAheadBytes;
  for (int64_t byte = 0; byte < matrix.row_bytes; byte += 64) __builtin_prefetch(ahead + byte);
}

}  // namespace
}  // namespace pbsp
