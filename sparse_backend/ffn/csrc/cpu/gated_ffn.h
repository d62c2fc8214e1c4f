// The kernels of kernels.h over the traits K of one instruction set and one dtype.
#pragma once

#include "dots.h"
#include "down.h"
#include "support.h"

namespace prosparse::cpu {
namespace {

// ---- sparse path -------------------------------------------------------------------------------------------------------------

constexpr int kUnionBlock = 128;  // the most active neurons whose up and down rows are handled together
constexpr int kShareUnit = 8;     // active neurons are given to threads in multiples of this

// Few rows are limited by memory: a few neurons at once, each row read from end to end, keep it streaming. Many rows are limited
// by arithmetic: many neurons at once save loads and stores of y.
inline bool few(int rows) { return rows <= 4; }
inline int union_block(int rows) { return rows <= 2 ? 8 : few(rows) ? 16 : kUnionBlock; }

template <class K>
struct SparseRoom {
  int64_t y_stride;
  PackedInput<K> input;
  float* gates;  // [d_ff][rows]
  int32_t* neurons;
  uint8_t* in_union;
  typename K::Weight* zero_row;
  PerThread<float> carry;
  PerThread<typename K::Hidden> hidden;
  PerThread<float> sums;
  PerThread<int64_t> listed;
  PerThread<int64_t> row_active;
  DownRoom<K> down;

