// Checks the division into blocks for cards from a small slice of one to the largest. Host code: runs without a card. Says
// nothing and returns 0 if all is well, else names what is wrong with the first shape.
#include <cstdio>

#include "cuda/plan.cuh"

using namespace prosparse::cuda;

namespace {

constexpr int kKiB = 1024;
constexpr int64_t kDModels[] = {8, 24, 512, 520, 1536, 4096, 5120, 8192, 16384, 36000, 100000};
constexpr int64_t kDFfs[] = {8, 40, 136, 264, 1000, 3840, 11008, 13824, 14336, 28672, 53248, 70000, 1 << 20, kMaxNeurons};

const char* fault(const Card& card, const Shape& shape) {
  const Plan plan(card, shape);
  const int first_bytes = gate_up_shared_memory(plan.ahead, plan.lines, static_cast<int>(shape.rows), static_cast<int>(shape.d_model));
  const int down_bytes = plan.down_in_first ? h_bytes(plan.passes.per_block) : 0;
  if (first_bytes + down_bytes + kGateUpStaticBytes > card.shared_memory) return "the first kernel does not fit into shared memory";
  if (plan.lines > 0 && plan.lines * int64_t{kGateUpWarps * kLine} < shape.d_model) return "lines of a warp";
  if (plan.lines == 0 && kDeepAhead * int64_t{kGateUpWarps * kLine} > shape.d_model) return "more ahead than lines";
  if (plan.down_in_first && (row_tiles(shape.rows) > 1 || plan.lines == 0 || plan.lines > kMostLinesWithDown))
    return "no such first kernel";
  if (plan.share_count != (plan.down_in_first ? plan.passes.blocks : plan.splits)) return "shares of y";
  const int64_t share_blocks = ceil_div(shape.d_model, int64_t{4} * plan.share_lanes) * shape.rows;
  if (plan.down_in_first && share_blocks > card.multiprocessors) return "blocks that add shares up";
  const Passes& passes = plan.passes;
  const int64_t pass_count = int64_t{passes.blocks} * passes.per_block;
  if (passes.blocks < 1 || passes.per_block < 1) return "passes of a block";
  if (passes.neurons < 1 || passes.neurons + (passes.larger > 0) > kPassRows) return "neurons of a pass";
  if (pass_count * passes.neurons + passes.larger != shape.d_ff || passes.larger >= pass_count) return "neurons of all passes";
  if (pass_count * kPassRows * row_tiles(shape.rows) * 8 > UINT32_MAX) return "places of h in 32 bits";
  if (plan.column_groups * int64_t{kDownColumns} < shape.d_model || plan.column_groups > 65535) return "column groups";
  if (plan.splits < 1 || plan.splits > passes.blocks) return "splits";
  if (int64_t{passes.blocks} * plan.splits > UINT32_MAX) return "first block of a split in 32 bits";
  for (int64_t split = 0; split < plan.splits; ++split) {
    const int64_t first = passes.blocks * split / plan.splits, end = passes.blocks * (split + 1) / plan.splits;
    if (end <= first || (end - first) * passes.per_block * kPassRows > plan.neuron_capacity) return "neurons of a split";
  }
  if (plan.neuron_capacity % kTileNeurons != 0) return "tiles of a split";
  if (down_shared_memory(plan.stages, row_tiles(shape.rows), plan.neuron_capacity) > card.shared_memory)
    return "the second kernel does not fit into shared memory";
  if ((kNeuronWarps - 1) * shape.rows * kDownColumns * 4 > kDownWarps * plan.stages * kTileBytes)
    return "sums where the rings were";
  if (plan.masks + pass_count * 4 > plan.h || plan.h + pass_count * kPassRows * row_tiles(shape.rows) * 16 > plan.shares ||
      plan.shares + plan.share_count * shape.rows * shape.d_model * 4 > plan.size || plan.h % 16 != 0 || plan.shares % 16 != 0)
    return "scratch memory";
  return nullptr;
}

// The figures under docs/results were measured with this division.
bool is_as_measured() {
  const Card h200{132, 227 * kKiB};
  const auto rows_in_one = [&](int64_t d_model, int64_t d_ff) {
    int64_t rows = 0;
    while (Plan(h200, {rows + 1, d_model, d_ff}).down_in_first) ++rows;
    return rows;
  };
  const Plan plan(h200, {4, 4096, 11008});
  return plan.passes.blocks == 132 && plan.splits == 16 && plan.lines == 4 && plan.ahead == kDeepAhead &&
         plan.stages == kDeepStages && rows_in_one(1536, 3840) == 5 && rows_in_one(4096, 11008) == 2 && rows_in_one(5120, 13824) == 1 &&
         rows_in_one(8192, 28672) == 0;
}

}  // namespace

int main() {
  for (const int multiprocessors : {1, 7, 14, 16, 28, 58, 82, 108, 128, 132, 148, 192})
    for (const int shared_memory : {99 * kKiB, 163 * kKiB, 227 * kKiB})
      for (const int64_t d_model : kDModels)
        for (const int64_t d_ff : kDFfs) {
          const Card card{multiprocessors, shared_memory};
          for (int64_t rows = 1; is_supported(card, {rows, d_model, d_ff}); ++rows)
            if (const char* what = fault(card, {rows, d_model, d_ff})) {
              std::printf("%s: %d multiprocessors, %d bytes, %d rows, %lld x %lld\n", what, multiprocessors, shared_memory,
                          static_cast<int>(rows), static_cast<long long>(d_model), static_cast<long long>(d_ff));
              return 1;
            }
        }
  const Card h200{132, 227 * kKiB};
  if (most_rows(h200, 4096) != 16 || most_rows(h200, 8192) != 8 || most_rows(h200, int64_t{1} << 32) != 0 || is_supported(h200, {1, 8, kMaxNeurons + 8})) {
    std::puts("limits");
    return 1;
  }
  if (!is_as_measured()) std::puts("not as measured");
  return is_as_measured() ? 0 : 1;
}
