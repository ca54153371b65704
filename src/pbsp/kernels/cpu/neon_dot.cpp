#include "neon.inc"

const pbsp::Kernels pbsp::kNeonDot = pbsp::kernels_of<pbsp::Isa>();
