// The runtime layout of packed planes and what a product of it with activations is described by.
//
// A row of the layout holds, plane by plane, the signs of its kept weights as a bit stream in order of
// position (1 = plus), then a bit for every column (1 = kept) in 64-bit words, little-endian. Of a lattice it holds
// the codes as they are stored, whole bytes of them for every 64 columns. Where all
// weights of a plane are kept there are no support words, and the sign words are whole. Bits beyond the
// last column are zero. Signs come first: a sign word that is read a few bytes too far stays in the row.
//
// Only plain structs: files compiled for one instruction set include this, and an inline function of a
// header may be linked from any of them.
#pragma once

#include <cstdint>

namespace pbsp {

constexpr int kMaxPlanes = 4;
constexpr int kVector = 8;        // entries of a lattice's vectors
constexpr int kLargestEntry = 4;  // of them
constexpr int kEntryValues = 2 * kLargestEntry + 1;
constexpr int kChunk = 64;  // columns of a support word
constexpr int kMaxDigits = 4;
constexpr int64_t kGroupRows = 8;  // rows of the matrix that are expanded before all activations meet them

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Plane {
  int kept;
  int group;
  int code_bits;           // of a lattice's vector; 0: the plane is N:M
  const int8_t* vectors;   // of a lattice, by code
  int64_t signs_at;    // byte of a row where the signs, or codes, begin
  int64_t support_at;  // byte of a row where the support words begin; none if kept == group
  int64_t chunk_bits;  // signs of a chunk, if all chunks have as many; else 0
  int64_t scales_at;   // code of a row of scales where the plane's begin
};

struct Matrix {
  const uint8_t* layout;
  const uint8_t* scales;  // E3M5 codes: per row the blocks of plane 0, then of plane 1…, unless they are shared
  int64_t rows;
  int64_t columns;
  int64_t row_bytes;
  int64_t chunks;
  int64_t scale_block;
  int64_t blocks;
  int64_t row_scales;  // codes of a row
  bool shared_scales;  // each plane's are half of those of the one before, and stored once
  int64_t rotation;  // columns of a Hadamard matrix; 1: none
  int planes;
  Plane plane[kMaxPlanes];
  float scale_of[kMaxPlanes][256];
};

// A chunk, or the part of one that lies in one scale block.
struct Segment {
  int64_t chunk;
  int64_t first;  // column
  int64_t count;
};

// Some rows of activations as integers: x ≈ unit · Σ_d digit_d · 256^d, one unit for each row and block.
struct Tile {
  int64_t first_row;
  int rows;
  int8_t* digits;   // segment, row, digit, 64 columns
  int32_t* starts;  // block, row, digit, lanes: minus the digits' sums, for kernels that count from −1
  float* units;     // block, row
};

struct Product {
  const Matrix* matrix;
  const Segment* segments;
  const int64_t* block_ends;  // the segment behind each block's last
  int64_t segment_count;
  const Tile* tiles;
  int64_t tile_count;
  int digits;
  const float* bias;  // or null
  void* y;            // (activation rows, matrix rows)
  Dtype dtype;
};

// y (x_rows, rows) = x (x_rows, columns) · transposed quantized rows, see quantized_rows.hpp.
struct RowProduct {
  const uint8_t* packed;
  int64_t rows;
  int64_t columns;
  const float* x;
  int64_t x_rows;
  float* y;
};

constexpr int kSearchGroup = 64;  // weights of the widest group that is searched
constexpr int kSearchRows = 32;   // rows that are searched at a time, at most
constexpr int kPart = 4;          // entries of half a lattice's vector

// The best codes of one group of every row, see search.hpp.
struct CodeSearch {
  int kept;
  int group;
  int64_t supports;             // choices of `kept` of `group` places
  int signings;                 // of each, the first sign being plus: 2^(kept − 1)
  const uint8_t* places;        // (supports, kept), ascending
  const float* half_energies;   // (supports, signings): cᵀ G c / 2, signs in the order of a Gray code
  const float* correlation;     // (group, rows)
  const float* scale;           // (rows), not negative
  float* codes;                 // (group, rows): −1, 0 or 1
  int64_t rows;
};

// The best vectors of one group of every row, see search.hpp.
struct VectorSearch {
  int64_t count;
  const int8_t* vectors;       // (count, kVector), −kLargestEntry to kLargestEntry; the negatives are meant, too
  const float* half_energies;  // vᵀ G v / 2
  const int8_t* parts;         // (part_count, kPart), the different first halves of vectors, then the last ones
  int64_t first_parts;
  int64_t part_count;
  const uint16_t* parts_of;    // (count, 2), each vector's two
  const float* correlation;    // (kVector, rows)
  const float* scale;          // (rows), not negative
  float* found;                // (kVector, rows)
  int64_t rows;
};

// What one instruction set offers; see isa.hpp.
struct Kernels {
  const char* name;
  int tile_rows;
  int lanes;  // int32 numbers of `Tile::starts` for each block, row and digit; 0 for none
  void (*prepare)(const Product& product, const Tile& tile, const void* x, float* row);
  void (*multiply)(const Product& product, int64_t low, int64_t high, uint64_t* words);
  void (*decode)(const Matrix& matrix, int64_t low, int64_t high, void* dense, Dtype dtype, uint64_t* words,
                 float* row);
  void (*bytes)(const RowProduct& product, int64_t low, int64_t high);
  void (*nibbles)(const RowProduct& product, int64_t low, int64_t high);
  void (*search)(const CodeSearch& search, int64_t low, int64_t high);
  void (*search_vectors)(const VectorSearch& search, int64_t low, int64_t high, float* sums);
  void (*nearest_points)(const float* values, float* found, int64_t low, int64_t high);
};

// Words that `multiply` and `decode` are given to work in; the first `chunks` of them are ones.
constexpr int64_t word_count(const Matrix& matrix) { return (kGroupRows * matrix.planes + 1) * matrix.chunks; }

}  // namespace pbsp
