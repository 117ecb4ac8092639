// Fused linear influence by wgmma, fed by the bulk tensor copy engine: compute capability 9.0.
//
// A block stays on its processor and takes tile after tile. One thread of the producer warpgroup streams the chunks of
// all examples through the stages. Two consumer warpgroups take the examples in turn, each forming the whole
// BLOCK_O × 128 tile of its example's gradient: while one maps its gradient by the optimizer's step (special
// functions), the other multiplies (tensor cores). Both use the same slots of optimizer state, since they hold the
// same elements in the same threads.
//
// In a cluster of SIDE_O × SIDE_I blocks, each block fetches a part of the tokens of its operands and sends them to the
// blocks that need them too: those of its row of tiles for dY, those of its column for X.
#include <algorithm>
#include <atomic>

#include "epilogue.cuh"
#include "hopper.cuh"

namespace montessori {
namespace {

constexpr int kBlockI = 128, kBlockT = 64, kStepT = 16, kBox = 64, kGroupThreads = 128, kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kGroupThreads, kWarps = 4;
constexpr int kBoxBytes = kBlockT * kBox * 2;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
// Named barriers; of the tail and the turn there is one for each consumer.
constexpr int kStateBarrier = 1, kTailBarrier = 2, kTurnBarrier = kTailBarrier + kConsumers;

template <typename Operand, typename State, int BLOCK_O, int SIDE_O, int SIDE_I>
struct Kernel {
  static constexpr int kBlocks = SIDE_O * SIDE_I;
  // Tokens of dY and of X that one block fetches for all that share them.
  static constexpr int kTokensDy = kBlockT / SIDE_I, kTokensX = kBlockT / SIDE_O;
  static_assert(kTokensDy % 8 == 0 && kTokensX % 8 == 0, "the swizzle repeats after eight tokens");
  static constexpr int kBoxesO = BLOCK_O / kBox, kBoxesI = kBlockI / kBox;
  static constexpr int kStageBytes = (kBoxesO + kBoxesI) * kBoxBytes;
  static constexpr int kStages = BLOCK_O == 128 ? 4 : 5;
  // Of each product of 64 rows, one after the other.
  static constexpr int kProductPairs = 64 * kBlockI / kGroupThreads / 2, kPairs = BLOCK_O / 64 * kProductPairs;
  using Held = TileState<State, kPairs, kGroupThreads>;
  // The swizzle wants stages on multiples of 1024 bytes; dynamic shared memory promises less.
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + Held::kBytes + 2 * kStages * 8;

  // Stages are used in order; `count` chunks have gone through since the kernel began.
  struct Pipeline {
    uint32_t stages, barriers, count = 0;
    __device__ uint32_t stage() const { return stages + count % kStages * kStageBytes; }
    __device__ uint32_t full() const { return barriers + count % kStages * 16; }
    __device__ uint32_t empty() const { return full() + 8; }
    __device__ uint32_t parity() const { return count / kStages & 1; }
  };

  // Place of this block in its cluster.
  struct Place {
    int o, i;
    // Blocks that share its dY, and those that share its X, as bits.
    __device__ uint16_t row() const { return ((1 << SIDE_I) - 1) << (o * SIDE_I); }
    // Bits 0, SIDE_I, 2 SIDE_I and so on: what a number of ones to the base 2^SIDE_I is.
    __device__ uint16_t column() const { return ((1 << kBlocks) - 1) / ((1 << SIDE_I) - 1) << i; }
  };

  __device__ static Place place() {
    const int rank = static_cast<int>(hopper::cluster_rank());
    return {rank / SIDE_I, rank % SIDE_I};
  }

  __device__ static TilePosition tile_of(const LinearProblem& p, int index) {
    const TilePosition tile = tile_position<SIDE_O * BLOCK_O, SIDE_I * kBlockI>(p, index);
    const Place here = place();
    return {tile.first_o + here.o * BLOCK_O, tile.first_i + here.i * kBlockI};
  }

  // Pair of a thread in the accumulators of the products of 64 rows.
  struct Position {
    int row, column;
    __device__ int2 operator()(int pair) const {
      const int product = pair / kProductPairs, rest = pair % kProductPairs;
      return make_int2(row + 64 * product + rest % 2 * 8, column + rest / 2 * 8);
    }
  };

  __device__ static int num_tokens(const LinearProblem& p, int b) {
    return static_cast<int>(p.spans[2 * b + 1] - p.spans[2 * b]);
  }

  __device__ static int num_chunks(const LinearProblem& p, int b) { return (num_tokens(p, b) + kBlockT - 1) / kBlockT; }

