// How a row is cut among the threads that work on it. This decides in which order its squares are added, hence its bits, and so
// is a part of the numerical contract. It is the same on every GPU for rows of up to 8192 vectors (65536 elements of 16 bits or
// 32768 of float32). Beyond, GPUs with clusters have a shape of their own, and the others stream. tuning.h decides everything
// else, and cannot change a bit.
#pragma once

#include <cstdint>

namespace gemma_norm {

constexpr int32_t kVectorBytes = 16;

// A row is cut into 16-byte vectors; slot t (a thread) owns vectors t, t + slots, t + 2 slots, ... Where hidden is no multiple of
// the vector, rows start at any alignment and a slot owns single elements instead, `slots` apart, so that neighbouring threads
// still touch neighbouring memory.
struct Shape {
  int64_t row_vectors;  // rows of up to so many vectors
  int32_t vectors;      // that a slot owns
  bool needs_clusters = false;
};

// The first that fits is taken. With few vectors a slot, one row is done soonest; with more, many rows are.
constexpr Shape kShapes[] = {{64, 2}, {128, 4}, {512, 2}, {1024, 4}, {8192, 8}, {65536, 8, true}};

// Larger rows do not fit into registers. They are cut among so many slots.
constexpr int32_t kStreamSlots = 512;

// Null: the row is streamed.
constexpr const Shape* find_shape(int64_t row_vectors, bool has_clusters) {
  for (const Shape& shape : kShapes)
    if (row_vectors <= shape.row_vectors && (has_clusters || !shape.needs_clusters)) return &shape;
  return nullptr;
}

}  // namespace gemma_norm
