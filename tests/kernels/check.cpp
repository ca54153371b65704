// Checks the compiled kernels against slow, obviously right loops, with buffers of exactly the sizes that the
// interface asks for: built with sanitizers, it finds reads and writes beyond them. Exit code 0 = all is well.
#include "pbsp_cpu.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

struct Case {
  std::vector<int> patterns;
  int64_t rows, columns, scale_block;
  int32_t rotation = 1;
};

std::mt19937 noise(1);

double choose(int n, int k) {
  double result = 1;
  for (int i = 1; i <= k; ++i) result = result * (n - k + i) / i;
  return std::round(result);
}

// Vectors of a lattice's codes: any will do.
const int8_t* vectors() {
  static std::vector<int8_t> table;
  while (table.size() < 8 << 12) table.push_back(static_cast<int8_t>(noise() % 9) - 4);
  return table.data();
}

// Of N:M; of a lattice, whose N is 0, `group` is the bits of a code.
int code_bits(int kept, int group) {
  if (!kept) return group;
  int bits = 0;
  while (std::ldexp(1.0, bits) < choose(group, kept)) ++bits;
  return bits + kept;
}

// Random codes of one plane of a row, and the signs that they stand for.
void make_plane(int kept, int group, int64_t columns, uint8_t* codes, std::vector<int>& signs) {
  const int bits = code_bits(kept, group);
  int64_t at = 0;
  for (int64_t first = 0; !kept && first < columns; first += 8) {
    const uint64_t code = noise() % (1u << bits);
    for (int i = 0; i < 8; ++i) signs[first + i] = vectors()[8 * code + i];
    for (int bit = 0; bit < bits; ++bit, ++at) {
      codes[at / 8] = static_cast<uint8_t>(codes[at / 8] | (code >> bit & 1) << at % 8);
    }
  }
  if (!kept) return;
  for (int64_t first = 0; first < columns; first += group) {
    std::vector<int> places(group, 0);
    for (int left = kept, place = 0; place < group; ++place) {
      if (static_cast<int>(noise() % (group - place)) < left) places[place] = left-- > 0;
    }
    uint64_t rank = 0, plus = 0;
    for (int place = 0, found = 0; place < group; ++place) {
      if (!places[place]) continue;
      const bool up = noise() & 1;
      plus |= static_cast<uint64_t>(up) << found;
      rank += static_cast<uint64_t>(choose(place, found + 1)) * (place > found ? 1 : 0);
      ++found;
      signs[first + place] = up ? 1 : -1;
    }
    const uint64_t code = rank << kept | plus;
    for (int bit = 0; bit < bits; ++bit, ++at) {
      codes[at / 8] = static_cast<uint8_t>(codes[at / 8] | (code >> bit & 1) << at % 8);
    }
  }
}

double scale_of(int code, int offset) {
  const int field = code >> 5, fraction = code & 31;
  return field ? std::ldexp(32.0 + fraction, field - 1 + offset) : std::ldexp(fraction, offset);
}

int failures = 0;

void expect(bool right, const char* what, const Case& with, const char* kernel) {
  if (right) return;
  ++failures;
  std::printf("%s: %s of %d:%d… %ldx%ld/%ld\n", kernel, what, with.patterns[0], with.patterns[1],
              static_cast<long>(with.rows), static_cast<long>(with.columns), static_cast<long>(with.scale_block));
}

// The rotation of docs/format.md, entry by entry.
void turn(const Case& with, const float* x, double* turned) {
  for (int64_t column = 0; column < with.columns; ++column) {
    const int64_t first = column / with.rotation * with.rotation;
    turned[column] = 0;
    for (int64_t i = 0; i < with.rotation; ++i) {
      uint32_t mixed = static_cast<uint32_t>(first + i);
      mixed ^= mixed >> 16;
      mixed *= 0x85ebca6bu;
      mixed ^= mixed >> 13;
      mixed *= 0xc2b2ae35u;
      mixed ^= mixed >> 16;
      const int minus = (mixed & 1u) + __builtin_popcountll(i & (column - first));
      turned[column] += (with.rotation > 1 && minus % 2 ? -1.0 : 1.0) * x[first + i] / std::sqrt(with.rotation);
    }
  }
}

