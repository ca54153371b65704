// Stored codes to the runtime layout and back; docs/format.md describes the codes.
#pragma once

#include <cstdint>

#include "planes.hpp"

namespace pbsp {

// Sets the planes' places in a row and `row_bytes`, from patterns, columns and scale_block.
void lay_out(Matrix& matrix);

// Bytes that the codes of a row take.
int64_t code_bytes(const Matrix& matrix);

// The codes must be valid.
void codes_to_layout(const Matrix& matrix, const uint8_t* codes, uint8_t* layout, int threads);
void layout_to_codes(const Matrix& matrix, uint8_t* codes, int threads);

}  // namespace pbsp
