// AVX2 with FMA and BMI2.
#include <immintrin.h>

#include "isa.hpp"
#include "kernels.hpp"

namespace pbsp {
namespace {

struct Isa {
  static constexpr const char* kName = "avx2";
  static constexpr int kTileRows = 2;  // more would not fit the 16 registers
  static constexpr int kLanes = 8;
  static constexpr int kFloatLanes = 8;
  static constexpr int kAccumulators = 6;
  using Ints = __m256i;
  using Floats = __m256;
  struct Weights {
    __m256i low, high;
  };

  static uint64_t deposit(uint64_t bits, uint64_t mask) { return _pdep_u64(bits, mask); }

  // −1 in every byte whose bit is set.
  static __m256i spread(uint32_t bits) {
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
  }
  // maddubs multiplies unsigned by signed bytes, so a weight is given as one more than it is.
  static __m256i raised(uint32_t support, uint32_t plus) {
    const __m256i twice_plus = _mm256_slli_epi16(_mm256_abs_epi8(spread(plus)), 1);
    return _mm256_add_epi8(_mm256_add_epi8(_mm256_set1_epi8(1), spread(support)), twice_plus);
  }
  static Weights weights(uint64_t support, uint64_t plus) {
    return {raised(static_cast<uint32_t>(support), static_cast<uint32_t>(plus)),
            raised(static_cast<uint32_t>(support >> 32), static_cast<uint32_t>(plus >> 32))};
  }
  // Raised by the largest entry.
  static Weights vectors(const uint64_t (&of)[8]) {
    const auto four = [&](int at) {
      const __m256i signed_bytes =
          _mm256_set_epi64x(static_cast<long long>(of[at + 3]), static_cast<long long>(of[at + 2]),
                            static_cast<long long>(of[at + 1]), static_cast<long long>(of[at]));
      return _mm256_add_epi8(signed_bytes, _mm256_set1_epi8(kLargestEntry));
    };
    return {four(0), four(4)};
  }
  static Ints raised_start(Ints start) { return _mm256_mullo_epi32(start, _mm256_set1_epi32(kLargestEntry)); }
  static Ints dot(Ints sums, const Weights& weights, const int8_t* digits) {
    const __m256i* source = reinterpret_cast<const __m256i*>(digits);
    const __m256i low = _mm256_maddubs_epi16(weights.low, _mm256_loadu_si256(source));
    const __m256i high = _mm256_maddubs_epi16(weights.high, _mm256_loadu_si256(source + 1));
    // Four products of at most 2 · 128, or 8 · 128, fit 16 bits.
    const __m256i pairs = _mm256_add_epi16(low, high);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Ints load(const int32_t* lanes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  }
  static Ints zero() { return _mm256_setzero_si256(); }
  static Floats to_float(Ints values) { return _mm256_cvtepi32_ps(values); }
  static Floats broadcast(float value) { return _mm256_set1_ps(value); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(Floats values) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
  }
  static void add_16(uint16_t support, uint16_t plus, float scale, float* row) {
    add_8(support & 255, plus & 255, scale, row);
    add_8(support >> 8, plus >> 8, scale, row + 8);
  }
  static void add_8(int support, int plus, float scale, float* row) {
    const __m256i bit_of = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(support), bit_of), bit_of);
    const __m256i up = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(plus), bit_of), bit_of);
    const __m256 sign = _mm256_andnot_ps(_mm256_castsi256_ps(up), _mm256_set1_ps(-0.0f));
    const __m256 weight = _mm256_and_ps(_mm256_castsi256_ps(kept), _mm256_xor_ps(_mm256_set1_ps(scale), sign));
    _mm256_storeu_ps(row, _mm256_add_ps(_mm256_loadu_ps(row), weight));
  }
};

}  // namespace

const Kernels kAvx2 = kernels_of<Isa>();

}  // namespace pbsp
