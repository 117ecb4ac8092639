// Fused linear influence by mma.sync, fed by cp.async: compute capability 8.0 and later.
//
// A block of 8 warps (4 by 2) owns a 128 × BLOCK_I tile, keeps its optimizer state in shared memory and passes over
// the examples. The chunks of all its examples form one stream through the stages, so that the first chunk of the
// next example is on its way while the last one of this example is multiplied and mapped.
#include <algorithm>

#include "epilogue.cuh"

namespace montessori {
namespace {

constexpr int kBlockO = 128, kBlockT = 32, kStages = 4, kThreads = 256, kWarps = 8;

// Tokens of one operand in a stage: kBlockT rows of WIDTH elements. Groups of 8 elements are permuted within a row by
// the row's number, so that the 8 rows of a transposed load lie in different banks.
template <int WIDTH>
struct Panel {
  static constexpr int kBytes = kBlockT * WIDTH * 2;

  __device__ static uint32_t at(uint32_t base, int token, int column) {
    return base + token * (WIDTH * 2) + (((column / 8) ^ (token & 7)) * 16);
  }

  // A thread copies the same column of tokens kThreads / kPieces apart.
  __device__ static void load(uint32_t base, const void* data, int64_t row, int count, int first, int width) {
    constexpr int kPieces = WIDTH / 8, kStep = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kBlockT % kStep == 0);
    int thread = threadIdx.x;
    compute_here(thread);
    const int token = thread / kPieces, column = thread % kPieces * 8;
    const uint16_t* from = static_cast<const uint16_t*>(data) + (row + token) * width + first + column;
    const bool inside = first + column < width;
#pragma unroll
    for (int i = 0; i < kBlockT / kStep; ++i) {
      const bool given = inside && token + i * kStep < count;
      copy_async(at(base, token + i * kStep, column), given ? from + i * kStep * width : data, given);
    }
  }
};

// The chunks of the examples first..last-1 in order; `count` tokens from `row` on, 0 when there are no more.
struct Chunks {
  const int64_t* spans;
  int example, last;
  int64_t row, end;
  int count;

  __device__ Chunks(const int64_t* spans, Share share)
      : spans(spans), example(share.first), last(share.last), row(0), end(0), count(0) {
    if (example < last) enter();
    settle();
  }

  __device__ void enter() {
    row = spans[2 * example];
    end = spans[2 * example + 1];
  }

  __device__ void next() {
    row += count;
    settle();
  }

  __device__ void settle() {
    while (row == end && example + 1 < last) {
      ++example;
      enter();
    }
    count = static_cast<int>(min(end - row, static_cast<int64_t>(kBlockT)));
  }
};

template <typename Operand, typename State, int BLOCK_I>
struct Kernel {
  static constexpr int kTilesM = 2, kTilesN = BLOCK_I / 16;
  static constexpr int kPairs = kTilesM * kTilesN * 2;
  static constexpr int kStageBytes = Panel<kBlockO>::kBytes + Panel<BLOCK_I>::kBytes;
  using Held = TileState<State, kPairs, kThreads>;
  static constexpr int kSharedBytes = kStages * kStageBytes + Held::kBytes;

  // Pair (m, n, half) of a thread, counted as 2 (m kTilesN + n) + half, in the fragment of m16n8.
  struct Position {
    int row, column;
    __device__ int2 operator()(int pair) const {
      const int m = pair / (2 * kTilesN), n = pair / 2 % kTilesN, half = pair % 2;
      return make_int2(row + 16 * m + 8 * half, column + 8 * n);
    }
  };

  __device__ static void load_stage(uint32_t stage, const LinearProblem& p, const Chunks& chunk, TilePosition tile) {
    if (chunk.count > 0) {
      Panel<kBlockO>::load(stage, p.dy.data, chunk.row, chunk.count, tile.first_o, p.out);
      Panel<BLOCK_I>::load(stage + Panel<kBlockO>::kBytes, p.x.data, chunk.row, chunk.count, tile.first_i, p.in);
    }
    commit_copies();
  }

