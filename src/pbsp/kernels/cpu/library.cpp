// The functions of pbsp_cpu.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "codes.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "pbsp_cpu.h"
#include "search_tables.hpp"

using namespace pbsp;

namespace {

constexpr int64_t kTaskWeights = 1 << 16;      // of a range of rows that a thread takes at once
constexpr int64_t kThreadProducts = 1 << 18;   // weights × activation rows that are worth a thread
constexpr int64_t kThreadCodes = 1 << 17;      // codes × rows that are
constexpr int64_t kTaskGroups = 1 << 12;       // whose nearest points it finds at once
constexpr int64_t kTaskRows = 256;             // that a thread searches at once

Matrix matrix_of(const PbspMatrix& given) {
  Matrix matrix{};
  matrix.layout = given.layout;
  matrix.scales = given.scales;
  matrix.rows = given.rows;
  matrix.columns = given.columns;
  matrix.scale_block = std::min(given.scale_block, given.columns);
  matrix.rotation = given.rotation;
  matrix.planes = given.planes;
  matrix.shared_scales = given.shared_scales != 0;
  for (int number = 0; number < given.planes; ++number) {
    Plane& plane = matrix.plane[number];
    plane.kept = given.patterns[2 * number];
    plane.group = given.patterns[2 * number + 1];
    if (plane.kept) continue;
    plane.code_bits = plane.group;
    plane.group = kVector;
    plane.vectors = given.vectors[number];
  }
  lay_out(matrix);
  return matrix;
}

// docs/format.md: fraction · 2^k below field 1, (32 + fraction) · 2^(field − 1 + k) from there on.
void set_scales(Matrix& matrix, const int8_t* offsets) {
  for (int number = 0; number < matrix.planes; ++number) {
    const float unit = std::ldexp(1.0f, matrix.shared_scales ? offsets[0] - number : offsets[number]);
    for (int code = 0; code < 256; ++code) {
      const int field = code >> 5;
      const int mantissa = (code & 31) + (field ? 32 : 0);
      matrix.scale_of[number][code] = static_cast<float>(mantissa << (field ? field - 1 : 0)) * unit;
    }
  }
}

// Memory that stays with a thread, so that a product of a few microseconds does not ask for any.
template <class T>
T* scratch(std::vector<T>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}
thread_local std::vector<uint64_t> word_scratch;
thread_local std::vector<float> row_scratch;
struct alignas(64) Sums {
  float rows[kSearchRows];
};
thread_local std::vector<Sums> sum_scratch;

uint64_t* words_for(const Matrix& matrix) {
  uint64_t* words = scratch(word_scratch, word_count(matrix));
  std::fill_n(words, matrix.chunks, ~uint64_t{0});
  return words;
}

std::vector<Segment> segments_of(const Matrix& matrix, std::vector<int64_t>& block_ends) {
  std::vector<Segment> segments;
  for (int64_t block = 0; block < matrix.blocks; ++block) {
    const int64_t end = std::min((block + 1) * matrix.scale_block, matrix.columns);
    for (int64_t first = block * matrix.scale_block; first < end;) {
      const int64_t last = std::min(end, (first / kChunk + 1) * kChunk);
      segments.push_back({first / kChunk, first, last - first});
      first = last;
    }
    block_ends.push_back(static_cast<int64_t>(segments.size()));
  }
  return segments;
}

struct Buffers {
  std::vector<int8_t> digits;
  std::vector<int32_t> starts;
  std::vector<float> units;
};
thread_local Buffers buffers;

std::vector<Tile> tiles_of(const Product& product, const Kernels& kernels, int64_t x_rows) {
  const int64_t row_digits = product.segment_count * product.digits * kChunk;
  const int64_t row_starts = product.matrix->blocks * product.digits * kernels.lanes;
  const int64_t row_units = product.matrix->blocks;
  int8_t* digits = scratch(buffers.digits, x_rows * row_digits);
  int32_t* starts = scratch(buffers.starts, x_rows * row_starts);
  float* units = scratch(buffers.units, x_rows * row_units);
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < x_rows; first += kernels.tile_rows) {
    const int rows = static_cast<int>(std::min<int64_t>(kernels.tile_rows, x_rows - first));
    tiles.push_back({first, rows, digits + first * row_digits, starts + first * row_starts,
                     units + first * row_units});
  }
  return tiles;
}

template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

int pbsp_abi() { return 8; }

int pbsp_supports(const char* name) { return kernels_named(name) != nullptr; }

void pbsp_use_team(Team team) { use_team(team); }

int64_t pbsp_row_bytes(const PbspMatrix* given) { return matrix_of(*given).row_bytes; }

int pbsp_from_codes(const PbspMatrix* given, const uint8_t* codes, uint8_t* layout, int threads) {
  return guarded([&] { codes_to_layout(matrix_of(*given), codes, layout, threads); });
}

int pbsp_to_codes(const PbspMatrix* given, uint8_t* codes, int threads) {
  return guarded([&] { layout_to_codes(matrix_of(*given), codes, threads); });
}