  SparseRoom(Arena& arena, int threads, int rows, int64_t d_model, int64_t d_ff)
      : y_stride(round_up<int64_t>(d_model, kTileColumns<K>)),
        input(arena, d_model),
        gates(arena.take<float>(d_ff * rows)),
        neurons(arena.take<int32_t>(d_ff)),
        in_union(arena.take<uint8_t>(d_ff)),
        zero_row(arena.take<typename K::Weight>(d_model)),
        carry(arena.take_each<float>(threads, kCarrySize<K>)),
        hidden(arena.take_each<typename K::Hidden>(threads, kChunkRows * kUnionBlock)),
        sums(arena.take_each<float>(threads, round_up(rows, kRowPadding<K>) * y_stride)),
        listed(arena.take_each<int64_t>(threads, 1)),
        row_active(arena.take_each<int64_t>(threads, kChunkRows)),
        down(arena, threads, kUnionBlock) {}
};

// Gate values of the neurons in `range`, gates [d_ff][rows].
template <class K>
void compute_gates(const typename K::Weight* gate, Range range, const PackedInput<K>& input, int rows, int64_t d_model,
                   float* carry, float* gates) {
  float block[kNeuronBlock * kChunkRows];
  // What is read next: with one register tile of rows the next few neurons, otherwise the next block.
  const int distance = rows > K::kDotRows ? kNeuronBlock : K::kDotNeurons;
  for (int64_t n = range.begin; n < range.end; n += kNeuronBlock) {
    const typename K::Weight* w[kNeuronBlock];
    const typename K::Weight* ahead[kNeuronBlock];
    for (int i = 0; i < kNeuronBlock; ++i) {
      w[i] = gate + smaller(n + i, range.end - 1) * d_model;
      ahead[i] = gate + smaller(n + i + distance, range.end - 1) * d_model;
    }
    dots<K>(w, ahead, kNeuronBlock, input, rows, d_model, carry, block);
    std::memcpy(gates + n * rows, block, smaller<int64_t>(kNeuronBlock, range.end - n) * rows * sizeof(float));
  }
}

// Adds the output of the active neurons listed at positions `range` to the thread's sums. With dReLU only now it turns out which
// of them are active: they are counted, and the others' down rows are not read.
template <class K, bool kDReLU>
void add_neurons(const SparseRoom<K>& room, int thread, Range range, const typename K::Weight* up,
                 const typename K::Weight* down_t, float threshold, int rows, int64_t d_model) {
  using Weight = typename K::Weight;
  using Hidden = typename K::Hidden;
  const int block = union_block(rows);
  Hidden* const hidden = room.hidden(thread);
  float up_values[kUnionBlock * kChunkRows];
  // Up rows of a block, then its first down rows: what the dot products request while they run.
  const Weight* up_rows[kUnionBlock + kNeuronBlock];
  const Weight* next_up_rows[kUnionBlock];
  const Weight* down_rows[kUnionBlock];

  const auto row_at = [&](const Weight* matrix, int64_t position) {
    return matrix + room.neurons[smaller(position, range.end - 1)] * d_model;
  };
  int kept = 0;  // neurons that wait for their down rows
  for (int64_t start = range.begin; start < range.end; start += block) {
    const int count = static_cast<int>(smaller<int64_t>(block, range.end - start));
    for (int i = 0; i < round_up(count, kNeuronBlock); ++i) up_rows[i] = row_at(up, start + smaller(i, count - 1));
    for (int i = 0; i < kNeuronBlock; ++i) {
      up_rows[round_up(count, kNeuronBlock) + i] =
          kDReLU ? row_at(up, start + block + i) : row_at(down_t, start + smaller(i, count - 1));
    }
    for (int i = 0; i < count; i += kNeuronBlock) {
      const int neurons = smaller(round_up(count - i, K::kDotNeurons), kNeuronBlock);
      dots<K>(up_rows + i, up_rows + i + kNeuronBlock, neurons, room.input, rows, d_model, room.carry(thread),
              up_values + i * rows);
    }
    if constexpr (kDReLU) {
      for (int i = 0; i < count; ++i) {
        const int32_t neuron = room.neurons[start + i];
        bool any = false;
        for (int r = 0; r < rows; ++r) {
          const float gate = room.gates[neuron * rows + r], value = up_values[i * rows + r];
          const bool active = is_active(gate, threshold) && is_active(value, threshold);
          narrow(active ? gate * value : 0.0f, hidden[r * kUnionBlock + kept]);
          room.row_active(thread)[r] += active;
          any |= active;
        }
        if (!any) continue;
        down_rows[kept++] = down_t + neuron * d_model;
        room.in_union[neuron] = 1;
      }
      // Half-empty blocks would cost as much as full ones.
      const bool last = start + block >= range.end;
      if (kept == 0 || (!last && kept < block && kept + block <= kUnionBlock)) continue;
    } else {
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < count; ++i) {
          float h = 0;
          const float gate = room.gates[room.neurons[start + i] * rows + r];
          if (is_active(gate, threshold)) h = gate * up_values[i * rows + r];
          narrow(h, hidden[r * kUnionBlock + i]);
        }
      }
      for (; kept < count; ++kept) down_rows[kept] = row_at(down_t, start + kept);
    }
    const int padded = round_up(kept, neuron_padding<K>(rows));
    for (int i = kept; i < padded; ++i) {
      down_rows[i] = room.zero_row;
      for (int r = 0; r < rows; ++r) narrow(0.0f, hidden[r * kUnionBlock + i]);
    }
    for (int i = 0; i < padded; ++i) next_up_rows[i] = row_at(up, start + block + i);
    kept = 0;
    const DownBlock<K> down{few(rows) ? next_up_rows : down_rows,
                            few(rows) ? 0 : kTileColumns<K>,
                            down_rows,
                            padded,
                            hidden,
                            kUnionBlock,
                            rows,
                            room.sums(thread),
                            room.y_stride};
    down.run(0, d_model, d_model, room.down, thread);
  }
}

