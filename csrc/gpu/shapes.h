// How a row is cut among the threads that work on it. This decides in which order the squares are added, so the bits of
// the result depend on it, and it is part of the numerical contract. It is the same on every GPU for rows of up to 8192
// vectors (65536 elements of 16 bits, or 32768 of float32). For longer rows, GPUs with clusters have a shape of their
// own, and the others read the row in two passes. Everything else is decided in tuning.h, which cannot change a bit.
#pragma once

#include <cstdint>

namespace gemma_norm {

constexpr int32_t kVectorBytes = 16;

// A row is cut into 16-byte vectors. Slot t, usually a thread, owns vectors t, t + slots, t + 2 slots, ... If hidden is
// not a multiple of the number of elements in a vector, rows can start at any alignment. The elements of a slot's
// vector then lie `slots` apart in the row, so that neighbouring threads still access neighbouring memory.
struct Shape {
  int64_t row_vectors;  // the largest row, in vectors
  int32_t vectors;      // how many a slot owns
  bool needs_clusters = false;
};

// The first entry whose row_vectors is at least that of the row is used. With few vectors a slot, a single row is done
// soonest. With more of them, many rows are.
constexpr Shape kShapes[] = {{64, 2}, {128, 4}, {512, 2}, {1024, 4}, {8192, 8}, {65536, 8, true}};

// The number of slots of rows that are too large for registers and are read in two passes.
constexpr int32_t kTwoPassSlots = 512;

// The shape of a row; null if it is read in two passes.
constexpr const Shape* find_shape(int64_t row_vectors, bool has_clusters) {
  for (const Shape& shape : kShapes)
    if (row_vectors <= shape.row_vectors && (has_clusters || !shape.needs_clusters)) return &shape;
  return nullptr;
}

}  // namespace gemma_norm
