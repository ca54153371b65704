// Rows of the matrix times rows of activations; a part of isa.hpp.
#pragma once

#include "numbers.hpp"
#include "planes.hpp"
#include "rows.hpp"

namespace pbsp {
namespace {

// How a plane's weights are at hand: a bit for what is kept and one for what is plus, signs that are still to be
// spread, or codes of a lattice.
enum class Form { kBits, kSigns, kCodes };

// Sums of a block: `W` rows of the matrix, `X` rows of activations, `D` digits of each number.
template <class Isa, int W, int X, int D>
struct Dots {
  typename Isa::Ints at[W][X][D];

  template <Form F>
  inline void start(const int32_t* starts) {
    for (int x = 0; x < X; ++x) {
      for (int digit = 0; digit < D; ++digit) {
        for (int w = 0; w < W; ++w) {
          at[w][x][digit] = Isa::kLanes ? Isa::load(starts + (x * D + digit) * Isa::kLanes) : Isa::zero();
          if (Isa::kLanes && F == Form::kCodes) at[w][x][digit] = Isa::raised_start(at[w][x][digit]);
        }
      }
    }
  }
  template <Form F>
  inline void add(const Plane& plane, const Row (&rows)[W], int64_t chunk, const int8_t* digits) {
    typename Isa::Weights weights[W];
    for (int w = 0; w < W; ++w) {
      if (F == Form::kCodes) {
        uint64_t vectors[kChunk / kVector];
        load_vectors(plane, rows[w].signs + plane.code_bits * chunk, vectors);
        weights[w] = Isa::vectors(vectors);
        continue;
      }
      const uint64_t support = load_word(rows[w].support + 8 * chunk);
      const uint64_t plus = F == Form::kSigns
                                ? Isa::deposit(load_word(rows[w].signs + rows[w].sign_bytes * chunk), support)
                                : rows[w].plus[chunk];
      weights[w] = Isa::weights(support, plus);
    }
    for (int x = 0; x < X; ++x) {
      for (int digit = 0; digit < D; ++digit) {
        for (int w = 0; w < W; ++w) {
          at[w][x][digit] = Isa::dot(at[w][x][digit], weights[w], digits + (x * D + digit) * kChunk);
        }
      }
    }
  }
  inline typename Isa::Floats value(int w, int x) const {
    typename Isa::Floats sum = Isa::to_float(at[w][x][D - 1]);
    for (int digit = D - 2; digit >= 0; --digit) {
      sum = Isa::multiply_add(sum, Isa::broadcast(256.0f), Isa::to_float(at[w][x][digit]));
    }
    return sum;
  }
};

// Adds one plane of W rows times X rows of activations. `Chunks` is how many a scale block has, 0 for any
// number and for blocks that are no whole chunks.
template <class Isa, int W, int X, int D, int Chunks, Form F>
inline void add_plane(const Product& product, const Tile& tile, const Row (&rows)[W], int64_t row, int number,
                      typename Isa::Floats (&sums)[W][X]) {
  const Matrix& matrix = *product.matrix;
  const int64_t blocks = matrix.blocks;
  const int64_t next_scales = matrix.row_scales;
  const Plane& plane = matrix.plane[number];
  const uint8_t* scales = matrix.scales + row * next_scales + plane.scales_at;
  const float* scale_of = matrix.scale_of[number];
  const float* units = tile.units;
  const int32_t* starts = tile.starts;
  const int8_t* digits = tile.digits;
  const int64_t whole_blocks = Chunks ? matrix.chunks / (Chunks ? Chunks : 1) : 0;
  Dots<Isa, W, X, D> dots;
  const auto end_block = [&](int64_t block) __attribute__((always_inline)) {
    for (int x = 0; x < X; ++x) {
      const typename Isa::Floats unit = Isa::broadcast(units[x]);
      for (int w = 0; w < W; ++w) {
        const typename Isa::Floats scale = Isa::broadcast(scale_of[scales[w * next_scales + block]]);
        sums[w][x] = Isa::multiply_add(Isa::multiply(dots.value(w, x), unit), scale, sums[w][x]);
      }
    }
    units += X;
    starts += X * D * Isa::kLanes;
  };
  int64_t block = 0;
  for (; block < whole_blocks; ++block) {
    dots.template start<F>(starts);
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      dots.template add<F>(plane, rows, block * Chunks + chunk, digits);
      digits += X * D * kChunk;
    }
    end_block(block);
  }
  int64_t segment = Chunks * whole_blocks;
  for (; block < blocks; ++block) {
    dots.template start<F>(starts);
    for (; segment < product.block_ends[block]; ++segment) {
      dots.template add<F>(plane, rows, product.segments[segment].chunk, digits);
      digits += X * D * kChunk;
    }
    end_block(block);
  }
}

template <class Isa, int W, int X, int D, Form F>
inline void add_blocks(const Product& product, const Tile& tile, const Row (&rows)[W], int64_t row, int number,
                       typename Isa::Floats (&sums)[W][X]) {
  switch (product.matrix->scale_block) {
    case 2 * kChunk: return add_plane<Isa, W, X, D, 2, F>(product, tile, rows, row, number, sums);
    case 3 * kChunk: return add_plane<Isa, W, X, D, 3, F>(product, tile, rows, row, number, sums);
    default: return add_plane<Isa, W, X, D, 0, F>(product, tile, rows, row, number, sums);
  }
}

template <class Isa, int W, int X, int D>
inline void multiply_tile(const Product& product, const Tile& tile, const Row* expanded, int64_t row) {
  const Matrix& matrix = *product.matrix;
  if (X == 1) {
    for (int w = 0; w < W; ++w) fetch_ahead(matrix, row + w);
  }
  typename Isa::Floats sums[W][X];
  for (int w = 0; w < W; ++w) {
    for (int x = 0; x < X; ++x) sums[w][x] = Isa::broadcast(0.0f);
  }
  for (int number = 0; number < matrix.planes; ++number) {
    Row rows[W];
    for (int w = 0; w < W; ++w) rows[w] = expanded[w * kMaxPlanes + number];
    if (matrix.plane[number].code_bits) {
      add_blocks<Isa, W, X, D, Form::kCodes>(product, tile, rows, row, number, sums);
    } else if (X == 1 && !rows[0].plus) {
      add_blocks<Isa, W, X, D, X == 1 ? Form::kSigns : Form::kBits>(product, tile, rows, row, number, sums);
    } else {
      add_blocks<Isa, W, X, D, Form::kBits>(product, tile, rows, row, number, sums);
    }
  }
  for (int w = 0; w < W; ++w) {
    for (int x = 0; x < X; ++x) {
      const float y = Isa::total(sums[w][x]) + (product.bias ? product.bias[row + w] : 0.0f);
      store_row(&y, product.dtype, (tile.first_row + x) * matrix.rows + row + w, 1, product.y);
    }
  }
}

// Rows low…high, two at a time where the registers allow it.
template <class Isa, int X, int D>
void multiply_tiles(const Product& product, const Tile& tile, const Row* rows, int64_t low, int64_t high) {
  constexpr int kPair = 2 * X * D <= Isa::kAccumulators ? 2 : 1;
  int64_t row = low;
  for (; row + kPair <= high; row += kPair, rows += kPair * kMaxPlanes) {
    multiply_tile<Isa, kPair, X, D>(product, tile, rows, row);
  }
  for (; row < high; ++row, rows += kMaxPlanes) multiply_tile<Isa, 1, X, D>(product, tile, rows, row);
}

template <class Isa, int X>
inline void multiply_digits(const Product& product, const Tile& tile, const Row* rows, int64_t low,
                            int64_t high) {
  switch (product.digits) {
    case 1: return multiply_tiles<Isa, X, 1>(product, tile, rows, low, high);
    case 2: return multiply_tiles<Isa, X, 2>(product, tile, rows, low, high);
    case 3: return multiply_tiles<Isa, X, 3>(product, tile, rows, low, high);
    default: return multiply_tiles<Isa, X, 4>(product, tile, rows, low, high);
  }
}

// Rows low…high of the matrix times all activations; `words` is as `word_count` says.
template <class Isa>
void multiply_rows(const Product& product, int64_t low, int64_t high, uint64_t* words) {
  const Matrix& matrix = *product.matrix;
  // Rows of the matrix that meet only one row of activations are spread in passing.
  const bool once = product.tile_count == 1 && product.tiles[0].rows == 1;
  for (int64_t first = low; first < high; first += kGroupRows) {
    const int64_t last = first + kGroupRows < high ? first + kGroupRows : high;
    Row rows[kGroupRows * kMaxPlanes];
    uint64_t* plus = words + matrix.chunks;
    for (int64_t row = first; row < last; ++row) {
      if (!once) fetch_ahead(matrix, row);
      for (int number = 0; number < matrix.planes; ++number, plus += matrix.chunks) {
        Row& expanded = rows[(row - first) * kMaxPlanes + number];
        expanded = row_of(matrix, matrix.plane[number], row);
        if (!matrix.plane[number].code_bits && (!once || !expanded.sign_bytes)) {
          expanded = expand<Isa>(matrix, matrix.plane[number], row, words, plus);
        }
      }
    }
    for (int64_t index = 0; index < product.tile_count; ++index) {
      const Tile& tile = product.tiles[index];
      if (tile.rows == Isa::kTileRows) {
        multiply_digits<Isa, Isa::kTileRows>(product, tile, rows, first, last);
      } else if (tile.rows == 1) {
        multiply_digits<Isa, 1>(product, tile, rows, first, last);
      } else if (tile.rows == 2) {
        multiply_digits<Isa, Isa::kTileRows < 2 ? 1 : 2>(product, tile, rows, first, last);
      } else {
        multiply_digits<Isa, Isa::kTileRows < 3 ? 1 : 3>(product, tile, rows, first, last);
      }
    }
  }
}

}  // namespace
}  // namespace pbsp