void check(const Case& with) {
  const int planes = static_cast<int>(with.patterns.size() / 2);
  const int64_t blocks = (with.columns + with.scale_block - 1) / with.scale_block;
  std::vector<int64_t> plane_bytes;
  int64_t code_row = 0;
  for (int plane = 0; plane < planes; ++plane) {
    const int kept = with.patterns[2 * plane], group = with.patterns[2 * plane + 1];
    plane_bytes.push_back((with.columns / (kept ? group : 8) * code_bits(kept, group) + 7) / 8);
    code_row += plane_bytes.back();
  }
  std::vector<uint8_t> codes(with.rows * code_row), scales(with.rows * planes * blocks);
  std::vector<int8_t> offsets(planes);
  std::vector<double> dense(with.rows * with.columns);
  for (int plane = 0; plane < planes; ++plane) offsets[plane] = static_cast<int8_t>(-14 - plane);
  for (uint8_t& scale : scales) scale = static_cast<uint8_t>(noise());
  for (int64_t row = 0; row < with.rows; ++row) {
    uint8_t* target = codes.data() + row * code_row;
    for (int plane = 0; plane < planes; ++plane) {
      std::vector<int> signs(with.columns);
      make_plane(with.patterns[2 * plane], with.patterns[2 * plane + 1], with.columns, target, signs);
      for (int64_t column = 0; column < with.columns; ++column) {
        const uint8_t scale = scales[(row * planes + plane) * blocks + column / with.scale_block];
        dense[row * with.columns + column] += signs[column] * scale_of(scale, offsets[plane]);
      }
      target += plane_bytes[plane];
    }
  }
  PbspMatrix matrix{nullptr, scales.data(), offsets.data(), with.rows, with.columns, with.scale_block, planes, {},
                    with.rotation, 0, {}};
  for (size_t i = 0; i < with.patterns.size(); ++i) matrix.patterns[i] = with.patterns[i];
  for (int plane = 0; plane < planes; ++plane) matrix.vectors[plane] = with.patterns[2 * plane] ? nullptr : vectors();
  std::vector<uint8_t> layout(with.rows * pbsp_row_bytes(&matrix));
  expect(pbsp_from_codes(&matrix, codes.data(), layout.data(), 2) == 0, "memory", with, "layout");
  matrix.layout = layout.data();
  std::vector<uint8_t> again(codes.size());
  expect(pbsp_to_codes(&matrix, again.data(), 2) == 0 && again == codes, "codes", with, "layout");

  for (const char* kernel : {"avx512", "avx2", "neon", "portable"}) {
    if (!pbsp_supports(kernel)) continue;
    std::vector<float> decoded(dense.size());
    pbsp_decode(kernel, &matrix, 0, with.rows, decoded.data(), 0, 2);
    double worst = 0;
    for (size_t i = 0; i < dense.size(); ++i) worst = std::fmax(worst, std::fabs(decoded[i] - dense[i]));
    expect(worst <= 1e-6, "decoding", with, kernel);
    for (const int64_t x_rows : {1, 2, 3, 4, 7}) {
      std::vector<float> x(x_rows * with.columns), y(x_rows * with.rows), one(y.size()), bias(with.rows);
      std::normal_distribution<float> normal;
      for (float& number : x) number = normal(noise);
      for (float& number : bias) number = normal(noise);
      std::vector<double> turned(x.size());
      for (int64_t i = 0; i < x_rows; ++i) turn(with, x.data() + i * with.columns, turned.data() + i * with.columns);
      for (int digits = 1; digits <= 3; ++digits) {
        pbsp_multiply(kernel, &matrix, x.data(), y.data(), x_rows, 0, bias.data(), digits, 2);
        pbsp_multiply(kernel, &matrix, x.data(), one.data(), x_rows, 0, bias.data(), digits, 1);
        expect(y == one, "threads", with, kernel);
        for (int64_t i = 0; i < x_rows; ++i) {
          for (int64_t row = 0; row < with.rows; ++row) {
            double exact = bias[row], size = std::fabs(bias[row]);
            for (int64_t column = 0; column < with.columns; ++column) {
              const double part = dense[row * with.columns + column] * turned[i * with.columns + column];
              exact += part;
              size += std::fabs(dense[row * with.columns + column]) * 4;
            }
            const double step = digits == 1 ? 1.0 / 254 : digits == 2 ? 1.0 / 65000 : 1.0 / 8000000;
            expect(std::fabs(y[i * with.rows + row] - exact) <= size * step + 1e-6, "product", with, kernel);
          }
        }
      }
    }
  }
}

