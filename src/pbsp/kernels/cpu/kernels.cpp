#include "kernels.hpp"

#include <cstring>

#if defined(PBSP_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace pbsp {
namespace {

bool is(const char* name, const Kernels& kernels) { return std::strcmp(name, kernels.name) == 0; }

#if defined(PBSP_ARM64)
bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Mac with an ARM processor
#endif
}
#endif

}  // namespace

const Kernels* kernels_named(const char* name) {
  if (is(name, kPortable)) return &kPortable;
#if defined(PBSP_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  if (is(name, kAvx2) && avx2) return &kAvx2;
  if (is(name, kAvx512) && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return &kAvx512;
  }
#elif defined(PBSP_ARM64)
  if (is(name, kNeon)) return has_dot_product() ? &kNeonDot : &kNeon;
#endif
  return nullptr;
}

}  // namespace pbsp