// One call on rows <= kChunkRows rows; marks the union in room.in_union and returns the number of active (row, neuron) pairs.
template <class K, bool kDReLU>
int64_t sparse_chunk(const SparseRoom<K>& room, int rows, int64_t d_model, int64_t d_ff, const typename K::Weight* x,
                     const typename K::Weight* gate_up, const typename K::Weight* down_t, float threshold,
                     typename K::Weight* y, int32_t* row_counts, ThreadPool pool, int threads) {
  room.input.fill(x, rows, d_model);

  auto find_active = [&](int thread) {
    [[maybe_unused]] const typename K::Unit unit;
    const Range range = share(d_ff, kNeuronBlock, thread, threads);
    compute_gates<K>(gate_up, range, room.input, rows, d_model, room.carry(thread), room.gates);
    int64_t* const row_active = room.row_active(thread);
    std::memset(row_active, 0, rows * sizeof(int64_t));
    int64_t listed = 0;
    for (int64_t n = range.begin; n < range.end; ++n) {
      bool any = false;
      for (int r = 0; r < rows; ++r) {
        const bool active = is_active(room.gates[n * rows + r], threshold);
        if constexpr (!kDReLU) row_active[r] += active;
        any |= active;
      }
      if (!any) continue;
      room.neurons[range.begin + listed++] = static_cast<int32_t>(n);
      if constexpr (!kDReLU) room.in_union[n] = 1;
    }
    *room.listed(thread) = listed;
  };
  run_threads(pool, threads, find_active);

  // One list for all threads: the work on it is split evenly, wherever the active neurons lie.
  int64_t listed = 0;
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t count = *room.listed(thread);
    std::memmove(room.neurons + listed, room.neurons + share(d_ff, kNeuronBlock, thread, threads).begin,
                 count * sizeof(int32_t));
    listed += count;
  }

  auto add_active = [&](int thread) {
    [[maybe_unused]] const typename K::Unit unit;
    std::memset(room.sums(thread), 0, rows * room.y_stride * sizeof(float));
    add_neurons<K, kDReLU>(room, thread, share(listed, kShareUnit, thread, threads), gate_up + d_ff * d_model, down_t,
                   threshold, rows, d_model);
  };
  run_threads(pool, threads, add_active);

  auto reduce = [&](int thread) {
    const Range range = share(d_model, kTileColumns<K>, thread, threads);
    for (int r = 0; r < rows; ++r) {
      float* const total = room.sums(0) + r * room.y_stride;
      for (int other = 1; other < threads; ++other) {
        const float* const part = room.sums(other) + r * room.y_stride;
        for (int64_t c = range.begin; c < range.end; ++c) total[c] += part[c];
      }
      for (int64_t c = range.begin; c < range.end; ++c) narrow(total[c], y[r * d_model + c]);
    }
  };
  run_threads(pool, threads, reduce);

  int64_t active = 0;
  for (int r = 0; r < rows; ++r) {
    int64_t row_active = 0;
    for (int thread = 0; thread < threads; ++thread) row_active += room.row_active(thread)[r];
    active += row_active;
    if (row_counts) row_counts[r] += static_cast<int32_t>(row_active);
    if constexpr (kDReLU) continue;
    bool finite = true;
    for (int64_t c = 0; c < d_model; ++c) finite &= is_finite(x[r * d_model + c]);
    // With inf or NaN in x every up value is inf or NaN, and 0 * up of an inactive neuron is NaN: the dense product is NaN in
    // every column of the row. Skipping the inactive neurons must not hide that.
    if (!finite && row_active < d_ff) {
      for (int64_t c = 0; c < d_model; ++c) narrow(NAN, y[r * d_model + c]);
    }
  }
  return active;
}