  __device__ static void multiply_stage(uint32_t stage, float (&grad)[2 * kPairs]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_m = warp / 2 * 32, first_n = warp % 2 * (BLOCK_I / 2);
    const uint32_t panel_x = stage + Panel<kBlockO>::kBytes;
#pragma unroll
    for (int k = 0; k < kBlockT; k += 16) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        const int token = k + lane % 8 + lane / 16 * 8, column = first_m + 16 * m + lane / 8 % 2 * 8;
        load_transposed(a[m], Panel<kBlockO>::at(stage, token, column));
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t b[4];
        const int token = k + lane % 8 + lane / 8 % 2 * 8, column = first_n + 8 * n + lane / 16 * 8;
        load_transposed(b, Panel<BLOCK_I>::at(panel_x, token, column));
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          multiply<Operand>(&grad[4 * (m * kTilesN + n)], a[m], b[0], b[1]);
          multiply<Operand>(&grad[4 * (m * kTilesN + n + 1)], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ static void run(const LinearProblem& p, int splits) {
    unsigned char* shared = dynamic_shared();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const TilePosition tile = tile_position<kBlockO, BLOCK_I>(p, blockIdx.x);
    const Share share = share_of(p.examples, splits, blockIdx.y);
    const int64_t parts = static_cast<int64_t>(gridDim.x) * kWarps,
                  part = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    const Position position{tile.first_o + warp / 2 * 32 + lane / 4,
                            tile.first_i + warp % 2 * (BLOCK_I / 2) + lane % 4 * 2};
    const Held held{reinterpret_cast<typename Held::Slot*>(shared + kStages * kStageBytes),
                    static_cast<int>(threadIdx.x)};
    const uint32_t stages = shared_address(shared);

    Chunks ahead(p.spans, share);
    for (int stage = 0; stage < kStages - 1; ++stage, ahead.next()) {
      load_stage(stages + stage * kStageBytes, p, ahead, tile);
    }
    held.template load<kPairs>(p, position, 0);

    int stage = 0;
    for (int b = share.first; b < share.last; ++b) {
      float grad[2 * kPairs] = {};
      for (int64_t left = p.spans[2 * b + 1] - p.spans[2 * b]; left > 0; left -= kBlockT) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        load_stage(stages + (stage + kStages - 1) % kStages * kStageBytes, p, ahead, tile);
        ahead.next();
        multiply_stage(stages + stage * kStageBytes, grad);
        stage = (stage + 1) % kStages;
      }
      store_partial(p, parts, 0, b, part, held.apply(p, grad));
      for (int k = 1; k < p.sets; ++k) store_partial(p, parts, k, b, part, held.further_set(p, position, k, grad));
    }
    wait_for_copies<0>();
  }
};

template <typename Operand, typename State, int BLOCK_I>
__global__ void __launch_bounds__(kThreads, 1) linear_mma_kernel(const __grid_constant__ LinearProblem p, int splits) {
  Kernel<Operand, State, BLOCK_I>::run(p, splits);
}

template <typename Operand, typename State, int BLOCK_I>
cudaError_t launch(const LinearProblem& p, int splits, cudaStream_t stream) {
  constexpr int kBytes = Kernel<Operand, State, BLOCK_I>::kSharedBytes;
  const auto kernel = linear_mma_kernel<Operand, State, BLOCK_I>;
  static PerDevice known;
  int processors = 0;
  const cudaError_t error = known.get(&processors, [&](int* value) {
    int device = 0;
    if (const cudaError_t failed = cudaGetDevice(&device)) return failed;
    const cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    return failed != cudaSuccess ? failed : cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount, device);
  });
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  const int64_t tiles = num_tiles(p, mma_cut(p));
  splits = splits_for(p, splits, tiles, processors);
  config.gridDim = dim3(static_cast<unsigned>(tiles), splits);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p, splits);
}

template <typename Operand>
cudaError_t launch_operand(const LinearProblem& p, int splits, cudaStream_t stream) {
  return holds_bfloat16(p) ? launch<Operand, __nv_bfloat16, 128>(p, splits, stream)
                           : launch<Operand, float, 64>(p, splits, stream);
}

}  // namespace

Cut mma_cut(const LinearProblem& p) { return {kBlockO, holds_bfloat16(p) ? 128 : 64, 1, kWarps}; }

cudaError_t launch_linear_mma(const LinearProblem& p, int splits, cudaStream_t stream) {
  return p.x.dtype == Dtype::kBFloat16 ? launch_operand<__nv_bfloat16>(p, splits, stream)
                                       : launch_operand<__half>(p, splits, stream);
}

}  // namespace montessori
