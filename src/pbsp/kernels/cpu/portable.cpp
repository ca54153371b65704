// Plain C++: runs everywhere, and the compiler vectorizes what it can for the machine's oldest kind.
#include "deposits.hpp"
#include "isa.hpp"
#include "kernels.hpp"

namespace pbsp {
namespace {

// For each byte, its bits as eight bytes of 0 or 1.
struct Bytes {
  uint64_t of[256];
  constexpr Bytes() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) of[byte] |= static_cast<uint64_t>(byte >> bit & 1) << 8 * bit;
    }
  }
};
constexpr Bytes kBytes;

struct Isa {
  static constexpr const char* kName = "portable";
  static constexpr int kTileRows = 1;
  static constexpr int kLanes = 0;
  static constexpr int kFloatLanes = 4;
  static constexpr int kAccumulators = 1;
  using Ints = int32_t;
  using Floats = double;  // one lane alone adds all blocks: floats would round more than several lanes do
  struct Weights {
    int8_t at[kChunk];
  };

#include "deposit.inc"

  static Weights weights(uint64_t support, uint64_t plus) {
    Weights result;
    for (int byte = 0; byte < 8; ++byte) {
      const uint64_t kept = kBytes.of[support >> 8 * byte & 255];
      // 1 + 2·plus − kept in every byte, without borrows; one less is the weight.
      const uint64_t raised = 0x0101010101010101u + 2 * kBytes.of[plus >> 8 * byte & 255] - kept;
      std::memcpy(result.at + 8 * byte, &raised, 8);
    }
    for (int i = 0; i < kChunk; ++i) result.at[i] = static_cast<int8_t>(result.at[i] - 1);
    return result;
  }
  static Weights vectors(const uint64_t (&of)[8]) {
    Weights result;
    std::memcpy(result.at, of, sizeof result.at);
    return result;
  }
  static Ints raised_start(Ints start) { return start; }
  static Ints dot(Ints sum, const Weights& weights, const int8_t* digits) {
    for (int i = 0; i < kChunk; ++i) sum += weights.at[i] * digits[i];
    return sum;
  }
  static Ints load(const int32_t*) { return 0; }
  static Ints zero() { return 0; }
  static Floats to_float(Ints value) { return value; }
  static Floats broadcast(float value) { return value; }
  static Floats multiply(Floats a, Floats b) { return a * b; }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
  static float total(Floats value) { return static_cast<float>(value); }
  static void add_16(uint16_t support, uint16_t plus, float scale, float* row) {
    for (int i = 0; i < 16; ++i) {
      const int weight = 2 * (plus >> i & 1) - (support >> i & 1);
      row[i] += static_cast<float>(weight) * scale;
    }
  }
};

}  // namespace

const Kernels kPortable = kernels_of<Isa>();

}  // namespace pbsp
