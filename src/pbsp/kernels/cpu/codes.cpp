#include "codes.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.hpp"

namespace pbsp {
namespace {

constexpr int64_t kTaskWeights = 1 << 16;
constexpr uint64_t kBeyondCodes = uint64_t{1} << 40;  // no rank is as large; keeps sums from overflowing
constexpr uint64_t kTabledSupports = 1 << 16;

// C(p, i) for positions p of a group and i up to N, and by it ranks of supports, in colexicographic order.
class Supports {
 public:
  explicit Supports(const Plane& plane) : kept_(plane.kept), group_(plane.group) {
    if (plane.code_bits) return;
    choose_.assign(static_cast<size_t>(group_ + 1) * (kept_ + 1), 0);
    for (int position = 0; position <= group_; ++position) {
      at(position, 0) = 1;
      for (int i = 1; i <= kept_ && i <= position; ++i) {
        at(position, i) = std::min(at(position - 1, i - 1) + at(position - 1, i), kBeyondCodes);
      }
    }
    for (uint64_t last = count() - 1; last; last >>= 1) ++rank_bits_;
    if (group_ <= kChunk && count() <= kTabledSupports) {
      table_.resize(count());
      int positions[kChunk];
      for (uint64_t rank = 0; rank < count(); ++rank) {
        unrank(rank, positions);
        for (int i = 0; i < kept_; ++i) table_[rank] |= uint64_t{1} << positions[i];
      }
    }
  }

  int code_bits() const { return rank_bits_ + kept_; }
  const uint64_t* table() const { return table_.empty() ? nullptr : table_.data(); }
  uint64_t choose(int position, int i) const { return choose_[static_cast<size_t>(position) * (kept_ + 1) + i]; }

  void unrank(uint64_t rank, int* positions) const {
    int position = group_ - 1;
    for (int i = kept_; i > 0; --i) {
      while (position > 0 && choose(position, i) > rank) --position;
      positions[i - 1] = position;
      rank -= choose(position, i);
      --position;
    }
  }

 private:
  uint64_t& at(int position, int i) { return choose_[static_cast<size_t>(position) * (kept_ + 1) + i]; }
  uint64_t count() const { return choose(group_, kept_); }

  int kept_;
  int group_;
  int rank_bits_ = 0;
  std::vector<uint64_t> choose_;
  std::vector<uint64_t> table_;
};

// Bits of a row, least significant first, read and written in order.
class Reader {
 public:
  Reader(const uint8_t* bytes, const uint8_t* end) : bytes_(bytes), end_(end) {}
  uint64_t take(int bits) {  // at most 32
    while (held_ < bits) {
      word_ |= static_cast<uint64_t>(bytes_ < end_ ? *bytes_++ : 0) << held_;
      held_ += 8;
    }
    const uint64_t result = word_ & ((uint64_t{1} << bits) - 1);
    word_ >>= bits;
    held_ -= bits;
    return result;
  }

 private:
  const uint8_t* bytes_;
  const uint8_t* end_;
  uint64_t word_ = 0;
  int held_ = 0;
};

class Writer {
 public:
  explicit Writer(uint8_t* bytes) : bytes_(bytes) {}
  void put(uint64_t value, int bits) {  // at most 32
    word_ |= value << held_;
    for (held_ += bits; held_ >= 8; held_ -= 8, word_ >>= 8) *bytes_++ = static_cast<uint8_t>(word_);
  }
  void end() {
    if (held_) *bytes_ = static_cast<uint8_t>(word_);
  }

