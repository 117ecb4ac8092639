// The matrix registers of AMX: products of pairs, 16 × 16 gradients and 16 steps of pairs an instruction. All else is
// as with AVX-512.
#include "kernel.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")
#define MONTESSORI_SIMD_BITS 512
#define MONTESSORI_SIMD_BF16
#include "rows_kernel.h"

namespace {

constexpr int kTileRows = 16;   // of a matrix register, and the steps of one product
constexpr int kTileBytes = 64;  // of each of its rows
constexpr int64_t kTileCells = kTileRows * kLanes;
static_assert(kLanes == kTileRows && kVectors == 3 && kTileRows % kRows == 0);

// The gradient of one register tile: its products, in registers 0 to 2. Registers 3 to 5 hold x, 6 dy.
class Product {
 public:
  Product(const char* x, const char* dy, int64_t steps, const float* start) : x_(x), dy_(dy), left_(steps / kTileRows) {
    start ? begin_at(start) : begin();
  }

  // Up to `count` more products for all of its elements; whether there are none left. Lines first to end - 1 of every
  // product's x are fetched `ahead` of it.
  bool multiply(int64_t count, int64_t ahead = 0, int first = 0, int end = 0) {
    for (; count > 0 && left_ > 0; --count, --left_, x_ += kTileRows * kColumns * 4, dy_ += kTileCells * 4) {
      for (int line = first; line < end; ++line) __builtin_prefetch(x_ + ahead + line * kTileBytes);
      _tile_loadd(6, dy_, kTileBytes);
      _tile_loadd(3, x_, kColumns * 4);
      _tile_dpbf16ps(0, 6, 3);
      _tile_loadd(4, x_ + kTileBytes, kColumns * 4);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(5, x_ + 2 * kTileBytes, kColumns * 4);
      _tile_dpbf16ps(2, 6, 5);
    }
    return left_ == 0;
  }

  static void store(float* gradient) {
    _tile_stored(0, gradient, kColumns * 4);
    _tile_stored(1, gradient + kLanes, kColumns * 4);
    _tile_stored(2, gradient + 2 * kLanes, kColumns * 4);
  }

 private:
  static void begin() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }

  static void begin_at(const float* start) {
    _tile_loadd(0, start, kColumns * 4);
    _tile_loadd(1, start + kLanes, kColumns * 4);
    _tile_loadd(2, start + 2 * kLanes, kColumns * 4);
  }

  const char *x_, *dy_;
  int64_t left_;
};

// A register tile is scored in parts of so many rows: between them is room for products.
constexpr int kPartRows = 2, kParts = kTileRows / kPartRows;

template <Step step, bool kFast>
inline void score_part(const TileJob& job, const float* gradient, int64_t base, Sums& sums) {
  Vector acc[kPartRows][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kPartRows; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) acc[r][c] = load(gradient + r * kColumns + c * kLanes);
  add_scores<step, kFast>(job, acc, base, sums);
}

template <Step step, bool kFast>
void score_matrix(const TileJob& job, const char* x, const char* dy, int64_t dy_stride, int64_t steps,
                  const float* const* starts, double* scores) {
  constexpr int kTile = kTileRows * kColumns, kPart = kPartRows * kColumns;
  alignas(kTileBytes) float gradients[2][kTile];
  Sums sums(job.sets);
  const int64_t tiles = job.rows / kTileRows, products = steps / kTileRows;
  Product(x, dy, steps, starts[0]).multiply(products);
  Product::store(gradients[0]);
  // The next tile's products, in so many at a time that the last two parts have none: their result is on its way to
  // the cache meanwhile.
  const int64_t share = (products + kParts - 3) / (kParts - 2);
  // x of the next example, which follows this one's, comes nearer by as many of its lines with each tile.
  const int lines = static_cast<int>((kTileRows * kVectors + tiles - 1) / tiles);
  for (int64_t tile = 0; tile + 1 < tiles; ++tile) {
    const int line = static_cast<int>(tile) * lines;
    Product next(x, dy + (tile + 1) * dy_stride * 4, steps, starts[tile + 1]);
    bool stored = false;
    for (int part = 0; part < kParts; ++part) {
      if (next.multiply(share, steps * kColumns * 4, line, line + lines) && !stored) {
        Product::store(gradients[(tile + 1) % 2]);
        stored = true;
      }
      score_part<step, kFast>(job, gradients[tile % 2] + part * kPart, tile * kTile + part * kPart, sums);
    }
  }
  for (int part = 0; part < kParts; ++part)
    score_part<step, kFast>(job, gradients[(tiles - 1) % 2] + part * kPart, (tiles - 1) * kTile + part * kPart, sums);
  sums.add_to(scores);
}