int pbsp_multiply(const char* name, const PbspMatrix* given, const void* x, void* y, int64_t x_rows,
                              int dtype, const float* bias, int digits, int threads) {
  return guarded([&] {
    const Kernels& kernels = *kernels_named(name);
    Matrix matrix = matrix_of(*given);
    set_scales(matrix, given->offsets);
    std::vector<int64_t> block_ends;
    const std::vector<Segment> segments = segments_of(matrix, block_ends);
    Product product{&matrix, segments.data(), block_ends.data(), static_cast<int64_t>(segments.size()),
                    nullptr, 0, digits, bias, y, static_cast<Dtype>(dtype)};
    const std::vector<Tile> tiles = tiles_of(product, kernels, x_rows);
    product.tiles = tiles.data();
    product.tile_count = static_cast<int64_t>(tiles.size());
    const int64_t work = matrix.rows * matrix.columns * matrix.planes * x_rows;
    threads = static_cast<int>(std::clamp<int64_t>(work / kThreadProducts, 1, threads));
    parallel(product.tile_count, 1, tiles.size() > 3 ? threads : 1, [&](int64_t low, int64_t high) {
      for (int64_t index = low; index < high; ++index) {
        kernels.prepare(product, tiles[index], x, scratch(row_scratch, matrix.columns));
      }
    });
    const int64_t step = std::max(kGroupRows, kTaskWeights / matrix.columns);
    parallel(matrix.rows, step, threads, [&](int64_t low, int64_t high) {
      kernels.multiply(product, low, high, words_for(matrix));
    });
  });
}

int pbsp_decode(const char* name, const PbspMatrix* given, int64_t low, int64_t high, void* dense,
                            int dtype, int threads) {
  return guarded([&] {
    const Kernels& kernels = *kernels_named(name);
    Matrix matrix = matrix_of(*given);
    set_scales(matrix, given->offsets);
    const int64_t row_bytes = matrix.columns * (dtype == static_cast<int>(Dtype::kFloat32) ? 4 : 2);
    const int64_t step = std::max<int64_t>(1, kTaskWeights / matrix.columns);
    parallel(high - low, step, threads, [&](int64_t first, int64_t last) {
      kernels.decode(matrix, low + first, low + last, static_cast<uint8_t*>(dense) + first * row_bytes,
                     static_cast<Dtype>(dtype), words_for(matrix),
                     scratch(row_scratch, matrix.chunks * kChunk));
    });
  });
}

int pbsp_multiply_rows(const char* name, int bits, const uint8_t* packed, int64_t rows, int64_t columns,
                       const float* x, int64_t x_rows, float* y, int threads) {
  return guarded([&] {
    const Kernels& kernels = *kernels_named(name);
    const RowProduct product{packed, rows, columns, x, x_rows, y};
    threads = static_cast<int>(std::clamp<int64_t>(rows * columns * x_rows / kThreadProducts, 1, threads));
    const int64_t step = std::max<int64_t>(1, kTaskWeights / columns);
    parallel(rows, step, threads, [&](int64_t low, int64_t high) {
      (bits == 8 ? kernels.bytes : kernels.nibbles)(product, low, high);
    });
  });
}

int pbsp_best_codes(const char* name, int kept, int group, const float* correlation, const float* metric,
                    const float* scale, float* codes, int64_t rows, int threads) {
  return guarded([&] {
    const Kernels& kernels = *kernels_named(name);
    const std::vector<uint8_t> places = choices(kept, group);
    const std::vector<float> energies = half_energies(places, kept, group, metric);
    const CodeSearch search{kept, group, static_cast<int64_t>(places.size()) / kept, 1 << (kept - 1), places.data(),
                            energies.data(), correlation, scale, codes, rows};
    const int64_t tried = static_cast<int64_t>(energies.size()) * rows;
    threads = static_cast<int>(std::clamp<int64_t>(tried / kThreadCodes, 1, threads));
    parallel(rows, kTaskRows, threads, [&](int64_t low, int64_t high) { kernels.search(search, low, high); });
  });
}

int pbsp_best_vectors(const char* name, const int8_t* vectors, int64_t count, const float* correlation,
                      const float* metric, const float* scale, float* found, int64_t rows, int threads) {
  return guarded([&] {
    const Kernels& kernels = *kernels_named(name);
    const std::vector<float> energies = half_energies(vectors, count, metric);
    const Parts parts = parts_of(vectors, count);
    const int64_t part_count = static_cast<int64_t>(parts.entries.size()) / kPart;
    const VectorSearch search{count, vectors, energies.data(), parts.entries.data(), parts.first_count, part_count,
                              parts.of.data(), correlation, scale, found, rows};
    threads = static_cast<int>(std::clamp<int64_t>(count * rows / kThreadCodes, 1, threads));
    parallel(rows, kTaskRows, threads, [&](int64_t low, int64_t high) {
      kernels.search_vectors(search, low, high, scratch(sum_scratch, part_count)->rows);
    });
  });
}

int pbsp_nearest_points(const char* name, const float* values, float* found, int64_t groups, int threads) {
  return guarded([&] {
    const Kernels& kernels = *kernels_named(name);
    threads = static_cast<int>(std::clamp<int64_t>(groups * kVector / kThreadProducts, 1, threads));
    parallel(groups, kTaskGroups, threads,
             [&](int64_t low, int64_t high) { kernels.nearest_points(values, found, low, high); });
  });
}

int pbsp_read(const uint64_t* words, int64_t count, int threads, uint64_t* sum) {
  return guarded([&] {
    std::atomic<uint64_t> total{0};
    parallel(count, 1 << 17, threads, [&](int64_t low, int64_t high) {
      uint64_t part = 0;
      for (int64_t i = low; i < high; ++i) part += words[i];
      total += part;
    });
    *sum = total;
  });
}
