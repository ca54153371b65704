#include "neon.inc"

const pbsp::Kernels pbsp::kNeon = pbsp::kernels_of<pbsp::Isa>();
