// Which tokens of a block see each other, the state that enters it and the state behind it.
#pragma once
#include "linear_params.h"
#include "matrices.h"

namespace mls::cpu::MLS_VARIANT {

// Tokens of a block at most. The blocks of a piece depend on nothing else.
constexpr int64_t kBlock = 48;

// A block of one head.
struct BlockAt {
  int64_t batch, head;
  int64_t first, count;  // tokens [first, first + count)
};

struct Visible {
  int64_t first[kBlock];  // token i sees the tokens [first[i], i] of the block; padding sees none
  float reached[kBlock];  // 1 if the state that enters the block reaches a token, otherwise 0
  float leaving[kBlock];  // 1 if a token reaches the state behind the block, otherwise 0
  float kept;             // 1 if the entering state is left behind the block, otherwise 0

  void load(const DocumentIds& documents, const BlockAt& at) {
    if (documents.of_token == nullptr) {
      std::fill_n(first, kBlock, 0);
      std::fill_n(reached, kBlock, 1.0f);
      std::fill_n(leaving, kBlock, 1.0f);
      kept = 1;
      return;
    }
    const int64_t* const ids = documents.of_token + at.batch * documents.row_stride + at.first;
    const int64_t entering = at.first == 0 ? documents.before[at.batch * documents.before_stride] : ids[-1];
    const int64_t last = ids[at.count - 1];
    for (int64_t i = 0; i < at.count; ++i) {
      const bool is_real = ids[i] >= 0;
      first[i] = !is_real ? i + 1 : i > 0 && ids[i] == ids[i - 1] ? first[i - 1] : i;
      reached[i] = is_real && ids[i] == entering;
      leaving[i] = is_real && ids[i] == last;
    }
    kept = last >= 0 && last == entering;
  }
};

// Sets what a row does not see to zero: all but [first, last) of `width` numbers.
MLS_INLINE void keep_range(float* row, int64_t first, int64_t last, int64_t width) {
  const IntVec lane = lane_numbers();
  for (int64_t c = 0; c < width; c += kLanes) {
    if (c >= last || c + kLanes <= first) {
      store(row + c, Vec{});
    } else if (c < first || c + kLanes > last) {
      const IntVec at = lane + static_cast<int32_t>(c);
      const IntVec keep =
          (at >= splat_int(static_cast<int32_t>(first))) & (at < splat_int(static_cast<int32_t>(last)));
      store(row + c, select(keep, load(row + c), Vec{}));
    }
  }
}

}  // namespace mls::cpu::MLS_VARIANT
