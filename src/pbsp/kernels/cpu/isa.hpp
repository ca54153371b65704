// Products and decoding of matrix rows, written once for all instruction sets.
//
// A file for one of them defines a struct `Isa` and instantiates `kernels_of<Isa>()`. Everything here has
// internal linkage, so that no other file can end up calling code for a machine it does not run on; for
// the same reason nothing of the standard library is used but memcpy.
//
//   kName, kTileRows, kLanes       see `Kernels`
//   kFloatLanes                    floats of a register
//   kAccumulators                  sums of integers that fit the registers
//   Ints, Floats, Weights          lanes of int32 and float; 64 weights of −1, 0 or 1
//   deposit(bits, mask)            the low bits, spread to where the mask has ones
//   weights(support, plus)         from a bit for each weight
//   vectors(words)                 from eight words of eight signed bytes
//   dot(sums, weights, digits)     adds 64 products; each weight counts one more than it is if kLanes > 0, those of
//                                  vectors kLargestEntry more: `raised_start` is the start for them
//   load, zero, to_float, broadcast, multiply, multiply_add, total
//   add_16(support, plus, scale, row)   row[i] ± scale for 16 weights
#pragma once

#include "decode.hpp"
#include "lattice.hpp"
#include "multiply.hpp"
#include "planes.hpp"
#include "prepare.hpp"
#include "quantized_rows.hpp"
#include "search.hpp"

namespace pbsp {
namespace {

template <class Isa>
constexpr Kernels kernels_of() {
  return {Isa::kName, Isa::kTileRows, Isa::kLanes, prepare_tile<Isa>, multiply_rows<Isa>, decode_rows<Isa>,
          multiply_quantized<ByteRows>, multiply_quantized<NibbleRows>, search_codes<Isa>,
          search_vectors<Isa>, nearest_points};
}

}  // namespace
}  // namespace pbsp