// The best code by trying all, against what the library finds.
void check_search(int kept, int group, int64_t rows) {
  const Case with{{kept, group}, rows, group, group};
  std::normal_distribution<float> normal;
  std::vector<float> correlation(group * rows), metric(group * group), scale(rows);
  for (float& number : correlation) number = normal(noise);
  for (int i = 0; i < group; ++i) {
    for (int j = 0; j <= i; ++j) metric[i * group + j] = metric[j * group + i] = (i == j ? 1.0f : 0.1f * normal(noise));
  }
  for (float& number : scale) number = std::fabs(normal(noise));
  for (const char* kernel : {"avx512", "avx2", "neon", "portable"}) {
    if (!pbsp_supports(kernel)) continue;
    std::vector<float> codes(group * rows);
    expect(pbsp_best_codes(kernel, kept, group, correlation.data(), metric.data(), scale.data(), codes.data(), rows,
                           2) == 0, "memory", with, kernel);
    for (int64_t row = 0; row < rows; ++row) {
      const auto loss = [&](const float* code, int64_t step) {
        double energy = 0, dot = 0;
        for (int i = 0; i < group; ++i) {
          dot += code[i * step] * correlation[i * rows + row];
          for (int j = 0; j < group; ++j) energy += code[i * step] * metric[i * group + j] * code[j * step];
        }
        return scale[row] * energy - 2 * dot;
      };
      double best = HUGE_VAL;
      int64_t all = 1;
      for (int i = 0; i < group; ++i) all *= 3;
      for (int64_t number = 0; number < all; ++number) {
        std::vector<float> code(group);
        int used = 0;
        for (int64_t i = 0, left = number; i < group; ++i, left /= 3) {
          code[i] = static_cast<float>(left % 3 - 1);
          used += code[i] != 0;
        }
        if (used == kept) best = std::fmin(best, loss(code.data(), 1));
      }
      expect(std::fabs(loss(codes.data() + row, rows) - best) <= 1e-4, "search", with, kernel);
    }
  }
}

// The best vector or negative by trying all, against what the library finds.
void check_vectors(int64_t count, int64_t rows) {
  const Case with{{0, 8}, rows, 8, 8};
  std::normal_distribution<float> normal;
  std::vector<int8_t> table(vectors(), vectors() + 8 * count);
  std::vector<float> correlation(8 * rows), metric(64), scale(rows);
  for (float& number : correlation) number = normal(noise);
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j <= i; ++j) metric[i * 8 + j] = metric[j * 8 + i] = (i == j ? 1.0f : 0.1f * normal(noise));
  }
  for (float& number : scale) number = std::fabs(normal(noise));
  for (const char* kernel : {"avx512", "avx2", "neon", "portable"}) {
    if (!pbsp_supports(kernel)) continue;
    std::vector<float> found(8 * rows);
    expect(pbsp_best_vectors(kernel, table.data(), count, correlation.data(), metric.data(), scale.data(), found.data(),
                             rows, 2) == 0, "memory", with, kernel);
    for (int64_t row = 0; row < rows; ++row) {
      const auto loss = [&](const auto& entry) {
        double energy = 0, dot = 0;
        for (int i = 0; i < 8; ++i) {
          dot += entry(i) * correlation[i * rows + row];
          for (int j = 0; j < 8; ++j) energy += entry(i) * metric[i * 8 + j] * entry(j);
        }
        return scale[row] * energy - 2 * dot;
      };
      double best = HUGE_VAL;
      for (int64_t index = 0; index < 2 * count; ++index) {
        const double sign = index < count ? 1 : -1;
        best = std::fmin(best, loss([&](int i) { return sign * table[8 * (index % count) + i]; }));
      }
      const double ours = loss([&](int i) { return static_cast<double>(found[i * rows + row]); });
      expect(std::fabs(ours - best) <= 1e-3, "vectors", with, kernel);
    }
  }
}

