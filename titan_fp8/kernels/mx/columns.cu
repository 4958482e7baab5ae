// The MXFP8 cast along T, transposed: x [T, K] -> codes_t [K, padded(T)] in e4m3 and scale_t in e8m0, a byte for each
// 32 rows of a feature. `reference.py` says what is computed, `layout.py` how scales lie.
//
// A thread has a 32-bit word of each of 32 rows: one feature in fp32, two in bf16 or fp16. So a warp reads 128 bytes of
// a row at a time, a block of values lies in the registers of one thread, and amax takes no exchange between threads.
// The four warps of a thread block have 128 rows. Their codes pass through shared memory, so that eight neighbours write
// one line of memory, 128 bytes of a feature's transposed row, and not each thread a part of 32 lines.
// bf16 stays in pairs: amax and scaling take one instruction for two numbers (see `pairs.py`, which says why it is exact).

#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

namespace {

enum Format { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

constexpr int kBlock = 32;       // values that share a scale
constexpr int kWarps = 4;        // blocks along T of a thread block
constexpr int kWarpWords = 32;   // words along K of a thread block
constexpr int kMostNumbers = 2;  // in a word
constexpr uint32_t kInf = 0x7f800000u;
constexpr uint32_t kNanByte = 255;

__host__ __device__ constexpr int numbers(int format) { return format == kFp32 ? 1 : 2; }

struct Arguments {
  const uint32_t* x;
  uint8_t* codes;
  uint8_t* scale;
  int64_t rows, features;
  int64_t stride;  // of x, in words
  uint32_t carry;  // what the scaling mode adds to the bits of amax
  bool swizzled;
};

__host__ __device__ inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__host__ __device__ inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

__host__ __device__ inline int64_t blocks_of(const Arguments& a) { return (a.rows + kBlock - 1) / kBlock; }

// The fp32 bits of the `which`th number in a word.
template <int FORMAT>
__host__ __device__ inline uint32_t number(uint32_t word, int which) {
  if (FORMAT == kFp32) return word;
  if (FORMAT == kBf16) return which == 0 ? word << 16 : word & 0xffff0000u;
  __half_raw half;
  half.x = static_cast<unsigned short>(which == 0 ? word : word >> 16);
  return bits_of(__half2float(__half(half)));
}

__host__ __device__ inline uint32_t scale_byte(uint32_t amax, uint32_t carry) {
  if (amax >= kInf) return kNanByte;
  const int byte = static_cast<int>((amax + carry) >> 23) - 8;
  return byte < 0 ? 0 : byte;
}

__host__ __device__ inline uint32_t two_codes(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

// Four codes of NaN, or if fewer rows are left, as many, and zeros of padding.
__host__ __device__ inline uint32_t nan_codes(int left) {
  return left >= 4 ? 0x7f7f7f7fu : left <= 0 ? 0 : 0x7f7f7f7fu >> (8 * (4 - left));
}

// Where the scale of a feature and a block is.
__host__ __device__ inline int64_t scale_place(const Arguments& a, int64_t feature, int64_t block) {
  if (!a.swizzled) return block * a.features + feature;
  const int64_t tile = feature / 128 * ((blocks_of(a) + 3) / 4) + block / 4;
  return tile * 512 + feature % 32 * 16 + feature / 32 % 4 * 4 + block % 4;
}

// What a thread makes of one feature: 32 codes and the byte of their scale.
struct Cast {
  uint32_t codes[kBlock / 4];
  uint32_t byte;
};

// The largest magnitude of the `which`th numbers of words, as fp32 bits.
template <int FORMAT>
__host__ __device__ inline uint32_t amax_of(const uint32_t (&words)[kBlock], int which) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = number<FORMAT>(words[i], which) & 0x7fffffffu;
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
// The larger magnitudes of two pairs in bf16, NaN above all; the signs mean nothing.
__device__ inline uint32_t larger_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ inline uint32_t amax_of_pairs(const uint32_t (&words)[kBlock]) {
  uint32_t amax = words[0];
#pragma unroll
  for (int i = 1; i < kBlock; ++i) amax = larger_pair(amax, words[i]);
  return amax & 0x7fff7fffu;
}

// Products of pairs in bf16.
__device__ inline uint32_t scaled_pair(uint32_t word, uint32_t factors) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(word), "r"(factors), "r"(0x80008000u));
  return result;
}
#endif

// All that one thread computes: the features of a word, in the 32 rows of a block, of which so many are there.
template <int FORMAT>
__host__ __device__ inline void cast_word(const Arguments& a, int64_t block, int64_t word, int rows,
                                          Cast (&casts)[kMostNumbers]) {
  constexpr int kNumbers = numbers(FORMAT);
  const uint32_t* source = a.x + block * kBlock * a.stride + word;
  uint32_t words[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) words[i] = 0;
  if (rows == kBlock) {  // almost always; without a comparison for each row
#pragma unroll
    for (int i = 0; i < kBlock; ++i, source += a.stride) words[i] = *source;
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i, source += a.stride)
      if (i < rows) words[i] = *source;
  }
  uint32_t amax[kMostNumbers];
  float inverse[kMostNumbers];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  if (FORMAT == kBf16) {
    const uint32_t pair = amax_of_pairs(words);
    amax[0] = pair << 16;
    amax[1] = pair & 0xffff0000u;
  } else
#endif
  {
#pragma unroll
    for (int which = 0; which < kNumbers; ++which) amax[which] = amax_of<FORMAT>(words, which);
  }
#pragma unroll
  for (int which = 0; which < kNumbers; ++which) {
    const uint32_t byte = casts[which].byte = scale_byte(amax[which], a.carry);
    inverse[which] = from_bits((254 - (byte == kNanByte ? 0 : byte)) << 23);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  if (FORMAT == kBf16) {
    const uint32_t factors = bits_of(inverse[0]) >> 16 | bits_of(inverse[1]);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) words[i] = scaled_pair(words[i], factors);
    inverse[0] = inverse[1] = 1.0f;
  }
#endif
#pragma unroll
  for (int which = 0; which < kNumbers; ++which) {
#pragma unroll
    for (int i = 0; i < kBlock; i += 4) {
      float scaled[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) scaled[j] = from_bits(number<FORMAT>(words[i + j], which)) * inverse[which];
      casts[which].codes[i / 4] = two_codes(scaled[0], scaled[1]) | two_codes(scaled[2], scaled[3]) << 16;
    }
    if (casts[which].byte == kNanByte) {
#pragma unroll
      for (int i = 0; i < kBlock; i += 4) casts[which].codes[i / 4] = nan_codes(rows - i);
    }
  }
}