template <class K>
Counts sparse_ffn(Shape shape, const typename K::Weight* x, const typename K::Weight* gate_up,
                  const typename K::Weight* down_t, float threshold, bool drelu, typename K::Weight* y,
                  int32_t* row_active, ThreadPool pool) {
  const auto [rows, d_model, d_ff] = shape;
  const int threads = useful_threads(pool, d_ff * d_model * static_cast<int64_t>(sizeof(typename K::Weight)));
  const int chunk = static_cast<int>(smaller<int64_t>(rows, kChunkRows));
  const auto compute = drelu ? sparse_chunk<K, true> : sparse_chunk<K, false>;
  const auto room = make_room<SparseRoom<K>>(threads, chunk, d_model, d_ff);
  std::memset(room.in_union, 0, d_ff);
  std::memset(room.zero_row, 0, d_model * sizeof(typename K::Weight));
  Counts counts;
  for (int64_t start = 0; start < rows; start += chunk) {
    const int count = static_cast<int>(smaller<int64_t>(chunk, rows - start));
    counts.active += compute(room, count, d_model, d_ff, x + start * d_model, gate_up, down_t, threshold, y + start * d_model,
                             row_active ? row_active + start : nullptr, pool, threads);
  }
  for (int64_t n = 0; n < d_ff; ++n) counts.union_neurons += room.in_union[n];
  return counts;
}

template <class K>
struct GateRoom {
  PackedInput<K> input;
  float* gates;
  PerThread<float> carry;

  GateRoom(Arena& arena, int threads, int rows, int64_t d_model, int64_t d_ff)
      : input(arena, d_model),
        gates(arena.take<float>(d_ff * rows)),
        carry(arena.take_each<float>(threads, kCarrySize<K>)) {}
};

template <class K>
void gate_values(Shape shape, const typename K::Weight* x, const typename K::Weight* gate, float* out, ThreadPool pool) {
  const auto [rows, d_model, d_ff] = shape;
  const int threads = useful_threads(pool, d_ff * d_model * static_cast<int64_t>(sizeof(typename K::Weight)));
  const int chunk = static_cast<int>(smaller<int64_t>(rows, kChunkRows));
  const auto room = make_room<GateRoom<K>>(threads, chunk, d_model, d_ff);
  for (int64_t start = 0; start < rows; start += chunk) {
    const int count = static_cast<int>(smaller<int64_t>(chunk, rows - start));
    room.input.fill(x + start * d_model, count, d_model);
    auto compute = [&, d_model = d_model, d_ff = d_ff](int thread) {
      [[maybe_unused]] const typename K::Unit unit;
      compute_gates<K>(gate, share(d_ff, kNeuronBlock, thread, threads), room.input, count, d_model, room.carry(thread),
                       room.gates);
    };
    run_threads(pool, threads, compute);
    for (int64_t n = 0; n < d_ff; ++n) {
      for (int r = 0; r < count; ++r) out[(start + r) * d_ff + n] = room.gates[n * count + r];
    }
  }
}

// ---- dense path --------------------------------------------------------------------------------------------------------------

template <class Element, bool kDReLU>
Counts activation(Shape shape, const Element* gate_up_out, float threshold, Element* h, int32_t* row_counts, ThreadPool pool) {
  constexpr int64_t kBlock = 512;
  const auto [rows, d_model, d_ff] = shape;
  const int threads = useful_threads(pool, rows * d_ff * 2 * static_cast<int64_t>(sizeof(Element)));
  struct Room {
    PerThread<Counts> counts;
    Room(Arena& arena, int threads) : counts(arena.take_each<Counts>(threads, 1)) {}
  };
  const auto room = make_room<Room>(threads);
  auto body = [&, rows = rows, d_ff = d_ff](int thread) {
    const Range range = share(d_ff, kBlock, thread, threads);
    Counts counts;
    for (int64_t start = range.begin; start < range.end; start += kBlock) {
      const int64_t width = smaller(kBlock, range.end - start);
      uint8_t in_union[kBlock] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Element* const gate = gate_up_out + r * 2 * d_ff + start;
        const Element* const up = gate + d_ff;
        Element* const out = h + r * d_ff + start;
        int32_t row_active = 0;
        [[maybe_unused]] int32_t views[2] = {0, 0};
        for (int64_t n = 0; n < width; ++n) {
          const float g = widen(gate[n]), u = widen(up[n]);
          bool active = is_active(g, threshold);
          if constexpr (kDReLU) {
            const bool second = is_active(u, threshold);
            views[0] += active;
            views[1] += second;
            active &= second;
            narrow(active ? g * u : 0.0f, out[n]);
          } else {
            narrow((active ? g : 0.0f) * u, out[n]);
          }
          in_union[n] |= active;
          row_active += active;
        }
        counts.active += row_active;
        // Threads share the neurons of a row out.
        if (row_counts) __atomic_fetch_add(row_counts + r, row_active, __ATOMIC_RELAXED);
        if constexpr (kDReLU) counts.views[0] += views[0], counts.views[1] += views[1];
      }
      for (int64_t n = 0; n < width; ++n) counts.union_neurons += in_union[n];
    }
    *room.counts(thread) = counts;
  };
  run_threads(pool, threads, body);
  Counts total;
  for (int thread = 0; thread < threads; ++thread) {
    total.active += room.counts(thread)->active;
    total.union_neurons += room.counts(thread)->union_neurons;
    for (int view = 0; view < 2; ++view) total.views[view] += room.counts(thread)->views[view];
  }
  return total;
}

