// The kernels of each instruction set, and which of them this machine can run.
#pragma once

#include "planes.hpp"

namespace pbsp {

extern const Kernels kPortable;
#if defined(PBSP_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(PBSP_ARM64)
extern const Kernels kNeon;
extern const Kernels kNeonDot;
#endif

// Those of this name, or null if they are not compiled in or this machine lacks the instructions.
const Kernels* kernels_named(const char* name);

}  // namespace pbsp