template <Step step>
void score_pairs(const TileJob& job, const void* x, const void* dy, int64_t dy_stride, int64_t steps,
                 const float* const* starts, double* scores) {
  const auto score = job.eps >= kSmallestFastEps ? score_matrix<step, true> : score_matrix<step, false>;
  score(job, static_cast<const char*>(x), static_cast<const char*>(dy), dy_stride, steps, starts, scores);
}

// 16 values of one token from column `at`, those of the mask, each the low half of a cell.
template <bool kFloats>
inline __m512i sixteen(const void* row, int64_t at, __mmask16 live) {
  if constexpr (kFloats) {
    const __m512 values = _mm512_maskz_loadu_ps(live, static_cast<const float*>(row) + at);
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
  }
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, static_cast<const uint16_t*>(row) + at));
}

// Cells of tokens 2s and 2s + 1.
template <bool kFloats>
inline __m512i sixteen_pairs(const void* const* rows, int64_t tokens, int64_t s, int64_t at, __mmask16 live) {
  const __m512i none = _mm512_setzero_si512();
  const __m512i first = 2 * s < tokens ? sixteen<kFloats>(rows[2 * s], at, live) : none;
  const __m512i second = 2 * s + 1 < tokens ? sixteen<kFloats>(rows[2 * s + 1], at, live) : none;
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

inline __mmask16 mask_of(int64_t live) {
  return live >= kLanes ? (__mmask16)-1 : live <= 0 ? 0 : (__mmask16)((1u << live) - 1);
}

// to[i][j] = rows[j][i], by exchanging halves of ever smaller blocks.
inline void transpose(__m512i (&rows)[kLanes], uint32_t* to) {
  __m512i next[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    next[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    next[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
  }
  // rows[4 a + b] has, in its quarter c, elements 4 a .. 4 a + 3 of column 4 c + b.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i low = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xdd);
    _mm512_storeu_si512(to + b * kLanes, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(to + (4 + b) * kLanes, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(to + (8 + b) * kLanes, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(to + (12 + b) * kLanes, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

template <bool kFloats>
void pack_x(const void* const* rows, int64_t tokens, int64_t column, int64_t live, int64_t steps, uint32_t* to) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t at = 0; at < kColumns; at += kLanes, to += kLanes)
      _mm512_storeu_si512(to, sixteen_pairs<kFloats>(rows, tokens, s, column + at, mask_of(live - at)));
}

template <bool kFloats>
void pack_dy(const void* const* rows, int64_t tokens, int64_t column, int64_t live, int64_t steps, uint32_t* to) {
  for (int64_t s = 0; s < steps; s += kTileRows, to += kTileCells) {
    __m512i pairs[kLanes];
    for (int i = 0; i < kTileRows; ++i) pairs[i] = sixteen_pairs<kFloats>(rows, tokens, s + i, column, mask_of(live));
    transpose(pairs, to);
  }
}

void pack_pairs(const void* const* rows, int64_t tokens, bool floats, bool grouped, int64_t column, int64_t live,
                int64_t steps, uint32_t* to) {
  if (grouped)
    (floats ? pack_dy<true> : pack_dy<false>)(rows, tokens, column, live, steps, to);
  else
    (floats ? pack_x<true> : pack_x<false>)(rows, tokens, column, live, steps, to);
}

// Rows of a at a time, and the products that `bytes` of them take: 32 features each.
constexpr int kDotBlocks = 3, kBlockRows = kDotBlocks * kTileRows,
              kMostDotProducts = montessori::kDotFeatures / (2 * kLanes);

// The features of one product, of a row that ends after `bytes`.
inline __m512i features(const char* row, int64_t product, int64_t bytes) {
  const int64_t left = (bytes - product * kTileBytes) / 2;
  const __mmask32 live = left >= 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
  return _mm512_maskz_loadu_epi16(live, row + product * kTileBytes);
}

// Both sides of the products of some rows: a as it lies, b turned so that a register has two features of 16 rows in
// each of its own.
struct Sides {
  alignas(kTileBytes) char a[kMostDotProducts][kBlockRows][kTileBytes];
  alignas(kTileBytes) uint32_t b[kMostDotProducts][kTileCells];

  void set_a(const char* const* rows, int64_t count, int64_t products, int64_t bytes) {
    for (int64_t r = 0; r < kBlockRows; ++r)
      for (int64_t p = 0; p < products; ++p)
        _mm512_store_si512(a[p][r], r < count ? features(rows[r], p, bytes) : _mm512_setzero_si512());
  }

  void set_b(const char* const* rows, int64_t count, int64_t products, int64_t bytes) {
    for (int64_t p = 0; p < products; ++p) {
      __m512i cells[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) cells[r] = r < count ? features(rows[r], p, bytes) : _mm512_setzero_si512();
      transpose(cells, b[p]);
    }
  }

  // Of all rows of a with the 16 of b, to dots [kBlockRows, 16].
  void multiply(int64_t products, float* dots) const {
    // The compiler does not know that loads to matrix registers read memory.
    asm volatile("" : : "r"(this) : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t p = 0; p < products; ++p) {
      _tile_loadd(3, b[p], kTileBytes);
      _tile_loadd(4, a[p], kTileBytes);
      _tile_dpbf16ps(0, 4, 3);
      _tile_loadd(5, a[p][kTileRows], kTileBytes);
      _tile_dpbf16ps(1, 5, 3);
      _tile_loadd(6, a[p][2 * kTileRows], kTileBytes);
      _tile_dpbf16ps(2, 6, 3);
    }
    _tile_stored(0, dots, kTileBytes);
    _tile_stored(1, dots + kTileCells, kTileBytes);
    _tile_stored(2, dots + 2 * kTileCells, kTileBytes);
  }
};

void add_dots_of_pairs(const RowPairs& pairs, int64_t bytes, float* dots) {
  Sides sides;
  alignas(kTileBytes) float found[kBlockRows * kLanes];
  const int64_t products = (bytes + kTileBytes - 1) / kTileBytes;
  for (int64_t i = 0; i < pairs.rows; i += kBlockRows) {
    const int64_t rows = std::min<int64_t>(kBlockRows, pairs.rows - i), end = pairs.before + i + rows;
    sides.set_a(pairs.a + i, rows, products, bytes);
    for (int64_t j = 0; j < end; j += kLanes) {
      sides.set_b(pairs.b + j, end - j, products, bytes);
      sides.multiply(products, found);
      const __mmask16 live = mask_of(end - j);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = dots + (i + r) * pairs.stride + j;
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(live, to), _mm512_load_ps(found + r * kLanes));
        _mm512_mask_storeu_ps(to, live, sum);
      }
    }
  }
}

// Eight registers, all full, as the processor reads it.
struct Registers {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr Registers() {
    for (int i = 0; i < 8; ++i) {
      bytes[i] = kTileBytes;
      rows[i] = kTileRows;
    }
  }
};

// Not on the stack: of what the instruction reads the compiler knows the first bytes only.
constexpr Registers kFull;

// What another library had set up for this thread is what it finds again.
void enter(unsigned char (&saved)[64]) {
  static_assert(sizeof(kFull) == sizeof(saved));
  _tile_storeconfig(saved);
  _tile_loadconfig(&kFull);
}

void leave(const unsigned char (&saved)[64]) { _tile_loadconfig(saved); }

// Linux gives the registers to processes that ask.
bool may_use() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

constexpr montessori::Kernel with_matrices() {
  montessori::Kernel kernel = kKernel;
  kernel.pairs = {
      kTileRows, kTileRows, score_pairs<Step::kAdamW>, score_pairs<Step::kSgd>, add_dots_of_pairs, pack_pairs,
      enter,     leave};
  return kernel;
}

constexpr montessori::Kernel kMatrices = with_matrices();

}  // namespace

namespace montessori {
const Kernel* kernel_amx() {
  static const bool usable = may_use();
  return usable ? &kMatrices : nullptr;
}
}  // namespace montessori
#else
namespace montessori {
const Kernel* kernel_amx() { return nullptr; }
}  // namespace montessori
#endif