template <class Element>
Counts launch_activation(Shape shape, const void* gate_up_out, float threshold, bool drelu, void* h, int32_t* row_active,
                         ThreadPool pool) {
  const auto compute = drelu ? activation<Element, true> : activation<Element, false>;
  return compute(shape, static_cast<const Element*>(gate_up_out), threshold, static_cast<Element*>(h), row_active, pool);
}

constexpr int kDenseRows = 256;     // rows and neurons of one block
constexpr int kDenseNeurons = 256;

// Columns of one block: as many as y of the block leaves in L2. The wider, the fewer pages are opened a second time.
template <class K>
int64_t dense_columns(int rows, int64_t d_model) {
  constexpr int64_t kSums = 64 * 1024;
  return smaller(round_up<int64_t>(kSums / rows, kTileColumns<K>), round_up<int64_t>(d_model, kTileColumns<K>));
}

template <class K>
struct DenseDownRoom {
  typename K::Weight* zero_row;
  PerThread<typename K::Hidden> hidden;
  int64_t columns;  // of one block of y
  PerThread<float> sums;
  DownRoom<K> down;

  DenseDownRoom(Arena& arena, int threads, int rows, int64_t d_model)
      : zero_row(arena.take<typename K::Weight>(d_model)),
        hidden(arena.take_each<typename K::Hidden>(threads, round_up(rows, kRowPadding<K>) * int64_t{kDenseNeurons})),
        columns(dense_columns<K>(rows, d_model)),
        sums(arena.take_each<float>(threads, round_up(rows, kRowPadding<K>) * columns)),
        down(arena, threads, kDenseNeurons) {}
};

// One block of columns: y[:, columns] = h @ down_t[:, columns] for rows <= kDenseRows rows.
template <class K>
void dense_block(const DenseDownRoom<K>& room, int thread, Range columns, int rows, int64_t d_model, int64_t d_ff,
                   const typename K::Weight* h, const typename K::Weight* down_t, typename K::Weight* y) {
  using Weight = typename K::Weight;
  float* const sums = room.sums(thread);
  typename K::Hidden* const hidden = room.hidden(thread);
  std::memset(sums, 0, rows * room.columns * sizeof(float));
  for (int64_t start = 0; start < d_ff; start += kDenseNeurons) {
    const int count = static_cast<int>(smaller<int64_t>(kDenseNeurons, d_ff - start));
    const int padded = round_up(count, neuron_padding<K>(rows));
    const Weight* down_rows[kDenseNeurons];
    for (int i = 0; i < padded; ++i) {
      down_rows[i] = i < count ? down_t + (start + i) * d_model : room.zero_row;
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < count; ++i) narrow(widen(h[r * d_ff + start + i]), hidden[r * kDenseNeurons + i]);
      for (int i = count; i < padded; ++i) narrow(0.0f, hidden[r * kDenseNeurons + i]);
    }
    const DownBlock<K> block{down_rows, kTileColumns<K>, down_rows, padded, hidden, kDenseNeurons, rows, sums, room.columns};
    block.run(columns.begin, columns.end, d_model, room.down, thread);
  }
  for (int r = 0; r < rows; ++r) {
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      narrow(sums[r * room.columns + c - columns.begin], y[r * d_model + c]);
    }
  }
}

