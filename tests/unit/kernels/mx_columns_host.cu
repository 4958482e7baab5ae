// All that the threads of `columns.cu` compute, one after the other on the CPU: the kernel but for its launch, its stores
// through shared memory and instructions for pairs of numbers, which tests on a GPU cover. Built by
// test_mx_columns_cuda.py, which gives the folder of `columns.cu`.

#include "columns.cu"

namespace {

template <int FORMAT>
void run(const Arguments& a) {
  constexpr int kNumbers = numbers(FORMAT);
  Cast casts[kMostNumbers];
  for (int64_t block = 0; block < blocks_of(a); ++block) {
    for (int64_t word = 0; word < a.features / kNumbers; ++word) {
      cast_word<FORMAT>(a, block, word, rows_of(a, block), casts);
      for (int which = 0; which < kNumbers; ++which) {
        const int64_t feature = word * kNumbers + which;
        memcpy(a.codes + (feature * blocks_of(a) + block) * kBlock, casts[which].codes, kBlock);
        a.scale[scale_place(a, feature, block)] = static_cast<uint8_t>(casts[which].byte);
      }
    }
  }
}

}  // namespace

extern "C" void cast_columns_on_host(const void* x, void* codes, void* scale, int64_t rows, int64_t features,
                                     int64_t stride, int format, int carry, int swizzled) {
  const Arguments a = arguments_of(x, codes, scale, rows, features, stride, format, carry, swizzled);
  if (format == kBf16) run<kBf16>(a);
  if (format == kFp16) run<kFp16>(a);
  if (format == kFp32) run<kFp32>(a);
}
