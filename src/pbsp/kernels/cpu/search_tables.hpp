// What the searches of search.hpp are given besides the rows' own numbers, computed once for all rows.
#pragma once

#include <cstdint>
#include <vector>

namespace pbsp {

// All choices of `kept` of `group` places, ascending, in lexicographic order.
std::vector<uint8_t> choices(int kept, int group);

// `CodeSearch::half_energies` of these choices; the metric is (group, group).
std::vector<float> half_energies(const std::vector<uint8_t>& places, int kept, int group, const float* metric);

// `VectorSearch::half_energies`; the metric is (kVector, kVector).
std::vector<float> half_energies(const int8_t* vectors, int64_t count, const float* metric);

// The different halves of vectors: `VectorSearch::parts`, `parts_of` and `first_parts`.
struct Parts {
  std::vector<int8_t> entries;
  std::vector<uint16_t> of;
  int64_t first_count = 0;
};

Parts parts_of(const int8_t* vectors, int64_t count);

}  // namespace pbsp
