// Search for the code of a group of weights that fits best, for many rows at once; a part of isa.hpp.
//
// A code keeps N of M places and gives each a sign. Its score is |c · t| − energy/2 · scale, t the row's
// correlations: c and −c have one energy, so that half of the signs are tried and the better one of both follows
// from the sign of c · t. Lanes are rows, and a row's operations are the same in every instruction set: so are the
// codes.
#pragma once

#include <cstdint>
#include <cstring>

#include "planes.hpp"

namespace pbsp {
namespace {

// Some rows at a time: as many as two registers hold, since each step waits for the one before it.
template <int Lanes>
struct SearchTypes {
  typedef float Floats __attribute__((vector_size(4 * Lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * Lanes)));
};
constexpr int kSearchRegisters = 2;

// Correlations of rows low…low + count, the rest zero.
template <int Rows>
inline void load_search_rows(const CodeSearch& search, int64_t low, int64_t count, float (*t)[Rows], float* scale) {
  std::memset(scale, 0, sizeof(float) * Rows);
  std::memcpy(scale, search.scale + low, sizeof(float) * count);
  for (int place = 0; place < search.group; ++place) {
    std::memset(t[place], 0, sizeof t[place]);
    std::memcpy(t[place], search.correlation + place * search.rows + low, sizeof(float) * count);
  }
}

// The code of number `support · signings + signing`, with the sign that correlates.
template <int Rows>
inline void store_code(const CodeSearch& search, int64_t row, int32_t number, int lane, const float (*t)[Rows]) {
  const int32_t support = number / search.signings, signing = number % search.signings;
  const uint32_t minus = static_cast<uint32_t>(signing ^ signing >> 1) << 1;  // in the order of a Gray code
  const uint8_t* places = search.places + support * search.kept;
  float dot = 0;
  for (int i = 0; i < search.kept; ++i) dot += minus >> i & 1 ? -t[places[i]][lane] : t[places[i]][lane];
  const float plus = dot < 0 ? -1.0f : 1.0f;
  for (int place = 0; place < search.group; ++place) search.codes[place * search.rows + row] = 0;
  for (int i = 0; i < search.kept; ++i) {
    search.codes[places[i] * search.rows + row] = minus >> i & 1 ? -plus : plus;
  }
}

template <class Isa>
void search_codes(const CodeSearch& search, int64_t low, int64_t high) {
  constexpr int kLanes = Isa::kFloatLanes, kRows = kSearchRegisters * kLanes;
  using Floats = typename SearchTypes<kLanes>::Floats;
  using Ints = typename SearchTypes<kLanes>::Ints;
  alignas(64) float t[kSearchGroup][kRows];
  alignas(64) float scales[kRows];
  alignas(64) int32_t found[kRows];
  for (int64_t row = low; row < high; row += kRows) {
    const int64_t count = high - row < kRows ? high - row : kRows;
    load_search_rows(search, row, count, t, scales);
    Floats scale[kSearchRegisters], best[kSearchRegisters], dot[kSearchRegisters], one;
    Ints number[kSearchRegisters] = {}, at = {};
    for (int r = 0; r < kSearchRegisters; ++r) {
      std::memcpy(&scale[r], scales + r * kLanes, sizeof one);
      best[r] = scale[r] - scale[r] - __builtin_huge_valf();
    }
    const float* half_energy = search.half_energies;
    const uint8_t* places = search.places;
    for (int64_t support = 0; support < search.supports; ++support, places += search.kept) {
      for (int r = 0; r < kSearchRegisters; ++r) {
        dot[r] = Floats{};
        for (int i = 0; i < search.kept; ++i) {
          std::memcpy(&one, t[places[i]] + r * kLanes, sizeof one);
          dot[r] += one;
        }
      }
      for (int signing = 0; signing < search.signings; ++signing, ++half_energy) {
        if (signing) {
          const int flipped = __builtin_ctz(signing);
          // Whether the place is minus now, after this step of the Gray code.
          const float twice = (signing ^ signing >> 1) >> flipped & 1 ? -2.0f : 2.0f;
          const float* flips = t[places[flipped + 1]];
          for (int r = 0; r < kSearchRegisters; ++r) {
            std::memcpy(&one, flips + r * kLanes, sizeof one);
            dot[r] += twice * one;
          }
        }
        for (int r = 0; r < kSearchRegisters; ++r) {
          const Floats size = (Floats)((Ints)dot[r] & 0x7fffffff);
          const Floats score = size - *half_energy * scale[r];
          const Ints better = score > best[r];
          best[r] = (Floats)(((Ints)score & better) | ((Ints)best[r] & ~better));
          number[r] = (at & better) | (number[r] & ~better);
        }
        at += 1;
      }
    }
    std::memcpy(found, number, sizeof found);
    for (int lane = 0; lane < count; ++lane) store_code(search, row + lane, found[lane], lane, t);
  }
}

// The same for a lattice's vectors. Many have one half in common (e8-12's 2,048 have 295 first and 154 last halves), so
// that a vector takes one sum of two halves. Multiples of the correlations are rounded once, and then only added, so
// that here, too, all instruction sets do the same.
//
// `sums` has room for kSearchRows numbers of every part.
template <class Isa>
void search_vectors(const VectorSearch& search, int64_t low, int64_t high, float* sums) {
  constexpr int kLanes = Isa::kFloatLanes, kRows = kSearchRegisters * kLanes;
  static_assert(kRows <= kSearchRows);
  using Floats = typename SearchTypes<kLanes>::Floats;
  using Ints = typename SearchTypes<kLanes>::Ints;
  alignas(64) float t[kVector][kEntryValues][kRows];
  alignas(64) float scales[kRows];
  alignas(64) int32_t found[kRows];
  for (int64_t row = low; row < high; row += kRows) {
    const int64_t count = high - row < kRows ? high - row : kRows;
    std::memset(t, 0, sizeof t);
    std::memset(scales, 0, sizeof scales);
    std::memcpy(scales, search.scale + row, sizeof(float) * count);
    for (int place = 0; place < kVector; ++place) {
      for (int multiple = 0; multiple < kEntryValues; ++multiple) {
        const float times = static_cast<float>(multiple - kLargestEntry);
        const float* correlation = search.correlation + place * search.rows + row;
        for (int64_t lane = 0; lane < count; ++lane) t[place][multiple][lane] = times * correlation[lane];
      }
    }
    Floats one, other;
    for (int64_t part = 0; part < search.part_count; ++part) {
      const int8_t* entries = search.parts + part * kPart;
      const int first = part < search.first_parts ? 0 : kPart;
      for (int r = 0; r < kSearchRegisters; ++r) {
        std::memcpy(&other, t[first][entries[0] + kLargestEntry] + r * kLanes, sizeof other);
        for (int i = 1; i < kPart; ++i) {
          std::memcpy(&one, t[first + i][entries[i] + kLargestEntry] + r * kLanes, sizeof one);
          other += one;
        }
        std::memcpy(sums + part * kRows + r * kLanes, &other, sizeof other);
      }
    }
    Floats scale[kSearchRegisters], best[kSearchRegisters];
    Ints number[kSearchRegisters] = {}, at = {};
    for (int r = 0; r < kSearchRegisters; ++r) {
      std::memcpy(&scale[r], scales + r * kLanes, sizeof one);
      best[r] = scale[r] - scale[r] - __builtin_huge_valf();
    }
    const uint16_t* parts = search.parts_of;
    for (int64_t index = 0; index < search.count; ++index, parts += 2) {
      for (int r = 0; r < kSearchRegisters; ++r) {
        std::memcpy(&one, sums + parts[0] * kRows + r * kLanes, sizeof one);
        std::memcpy(&other, sums + parts[1] * kRows + r * kLanes, sizeof other);
        const Floats size = (Floats)((Ints)(one + other) & 0x7fffffff);
        const Floats score = size - search.half_energies[index] * scale[r];
        const Ints better = score > best[r];
        best[r] = (Floats)(((Ints)score & better) | ((Ints)best[r] & ~better));
        number[r] = (at & better) | (number[r] & ~better);
      }
      at += 1;
    }
    std::memcpy(found, number, sizeof found);
    for (int lane = 0; lane < count; ++lane) {
      const int8_t* chosen = search.vectors + kVector * static_cast<int64_t>(found[lane]);
      const uint16_t* halves = search.parts_of + 2 * static_cast<int64_t>(found[lane]);
      const bool minus = sums[halves[0] * kRows + lane] + sums[halves[1] * kRows + lane] < 0;
      for (int place = 0; place < kVector; ++place) {
        search.found[place * search.rows + row + lane] = static_cast<float>(minus ? -chosen[place] : chosen[place]);
      }
    }
  }
}

}  // namespace
}  // namespace pbsp