  __device__ static void produce(const LinearProblem& p, const CUtensorMap* x, const CUtensorMap* dy, int splits,
                                 int work, Pipeline pipe) {
    for (int item = blockIdx.x / kBlocks; item < work; item += gridDim.x / kBlocks) {
      const TilePosition tile = tile_of(p, item / splits);
      const Share share = share_of(p.examples, splits, item % splits);
      for (int b = share.first; b < share.last; ++b) {
        const int last = static_cast<int>(p.spans[2 * b + 1]);
        for (int row = static_cast<int>(p.spans[2 * b]); row < last; row += kBlockT, ++pipe.count) {
          hopper::barrier_wait(pipe.empty(), pipe.parity() ^ 1);
          hopper::barrier_expect(pipe.full(), kStageBytes);
          load_stage(x, dy, pipe, tile, row);
        }
      }
    }
  }

  __device__ static void load_stage(const CUtensorMap* x, const CUtensorMap* dy, const Pipeline& pipe,
                                    TilePosition tile, int row) {
    const Place here = place();
    for (int box = 0; box < kBoxesO + kBoxesI; ++box) {
      const bool out = box < kBoxesO;
      const CUtensorMap* map = out ? dy : x;
      const int column = out ? tile.first_o + box * kBox : tile.first_i + (box - kBoxesO) * kBox;
      const uint32_t to = pipe.stage() + box * kBoxBytes;
      if constexpr (kBlocks == 1) {
        hopper::copy_box(to, map, pipe.full(), column, row);
      } else {
        const int token = out ? here.i * kTokensDy : here.o * kTokensX;
        hopper::copy_box_to(to + token * kBox * 2, map, pipe.full(), column, row + token,
                            out ? here.row() : here.column());
      }
    }
  }

  // The last chunk of an example also brought padding or tokens of the next one: both operands become 0 there, up to
  // the end of the last step that is multiplied.
  __device__ static void clear_tail(uint32_t stage, int tokens, int group) {
    const int past = (kStepT - tokens % kStepT) % kStepT;
    if (past == 0) return;
    const int thread = threadIdx.x % kGroupThreads, words = past * kBox * 2 / 16;
    for (int box = 0; box < kBoxesO + kBoxesI; ++box) {
      if (thread < words) hopper::store_zeros(stage + box * kBoxBytes + tokens * kBox * 2 + thread * 16);
    }
    static_assert((kStepT - 1) * kBox * 2 / 16 <= kGroupThreads, "a thread clears one word of a box");
    hopper::fence_async_proxy();
    hopper::named_barrier(kTailBarrier + group, kGroupThreads);
  }

  __device__ static void multiply_step(uint32_t stage, int token, float (&grad)[2 * kPairs]) {
    const uint32_t at = stage + token * kBox * 2;
    const uint64_t x = hopper::operand_descriptor(at + kBoxesO * kBoxBytes, kBoxBytes);
#pragma unroll
    for (int product = 0; product < BLOCK_O / 64; ++product) {
      const uint64_t dy = hopper::operand_descriptor(at + product * kBoxBytes, kBoxBytes);
      hopper::Product<Operand>::add(&grad[product * 2 * kProductPairs], dy, x);
    }
  }

  // Starts the products of the first `tokens` of a stage, in steps of 16. Steps whose number is not known are groups of
  // their own: otherwise the compiler makes every product wait for the one before, in whole chunks too.
  __device__ static void multiply_stage(uint32_t stage, int tokens, float (&grad)[2 * kPairs]) {
    if (tokens >= kBlockT) {
      hopper::wgmma_fence();
#pragma unroll
      for (int token = 0; token < kBlockT; token += kStepT) multiply_step(stage, token, grad);
      hopper::wgmma_commit();
    } else {
#pragma unroll 1
      for (int token = 0; token < tokens; token += kStepT) {
        hopper::hold_in_place(grad);
        hopper::wgmma_fence();
        multiply_step(stage, token, grad);
        hopper::wgmma_commit();
      }
    }
  }

  // Tells every block that sends to this one that the stage is free here.
  __device__ static void release(uint32_t empty) {
    if (threadIdx.x % 32 != 0) return;
    if constexpr (kBlocks == 1) {
      hopper::barrier_arrive(empty);
    } else {
      const Place here = place();
      const int senders = here.row() | here.column();
      for (int rank = 0; rank < kBlocks; ++rank) {
        if (senders >> rank & 1) hopper::barrier_arrive_at(empty, rank);
      }
    }
  }

  // The consumers' order of turns: a stage's barrier tells its last use from the one before, not from two before, so a
  // group waits for chunks only when the other has seen all of its own.
  struct Turn {
    int group;
    bool first, last;
    __device__ void take() const {
      if (!first) hopper::named_barrier(kTurnBarrier + group, kConsumers * kGroupThreads);
    }
    __device__ void pass() const {
      if (!last) hopper::named_barrier_arrive(kTurnBarrier + (group + 1) % kConsumers, kConsumers * kGroupThreads);
    }
  };

