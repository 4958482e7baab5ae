// The MXFP8 cast along T, transposed: x [T, K] -> codes_t [K, padded(T)] in e4m3 and scale_t in e8m0, a byte for each
// 32 rows of a feature. `reference.py` says what is computed, `layout.py` how swizzled scales lie.
//
// A thread has a 32-bit word of each of 32 rows: one feature in fp32, two in bf16 or fp16. So a warp reads 128 bytes of
// a row at a time, a block of values lies in the registers of one thread, and amax takes no exchange between threads.
// A thread writes 32 bytes of each feature's transposed row; the four warps of a thread block have 128 rows, whose codes
// are one line of memory.

#include <cstdint>
#include <cstring>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

namespace {

enum Format { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

constexpr int kBlock = 32;       // values that share a scale
constexpr int kWarps = 4;        // blocks along T of a thread block
constexpr int kWarpWords = 32;   // words along K of a thread block
constexpr uint32_t kInf = 0x7f800000u;
constexpr uint32_t kNanByte = 255;

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
  if (!a.swizzled) return feature * blocks_of(a) + block;
  const int64_t tile = feature / 128 * ((blocks_of(a) + 3) / 4) + block / 4;
  return tile * 512 + feature % 32 * 16 + feature / 32 % 4 * 4 + block % 4;
}

// All that one thread does: the features of a word, in the 32 rows of a block.
template <int FORMAT>
__host__ __device__ inline void cast_word(const Arguments& a, int64_t block, int64_t word) {
  constexpr int kNumbers = FORMAT == kFp32 ? 1 : 2;
  const int64_t first_row = block * kBlock;
  const int rows = a.rows - first_row < kBlock ? static_cast<int>(a.rows - first_row) : kBlock;
  const uint32_t* source = a.x + first_row * a.stride + word;
  uint32_t words[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) words[i] = i < rows ? source[i * a.stride] : 0;
#pragma unroll
  for (int which = 0; which < kNumbers; ++which) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t magnitude = number<FORMAT>(words[i], which) & 0x7fffffffu;
      amax = magnitude > amax ? magnitude : amax;
    }
    const uint32_t byte = scale_byte(amax, a.carry);
    const bool is_nan = byte == kNanByte;
    const float inverse = from_bits((254 - (is_nan ? 0 : byte)) << 23);
    uint32_t codes[kBlock / 4];
#pragma unroll
    for (int i = 0; i < kBlock; i += 4) {
      float scaled[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) scaled[j] = from_bits(number<FORMAT>(words[i + j], which)) * inverse;
      const uint32_t packed = two_codes(scaled[0], scaled[1]) | two_codes(scaled[2], scaled[3]) << 16;
      codes[i / 4] = is_nan ? nan_codes(rows - i) : packed;
    }
    const int64_t feature = word * kNumbers + which;
    uint4* target = reinterpret_cast<uint4*>(a.codes + (feature * blocks_of(a) + block) * kBlock);
    target[0] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    target[1] = make_uint4(codes[4], codes[5], codes[6], codes[7]);
    a.scale[scale_place(a, feature, block)] = static_cast<uint8_t>(byte);
  }
}

template <int FORMAT>
__global__ void __launch_bounds__(kWarps* kWarpWords) cast_columns_kernel(const Arguments a) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  const int64_t word = static_cast<int64_t>(blockIdx.y) * kWarpWords + threadIdx.x;
  if (block < blocks_of(a) && word < a.features / (FORMAT == kFp32 ? 1 : 2)) cast_word<FORMAT>(a, block, word);
}

template <int FORMAT>
void launch(const Arguments& a, cudaStream_t stream) {
  const int64_t words = a.features / (FORMAT == kFp32 ? 1 : 2);
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
// are contiguous. codes lies at a multiple of 16 bytes. Returns a cudaError_t.
extern "C" int titan_fp8_mx_cast_columns(const void* x, void* codes, void* scale, int64_t rows, int64_t features,
                                         int64_t stride, int format, int carry, int swizzled, void* stream) {
  const Arguments a = arguments_of(x, codes, scale, rows, features, stride, format, carry, swizzled);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (format == kBf16) launch<kBf16>(a, queue);
  if (format == kFp16) launch<kFp16>(a, queue);
  if (format == kFp32) launch<kFp32>(a, queue);
  return static_cast<int>(cudaGetLastError());
}