template <class K>
void dense_down(Shape shape, const typename K::Weight* h, const typename K::Weight* down_t, typename K::Weight* y,
                ThreadPool pool) {
  const auto [rows, d_model, d_ff] = shape;
  const int threads = useful_threads(pool, d_ff * d_model * static_cast<int64_t>(sizeof(typename K::Weight)));
  const int chunk = static_cast<int>(smaller<int64_t>(rows, kDenseRows));
  const auto room = make_room<DenseDownRoom<K>>(threads, chunk, d_model);
  std::memset(room.zero_row, 0, d_model * sizeof(typename K::Weight));
  auto body = [&, rows = rows, d_model = d_model, d_ff = d_ff](int thread) {
    [[maybe_unused]] const typename K::Unit unit;
    const Range range = share(d_model, kTileColumns<K>, thread, threads);
    for (int64_t start = 0; start < rows; start += chunk) {
      const int count = static_cast<int>(smaller<int64_t>(chunk, rows - start));
      for (int64_t column = range.begin; column < range.end; column += room.columns) {
        const Range columns{column, smaller(column + room.columns, range.end)};
        dense_block<K>(room, thread, columns, count, d_model, d_ff, h + start * d_ff, down_t, y + start * d_model);
      }
    }
  };
  run_threads(pool, threads, body);
}

// ---- the table of one instruction set ----------------------------------------------------------------------------------------

template <class T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

template <class K>
void launch_dense_down(Shape shape, const void* h, const void* down_t, void* y, ThreadPool pool) {
  using Weight = typename K::Weight;
  dense_down<K>(shape, as<Weight>(h), as<Weight>(down_t), static_cast<Weight*>(y), pool);
}

template <class Bf16, class F32, auto kDown>
constexpr Kernels make_kernels(const char* isa) {
  return {
      isa,
      [](Dtype dtype, Shape shape, const void* x, const void* gate_up, const void* down_t, float threshold, bool drelu,
         void* y, int32_t* row_active, ThreadPool pool) {
        return dtype == Dtype::kBFloat16
                   ? sparse_ffn<Bf16>(shape, as<uint16_t>(x), as<uint16_t>(gate_up), as<uint16_t>(down_t), threshold, drelu,
                                      static_cast<uint16_t*>(y), row_active, pool)
                   : sparse_ffn<F32>(shape, as<float>(x), as<float>(gate_up), as<float>(down_t), threshold, drelu,
                                     static_cast<float*>(y), row_active, pool);
      },
      [](Dtype dtype, Shape shape, const void* x, const void* gate_up, float* gates, ThreadPool pool) {
        dtype == Dtype::kBFloat16 ? gate_values<Bf16>(shape, as<uint16_t>(x), as<uint16_t>(gate_up), gates, pool)
                                  : gate_values<F32>(shape, as<float>(x), as<float>(gate_up), gates, pool);
      },
      [](Dtype dtype, Shape shape, const void* gate_up_out, float threshold, bool drelu, void* h,
         int32_t* row_active, ThreadPool pool) {
        return dtype == Dtype::kBFloat16 ? launch_activation<uint16_t>(shape, gate_up_out, threshold, drelu, h, row_active, pool)
                                         : launch_activation<float>(shape, gate_up_out, threshold, drelu, h, row_active, pool);
      },
      kDown,
  };
}

}  // namespace
}  // namespace prosparse::cpu
