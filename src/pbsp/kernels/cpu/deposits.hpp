// The table behind deposit.inc, for machines without an instruction for it.
#pragma once

#include <cstdint>

namespace pbsp {
namespace {

struct Deposits {
  uint8_t of[1 << 16];  // by mask, then bits
  uint8_t count[256];   // ones of a mask
  Deposits() : of(), count() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int bit = 0; bit < 8; ++bit) count[mask] += mask >> bit & 1;
      for (int bits = 0; bits < 256; ++bits) {
        int next = 0;
        for (int bit = 0; bit < 8; ++bit) {
          if (mask >> bit & 1) of[mask << 8 | bits] |= static_cast<uint8_t>((bits >> next++ & 1) << bit);
        }
      }
    }
  }
};
const Deposits kDeposits;

}  // namespace
}  // namespace pbsp
