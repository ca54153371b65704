#include "search_tables.hpp"

#include <array>
#include <cstddef>

#include "planes.hpp"

namespace pbsp {

std::vector<uint8_t> choices(int kept, int group) {
  std::vector<uint8_t> found, one(kept);
  for (int i = 0; i < kept; ++i) one[i] = static_cast<uint8_t>(i);
  for (;;) {
    found.insert(found.end(), one.begin(), one.end());
    int last = kept - 1;
    while (last >= 0 && one[last] == group - kept + last) --last;
    if (last < 0) return found;
    ++one[last];
    for (int i = last + 1; i < kept; ++i) one[i] = static_cast<uint8_t>(one[i - 1] + 1);
  }
}

std::vector<float> half_energies(const std::vector<uint8_t>& places, int kept, int group, const float* metric) {
  std::vector<float> found;
  std::vector<float> code(kept);
  for (size_t first = 0; first < places.size(); first += kept) {
    for (int signing = 0; signing < 1 << (kept - 1); ++signing) {
      const int minus = (signing ^ signing >> 1) << 1;
      for (int i = 0; i < kept; ++i) code[i] = minus >> i & 1 ? -0.5f : 0.5f;
      double energy = 0;
      for (int i = 0; i < kept; ++i) {
        const float* row = metric + places[first + i] * group;
        double part = 0;
        for (int j = 0; j < kept; ++j) part += code[j] * static_cast<double>(row[places[first + j]]);
        energy += code[i] * part;
      }
      found.push_back(static_cast<float>(2 * energy));
    }
  }
  return found;
}

std::vector<float> half_energies(const int8_t* vectors, int64_t count, const float* metric) {
  std::vector<float> found(count);
  for (int64_t index = 0; index < count; ++index, vectors += kVector) {
    double energy = 0;
    for (int i = 0; i < kVector; ++i) {
      double part = 0;
      for (int j = 0; j < kVector; ++j) part += vectors[j] * static_cast<double>(metric[i * kVector + j]);
      energy += vectors[i] * part;
    }
    found[index] = static_cast<float>(energy / 2);
  }
  return found;
}

Parts parts_of(const int8_t* vectors, int64_t count) {
  constexpr uint16_t kUnknown = 0xffff;
  Parts parts;
  parts.of.resize(2 * count);
  for (int half = 0; half < 2; ++half) {
    std::array<uint16_t, kEntryValues * kEntryValues * kEntryValues * kEntryValues> known;
    static_assert(kPart == 4 && 2 * known.size() < kUnknown);
    known.fill(kUnknown);
    const int8_t* entries = vectors + half * kPart;
    for (int64_t index = 0; index < count; ++index, entries += kVector) {
      int key = 0;
      for (int i = 0; i < kPart; ++i) key = kEntryValues * key + entries[i] + kLargestEntry;
      if (known[key] == kUnknown) {
        known[key] = static_cast<uint16_t>(parts.entries.size() / kPart);
        parts.entries.insert(parts.entries.end(), entries, entries + kPart);
      }
      parts.of[2 * index + half] = known[key];
    }
    if (half == 0) parts.first_count = static_cast<int64_t>(parts.entries.size()) / kPart;
  }
  return parts;
}

}  // namespace pbsp