  // grad = dYᵀX of one example; its chunks are the next ones in the pipeline. The turn is passed as soon as the last
  // products are under way, so that those of the other group follow without a gap.
  __device__ static void example_gradient(int tokens, Turn turn, Pipeline& pipe, float (&grad)[2 * kPairs]) {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) grad[i] = 0.f;
    hopper::hold_in_place(grad);
    turn.take();
    uint32_t used = 0;
    for (int left = tokens; left > 0; left -= kBlockT, ++pipe.count) {
      hopper::barrier_wait(pipe.full(), pipe.parity());
      if (left < kBlockT) clear_tail(pipe.stage(), left, turn.group);
      hopper::hold_in_place(grad);
      multiply_stage(pipe.stage(), left, grad);
      if (left <= kBlockT) turn.pass();
      hopper::wgmma_wait<1>();
      if (left < tokens) release(used);
      used = pipe.empty();
    }
    if (tokens == 0) turn.pass();
    hopper::wgmma_wait<0>();
    hopper::hold_in_place(grad);
    if (tokens > 0) release(used);
  }

  __device__ static void consume(const LinearProblem& p, int splits, int work, Pipeline pipe, unsigned char* slots) {
    const int group = threadIdx.x / kGroupThreads - 1, thread = threadIdx.x % kGroupThreads;
    const int lane = thread % 32, warp = thread / 32;
    const Held held{reinterpret_cast<typename Held::Slot*>(slots), thread};
    const int64_t parts = static_cast<int64_t>(work / splits) * kBlocks * kWarps;
    for (int item = blockIdx.x / kBlocks; item < work; item += gridDim.x / kBlocks) {
      const int tile_index = item / splits;
      const TilePosition tile = tile_of(p, tile_index);
      const Share share = share_of(p.examples, splits, item % splits);
      const int64_t part = (static_cast<int64_t>(tile_index) * kBlocks + blockIdx.x % kBlocks) * kWarps + warp;
      const Position position{tile.first_o + warp * 16 + lane / 4, tile.first_i + lane % 4 * 2};
      // Both groups are done with the last tile, then each loads half of the slots of this one.
      hopper::named_barrier(kStateBarrier, kConsumers * kGroupThreads);
      held.template load<kPairs / kConsumers>(p, position, group * kPairs / kConsumers);
      hopper::named_barrier(kStateBarrier, kConsumers * kGroupThreads);
      for (int b = share.first; b < share.last; ++b) {
        if ((b - share.first) % kConsumers != group) {
          pipe.count += num_chunks(p, b);
          continue;
        }
        float grad[2 * kPairs];
        example_gradient(num_tokens(p, b), {group, b == share.first, b + 1 == share.last}, pipe, grad);
        store_partial(p, parts, 0, b, part, held.apply(p, grad));
        for (int k = 1; k < p.sets; ++k) store_partial(p, parts, k, b, part, held.further_set(p, position, k, grad));
      }
    }
  }

  __device__ static void run(const LinearProblem& p, const CUtensorMap* x, const CUtensorMap* dy, int splits,
                             int work) {
    unsigned char* raw = dynamic_shared();
    unsigned char* stages = raw + (1024 - shared_address(raw) % 1024) % 1024;
    unsigned char* slots = stages + kStages * kStageBytes;
    const Pipeline pipe{shared_address(stages), shared_address(slots + Held::kBytes)};
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        hopper::barrier_init(pipe.barriers + stage * 16, 1);
        hopper::barrier_init(pipe.barriers + stage * 16 + 8, kWarps * (SIDE_O + SIDE_I - 1));
      }
      hopper::fence_barrier_init();
    }
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      hopper::cluster_sync();
    }
    if (threadIdx.x < kGroupThreads) {
      hopper::give_registers<kProducerRegisters>();
      if (threadIdx.x == 0) produce(p, x, dy, splits, work, pipe);
    } else {
      hopper::take_registers<kConsumerRegisters>();
      consume(p, splits, work, pipe, slots);
    }
    // No block leaves while another may still tell it that a stage is free.
    if constexpr (kBlocks > 1) hopper::cluster_sync();
  }
};

template <typename Operand, typename State, int BLOCK_O, int SIDE_O, int SIDE_I>
__global__ void __launch_bounds__(kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ LinearProblem p, const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ CUtensorMap dy, int splits, int work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Kernel<Operand, State, BLOCK_O, SIDE_O, SIDE_I>::run(p, &x, &dy, splits, work);
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time, so that the library loads on a machine without one. Null where the driver has none.
Encode tensor_map_encoder() {
  static std::atomic<Encode> known{nullptr};
  if (const Encode encoder = known.load()) return encoder;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) known = reinterpret_cast<Encode>(function);
  return known;
}