__host__ __device__ inline int rows_of(const Arguments& a, int64_t block) {
  const int64_t left = a.rows - block * kBlock;
  return left < 0 ? 0 : left < kBlock ? static_cast<int>(left) : kBlock;
}

// The `half`th 16 codes of a feature.
__host__ __device__ inline uint4 half_of(const Cast& cast, int half) {
  const uint32_t* codes = cast.codes + 4 * half;
  return make_uint4(codes[0], codes[1], codes[2], codes[3]);
}

template <int FORMAT>
__global__ void __launch_bounds__(kWarps* kWarpWords) cast_columns_kernel(const Arguments a) {
  constexpr int kNumbers = numbers(FORMAT), kFeatures = kNumbers * kWarpWords, kParts = 2 * kWarps;
  // 16 codes each, of a feature's 128 rows. Turned by the feature, or threads of a warp would meet in the same banks.
  __shared__ uint4 parts[kFeatures * kParts];
  __shared__ uint32_t bytes[kFeatures];  // of four blocks
  const int64_t first_block = static_cast<int64_t>(blockIdx.x) * kWarps, block = first_block + threadIdx.y;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.y) * kFeatures;
  const int64_t word = static_cast<int64_t>(blockIdx.y) * kWarpWords + threadIdx.x;
  const int rows = word < a.features / kNumbers ? rows_of(a, block) : 0;
  Cast casts[kMostNumbers];
  cast_word<FORMAT>(a, block, word, rows, casts);
#pragma unroll
  for (int which = 0; which < kNumbers; ++which) {
    const int feature = kNumbers * threadIdx.x + which;
    for (int half = 0; half < 2; ++half)
      parts[feature * kParts + ((2 * threadIdx.y + half) ^ (feature / kNumbers % kParts))] = half_of(casts[which], half);
    reinterpret_cast<uint8_t*>(bytes + feature)[threadIdx.y] = static_cast<uint8_t>(casts[which].byte);
  }
  __syncthreads();
  const int thread = threadIdx.y * kWarpWords + threadIdx.x;
  const int part = thread % kParts;
#pragma unroll
  for (int feature = thread / kParts; feature < kFeatures; feature += kWarps * kWarpWords / kParts) {
    const int64_t at = ((first_feature + feature) * blocks_of(a) + first_block) * kBlock;
    if (first_feature + feature < a.features && first_block + part / 2 < blocks_of(a))
      reinterpret_cast<uint4*>(a.codes + at)[part] = parts[feature * kParts + (part ^ (feature / kNumbers % kParts))];
  }
  if (thread >= kFeatures || first_feature + thread >= a.features) return;
  uint8_t* target = a.scale + scale_place(a, first_feature + thread, first_block);
  const int64_t left = blocks_of(a) - first_block;
  if (left >= kWarps && a.swizzled) {  // four bytes side by side, the first at a multiple of four
    *reinterpret_cast<uint32_t*>(target) = bytes[thread];
  } else {
    const int64_t apart = a.swizzled ? 1 : a.features;
    for (int i = 0; i < kWarps && i < left; ++i) target[i * apart] = static_cast<uint8_t>(bytes[thread] >> (8 * i));
  }
}

template <int FORMAT>
void launch(const Arguments& a, cudaStream_t stream) {
  const int64_t words = a.features / numbers(FORMAT);
  const dim3 grid((blocks_of(a) + kWarps - 1) / kWarps, (words + kWarpWords - 1) / kWarpWords);
  cast_columns_kernel<FORMAT><<<grid, dim3(kWarpWords, kWarps), 0, stream>>>(a);
}

Arguments arguments_of(const void* x, void* codes, void* scale, int64_t rows, int64_t features, int64_t stride,
                       int format, int carry, int swizzled) {
  const int64_t words = format == kFp32 ? stride : stride / 2;
  return {static_cast<const uint32_t*>(x), static_cast<uint8_t*>(codes),  static_cast<uint8_t*>(scale), rows, features,
          words,                           static_cast<uint32_t>(carry), swizzled != 0};
}

}  // namespace

// x lies at a multiple of 4 bytes, and so does each of its rows, which are `stride` numbers apart; the numbers of a row
// are contiguous. codes and scale lie at a multiple of 16 bytes. Returns a cudaError_t.
extern "C" int titan_fp8_mx_cast_columns(const void* x, void* codes, void* scale, int64_t rows, int64_t features,
                                         int64_t stride, int format, int carry, int swizzled, void* stream) {
  const Arguments a = arguments_of(x, codes, scale, rows, features, stride, format, carry, swizzled);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (format == kBf16) launch<kBf16>(a, queue);
  if (format == kFp16) launch<kFp16>(a, queue);
  if (format == kFp32) launch<kFp32>(a, queue);
  return static_cast<int>(cudaGetLastError());
}
