/* The library's interface: plain pointers and numbers, so that any language loads it and no torch header is
 * needed. Functions that return int give 0, or 1 if there was not enough memory; nothing else can fail, for
 * arguments are taken to be valid. Names are "avx512", "avx2", "neon" and "portable". */
#ifndef PBSP_CPU_H
#define PBSP_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PBSP_EXPORT __attribute__((visibility("default")))

typedef struct {
  const uint8_t* layout; /* see planes.hpp */
  const uint8_t* scales; /* as stored, see docs/format.md; so are the offsets */
  const int8_t* offsets;
  int64_t rows;
  int64_t columns;
  int64_t scale_block;
  int32_t planes;
  int32_t patterns[8]; /* N and M of each plane; of a lattice 0 and the bits of a code, 8, 9, 10 or 12 */
  int32_t rotation;    /* size of the Hadamard matrices of the planes' basis; 1: none */
  int32_t shared_scales; /* not 0: each plane's scales are half of those of the one before, and stored once */
  const int8_t* vectors[4]; /* of each lattice, by code: 8 entries between -4 and 4 */
} PbspMatrix;

/* Changes when this file does. */
PBSP_EXPORT int pbsp_abi(void);

/* Whether the kernels of this name are compiled in and this machine has the instructions. */
PBSP_EXPORT int pbsp_supports(const char* name);

/* GOMP_parallel of an OpenMP library whose threads shall do the work; null: threads of our own. */
PBSP_EXPORT void pbsp_use_team(void (*team)(void (*work)(void*), void* argument, unsigned threads, unsigned flags));

/* Bytes of a row of the runtime layout. */
PBSP_EXPORT int64_t pbsp_row_bytes(const PbspMatrix* matrix);

/* Between the stored codes (rows, code bytes) and the runtime layout (rows, row bytes). */
PBSP_EXPORT int pbsp_from_codes(const PbspMatrix* matrix, const uint8_t* codes, uint8_t* layout, int threads);
PBSP_EXPORT int pbsp_to_codes(const PbspMatrix* matrix, uint8_t* codes, int threads);

/* y (x_rows, rows) = x (x_rows, columns) * transposed matrix + bias, x first rotated as the matrix is. x and y are float32, bfloat16 or float16
 * (dtype 0, 1, 2), bias is float32 or null; each number of x becomes 1 to 4 signed bytes, the digits. */
PBSP_EXPORT int pbsp_multiply(const char* name, const PbspMatrix* matrix, const void* x, void* y, int64_t x_rows,
                              int dtype, const float* bias, int digits, int threads);

/* Rows low to high as (high - low, columns) numbers. */
PBSP_EXPORT int pbsp_decode(const char* name, const PbspMatrix* matrix, int64_t low, int64_t high, void* dense,
                            int dtype, int threads);

/* y (x_rows, rows) = x (x_rows, columns) * transposed rows of 8 or 4 bits a number, as embeddings are stored. */
PBSP_EXPORT int pbsp_multiply_rows(const char* name, int bits, const uint8_t* packed, int64_t rows, int64_t columns,
                                   const float* x, int64_t x_rows, float* y, int threads);

/* For every row the code of `group` weights, `kept` of them 1 or -1 and the others 0, that minimises
 * scale * c G c - 2 c . correlation; G is `metric` (group, group), correlation and codes are (group, rows). The
 * group has at most 64 weights, and there are at most 2^20 codes. */
PBSP_EXPORT int pbsp_best_codes(const char* name, int kept, int group, const float* correlation, const float* metric,
                                const float* scale, float* codes, int64_t rows, int threads);

/* The same where a group's code is one of `count` vectors of 8 entries between -4 and 4, or its negative. */
PBSP_EXPORT int pbsp_best_vectors(const char* name, const int8_t* vectors, int64_t count, const float* correlation,
                                  const float* metric, const float* scale, float* found, int64_t rows, int threads);

/* For every group of eight numbers the nearest point of the lattice E8, doubled; both are (groups, 8). */
PBSP_EXPORT int pbsp_nearest_points(const char* name, const float* values, float* found, int64_t groups, int threads);

/* Reads `count` words once, as fast as the memory gives them; the sum keeps a compiler from leaving that out. */
PBSP_EXPORT int pbsp_read(const uint64_t* words, int64_t count, int threads, uint64_t* sum);

#ifdef __cplusplus
}
#endif

#endif