// Boxes of `tokens_per_box` tokens by 64 columns of a packed activation [T, width]; what lies outside reads as 0.
bool encode(Encode encoder, CUtensorMap* map, const Array& array, int64_t tokens, int width, int tokens_per_box) {
  const auto type =
      array.dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(width) * 2};
  const cuuint32_t box[] = {kBox, static_cast<cuuint32_t>(tokens_per_box)}, steps[] = {1, 1};
  return encoder(map, type, 2, const_cast<void*>(array.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename Operand, typename State, int BLOCK_O, int SIDE_O, int SIDE_I>
cudaError_t launch(const LinearProblem& p, int splits, cudaStream_t stream) {
  using Chosen = Kernel<Operand, State, BLOCK_O, SIDE_O, SIDE_I>;
  // A thread whose first use of the device this is has no context yet, and the driver's encoder asks for one.
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const Encode encoder = tensor_map_encoder();
  if (!encoder) return cudaErrorNotSupported;
  CUtensorMap x, dy;
  if (!encode(encoder, &x, p.x, p.tokens, p.in, Chosen::kTokensX) ||
      !encode(encoder, &dy, p.dy, p.tokens, p.out, Chosen::kTokensDy)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = linear_wgmma_kernel<Operand, State, BLOCK_O, SIDE_O, SIDE_I>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Chosen::kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = Chosen::kBlocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = Chosen::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  static PerDevice known;
  int clusters = 0;
  const cudaError_t error = known.get(&clusters, [&](int* value) {
    const cudaError_t failed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Chosen::kSharedBytes);
    return failed != cudaSuccess ? failed : cudaOccupancyMaxActiveClusters(value, kernel, &config);
  });
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorLaunchOutOfResources;
  const Cut cut{SIDE_O * BLOCK_O, SIDE_I * kBlockI, Chosen::kBlocks, kWarps};
  const int64_t tiles = num_tiles(p, cut);
  splits = splits_for(p, splits, tiles, clusters);
  const int work = static_cast<int>(tiles) * splits;
  config.gridDim = std::min(work, clusters) * Chosen::kBlocks;
  return cudaLaunchKernelEx(&config, kernel, p, x, dy, splits, work);
}

// Tiles of a cluster are 256 × 256 whatever the state: where a block's own tile is lower, more stand above each other.
template <typename State>
struct Shape {
  static constexpr int kBlockO = sizeof(State) == 2 ? 128 : 64, kSideO = 256 / kBlockO, kSideI = 256 / kBlockI;
};

template <typename Operand, typename State>
cudaError_t launch_state(const LinearProblem& p, int splits, cudaStream_t stream, bool clustered) {
  using S = Shape<State>;
  return clustered ? launch<Operand, State, S::kBlockO, S::kSideO, S::kSideI>(p, splits, stream)
                   : launch<Operand, State, S::kBlockO, 1, 1>(p, splits, stream);
}

template <typename Operand>
cudaError_t launch_operand(const LinearProblem& p, int splits, cudaStream_t stream, bool clustered) {
  return holds_bfloat16(p) ? launch_state<Operand, __nv_bfloat16>(p, splits, stream, clustered)
                           : launch_state<Operand, float>(p, splits, stream, clustered);
}

cudaError_t launch_linear(const LinearProblem& p, int splits, cudaStream_t stream, bool clustered) {
  return p.x.dtype == Dtype::kBFloat16 ? launch_operand<__nv_bfloat16>(p, splits, stream, clustered)
                                       : launch_operand<__half>(p, splits, stream, clustered);
}

template <typename State>
Cut cut_of(bool clustered) {
  using S = Shape<State>;
  if (!clustered) return {S::kBlockO, kBlockI, 1, kWarps};
  return {S::kSideO * S::kBlockO, S::kSideI * kBlockI, S::kSideO * S::kSideI, kWarps};
}

Cut cut(const LinearProblem& p, bool clustered) {
  return holds_bfloat16(p) ? cut_of<__nv_bfloat16>(clustered) : cut_of<float>(clustered);
}

}  // namespace

Cut wgmma_cut(const LinearProblem& p) { return cut(p, false); }

cudaError_t launch_linear_wgmma(const LinearProblem& p, int splits, cudaStream_t stream) {
  return launch_linear(p, splits, stream, false);
}

Cut wgmma_cluster_cut(const LinearProblem& p) { return cut(p, true); }

cudaError_t launch_linear_wgmma_cluster(const LinearProblem& p, int splits, cudaStream_t stream) {
  return launch_linear(p, splits, stream, true);
}

}  // namespace montessori
