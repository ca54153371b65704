// Float formats of 16 bits, in plain integer arithmetic that compilers vectorize.
#pragma once

#include <cstdint>
#include <cstring>

#include "planes.hpp"

namespace pbsp {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t bits = bits_of(float_of(magnitude) * float_of(0x77800000u)) | special;  // · 2^112
  return float_of(bits | (half & 0x8000u) << 16);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value);
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to steps of 2^-24
  } else {
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    half = (magnitude - 0x38000000u) >> 13;
  }
  return static_cast<uint16_t>(half | bits >> 31 << 15);
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void load_row(const void* source, Dtype dtype, int64_t first, int64_t count, float* row) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(row, static_cast<const float*>(source) + first, count * sizeof(float));
    return;
  }
  const uint16_t* numbers = static_cast<const uint16_t*>(source) + first;
  if (dtype == Dtype::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) row[i] = float_of(static_cast<uint32_t>(numbers[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = half_to_float(numbers[i]);
  }
}

inline void store_row(const float* row, Dtype dtype, int64_t first, int64_t count, void* target) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(target) + first, row, count * sizeof(float));
    return;
  }
  uint16_t* numbers = static_cast<uint16_t*>(target) + first;
  if (dtype == Dtype::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) numbers[i] = float_to_bfloat(row[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) numbers[i] = float_to_half(row[i]);
  }
}

}  // namespace
}  // namespace pbsp