 private:
  uint8_t* bytes_;
  uint64_t word_ = 0;
  int held_ = 0;
};

inline void or_bits(uint8_t* bits, int64_t at, uint64_t value) {
  for (uint8_t* byte = bits + at / 8, shift = static_cast<uint8_t>(at % 8); value; ++byte, shift = 0) {
    *byte = static_cast<uint8_t>(*byte | value << shift);
    value >>= 8 - shift;
  }
}

inline void set_bit(uint8_t* bits, int64_t at) {
  bits[at / 8] = static_cast<uint8_t>(bits[at / 8] | 1u << at % 8);
}

inline bool has_bit(const uint8_t* bits, int64_t at) { return bits[at / 8] >> at % 8 & 1; }

void row_to_layout(const Plane& plane, const Supports& supports, int64_t columns, Reader codes, uint8_t* row) {
  Writer signs(row + plane.signs_at);
  uint8_t* support = row + plane.support_at;
  std::vector<int> positions(plane.kept);
  for (int64_t first = 0; first < columns; first += plane.group) {
    const uint64_t code = codes.take(supports.code_bits());
    signs.put(code & ((uint64_t{1} << plane.kept) - 1), plane.kept);
    if (plane.kept == plane.group) continue;
    if (supports.table()) {
      or_bits(support, first, supports.table()[code >> plane.kept]);
    } else {
      supports.unrank(code >> plane.kept, positions.data());
      for (const int position : positions) set_bit(support, first + position);
    }
  }
  signs.end();
}

void row_to_codes(const Plane& plane, const Supports& supports, const Matrix& matrix, const uint8_t* row,
                  uint8_t* target) {
  Reader signs(row + plane.signs_at, row + matrix.row_bytes);
  const uint8_t* support = row + plane.support_at;
  Writer codes(target);
  for (int64_t first = 0; first < matrix.columns; first += plane.group) {
    uint64_t rank = 0;
    int found = 0;
    for (int position = 0; position < plane.group && plane.kept < plane.group; ++position) {
      if (has_bit(support, first + position)) rank += supports.choose(position, ++found);
    }
    codes.put(rank << plane.kept | signs.take(plane.kept), supports.code_bits());
  }
  codes.end();
}

int64_t vector_bytes(const Matrix& matrix, const Plane& plane) {
  return (matrix.columns / kVector * plane.code_bits + 7) / 8;
}

int64_t plane_code_bytes(const Matrix& matrix, const Plane& plane, const Supports& supports) {
  if (plane.code_bits) return vector_bytes(matrix, plane);
  return (matrix.columns / plane.group * supports.code_bits() + 7) / 8;
}

// Calls `convert(plane, supports, row, codes of the plane's row)` for all rows and planes.
template <class Bytes, class Convert>
void for_rows(const Matrix& matrix, Bytes* codes, int threads, const Convert& convert) {
  std::vector<Supports> supports;
  for (int number = 0; number < matrix.planes; ++number) supports.emplace_back(matrix.plane[number]);
  const int64_t code_row = code_bytes(matrix);
  const int64_t step = std::max<int64_t>(1, kTaskWeights / matrix.columns);
  parallel(matrix.rows, step, threads, [&](int64_t low, int64_t high) {
    for (int64_t row = low; row < high; ++row) {
      Bytes* plane_codes = codes + row * code_row;
      for (int number = 0; number < matrix.planes; ++number) {
        convert(matrix.plane[number], supports[number], row, plane_codes);
        plane_codes += plane_code_bytes(matrix, matrix.plane[number], supports[number]);
      }
    }
  });
}

}  // namespace

void lay_out(Matrix& matrix) {
  matrix.chunks = (matrix.columns + kChunk - 1) / kChunk;
  matrix.blocks = (matrix.columns + matrix.scale_block - 1) / matrix.scale_block;
  int64_t at = 0;
  for (int number = 0; number < matrix.planes; ++number) {
    Plane& plane = matrix.plane[number];
    const bool whole = plane.kept == plane.group;
    plane.signs_at = at;
    plane.support_at = at;
    plane.scales_at = matrix.shared_scales ? 0 : number * matrix.blocks;
    if (plane.code_bits) {
      plane.chunk_bits = 0;
      at += matrix.chunks * plane.code_bits;
      continue;
    }
    at += whole ? 8 * matrix.chunks : (matrix.columns / plane.group * plane.kept + 7) / 8;
    plane.support_at = at;
    at += whole ? 0 : 8 * matrix.chunks;
    plane.chunk_bits = kChunk % plane.group ? 0 : kChunk / plane.group * plane.kept;
  }
  matrix.row_bytes = at;
  matrix.row_scales = (matrix.shared_scales ? 1 : matrix.planes) * matrix.blocks;
}

int64_t code_bytes(const Matrix& matrix) {
  int64_t bytes = 0;
  for (int number = 0; number < matrix.planes; ++number) {
    bytes += plane_code_bytes(matrix, matrix.plane[number], Supports(matrix.plane[number]));
  }
  return bytes;
}

void codes_to_layout(const Matrix& matrix, const uint8_t* codes, uint8_t* layout, int threads) {
  for_rows(matrix, codes, threads, [&](const Plane& plane, const Supports& supports, int64_t row,
                                       const uint8_t* source) {
    uint8_t* target = layout + row * matrix.row_bytes;
    if (plane.signs_at == 0) std::memset(target, 0, matrix.row_bytes);
    if (plane.code_bits) {
      std::memcpy(target + plane.signs_at, source, vector_bytes(matrix, plane));
      return;
    }
    const uint8_t* end = source + plane_code_bytes(matrix, plane, supports);
    row_to_layout(plane, supports, matrix.columns, Reader(source, end), target);
  });
}

void layout_to_codes(const Matrix& matrix, uint8_t* codes, int threads) {
  for_rows(matrix, codes, threads, [&](const Plane& plane, const Supports& supports, int64_t row,
                                       uint8_t* target) {
    if (plane.code_bits) {
      std::memcpy(target, matrix.layout + row * matrix.row_bytes + plane.signs_at, vector_bytes(matrix, plane));
      return;
    }
    row_to_codes(plane, supports, matrix, matrix.layout + row * matrix.row_bytes, target);
  });
}

}  // namespace pbsp