// The nearest points of E8: none of the 240 next to one is nearer, which is enough for a lattice.
void check_points(int64_t groups) {
  const Case with{{0, 8}, groups, 8, 8};
  std::normal_distribution<float> normal;
  std::vector<float> values(8 * groups);
  for (float& number : values) number = 3 * normal(noise);
  for (const char* kernel : {"avx512", "avx2", "neon", "portable"}) {
    if (!pbsp_supports(kernel)) continue;
    std::vector<float> found(8 * groups);
    expect(pbsp_nearest_points(kernel, values.data(), found.data(), groups, 2) == 0, "memory", with, kernel);
    for (int64_t group = 0; group < groups; ++group) {
      const float *value = &values[8 * group], *point = &found[8 * group];
      const auto apart = [&](const auto& step) {
        double sum = 0;
        for (int i = 0; i < 8; ++i) sum += std::pow(value[i] - point[i] - step(i), 2);
        return sum;
      };
      const double ours = apart([](int) { return 0; });
      for (int index = 0; index < 2 * 120; ++index) {
        const int8_t* step = vectors() + 8 * (index % 120);
        const int sign = index < 120 ? 1 : -1;
        expect(apart([&](int i) { return sign * step[i]; }) >= ours - 1e-4, "points", with, kernel);
      }
    }
  }
}

}  // namespace

int main() {
  for (const std::vector<int>& patterns : std::vector<std::vector<int>>{
           {4, 8}, {2, 16}, {1, 4}, {2, 8}, {4, 16}, {8, 8}, {3, 8}, {5, 8}, {8, 16}, {1, 24}, {4, 8, 2, 8},
           {2, 8, 8, 8, 1, 4, 2, 4}}) {
    int group = 1;
    for (size_t i = 1; i < patterns.size(); i += 2) group = patterns[i] > group ? patterns[i] : group;
    for (const int64_t groups : {1, 3, 8, 17}) {
      for (const int64_t block : {7, 64, 128, 192}) check({patterns, 3, groups * group, block});
    }
  }
  check({{4, 8}, 5, 392, 128});
  check({{3, 6}, 1, 390, 128});
  check({{11, 12}, 2, 1200, 192});
  check({{1, 200}, 2, 400, 400});
  check({{4, 8}, 300, 1024, 128});  // large enough for two threads
  check({{4, 8}, 3, 576, 128, 64});
  check({{3, 8, 1, 4}, 5, 48, 20, 16});
  check({{2, 8}, 2, 1024, 1024, 1024});
  for (const int bits : {8, 9, 10, 12}) {
    for (const int64_t columns : {8, 64, 72, 200}) {
      for (const int64_t block : {7, 64, 128}) check({{0, bits}, 3, columns, block});
    }
  }
  check({{0, 12, 0, 8}, 5, 576, 128, 64});
  check({{4, 8, 0, 9, 2, 8}, 3, 136, 128});
  check({{0, 8}, 300, 1024, 128});
  for (const int64_t rows : {1, 15, 33}) {
    for (int kept = 1; kept <= 6; ++kept) check_search(kept, 6, rows);
    check_vectors(128, rows);
    check_points(rows);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
