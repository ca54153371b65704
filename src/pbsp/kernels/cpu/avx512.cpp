// AVX-512 with VNNI and BMI2: 64 weights in one register, 64 products in one instruction.
#include <immintrin.h>

#include "isa.hpp"
#include "kernels.hpp"

namespace pbsp {
namespace {

struct Isa {
  static constexpr const char* kName = "avx512";
  static constexpr int kTileRows = 4;
  static constexpr int kLanes = 16;
  static constexpr int kFloatLanes = 16;
  static constexpr int kAccumulators = 12;
  using Ints = __m512i;
  using Floats = __m512;
  using Weights = __m512i;

  static uint64_t deposit(uint64_t bits, uint64_t mask) { return _pdep_u64(bits, mask); }

  // vpdpbusd multiplies unsigned by signed bytes, so a weight is given as one more than it is.
  static Weights weights(uint64_t support, uint64_t plus) {
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i raised = _mm512_mask_mov_epi8(ones, support, _mm512_setzero_si512());
    return _mm512_mask_mov_epi8(raised, plus, _mm512_set1_epi8(2));
  }
  // Raised by the largest entry.
  static Weights vectors(const uint64_t (&of)[8]) {
    const auto at = [&](int index) { return static_cast<long long>(of[index]); };
    return _mm512_add_epi8(_mm512_set_epi64(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0)), _mm512_set1_epi8(kLargestEntry));
  }
  static Ints raised_start(Ints start) { return _mm512_mullo_epi32(start, _mm512_set1_epi32(kLargestEntry)); }
  static Ints dot(Ints sums, Weights weights, const int8_t* digits) {
    return _mm512_dpbusd_epi32(sums, weights, _mm512_loadu_si512(digits));
  }
  static Ints load(const int32_t* lanes) { return _mm512_loadu_si512(lanes); }
  static Ints zero() { return _mm512_setzero_si512(); }
  static Floats to_float(Ints values) { return _mm512_cvtepi32_ps(values); }
  static Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(Floats values) { return _mm512_reduce_add_ps(values); }
  static void add_16(uint16_t support, uint16_t plus, float scale, float* row) {
    const __m512 minus = _mm512_set1_ps(-scale);
    const __m512 signed_scale = _mm512_mask_mov_ps(minus, plus, _mm512_set1_ps(scale));
    const __m512 before = _mm512_loadu_ps(row);
    _mm512_storeu_ps(row, _mm512_mask_add_ps(before, support, before, signed_scale));
  }
};

}  // namespace

const Kernels kAvx512 = kernels_of<Isa>();

}  // namespace pbsp
