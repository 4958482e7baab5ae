// All that the threads of `columns.cu` do, one after the other on the CPU: they exchange nothing, so this is the kernel
// but for its launch. Built by test_mx_columns_cuda.py, which gives the folder of `columns.cu`.

#include "columns.cu"

namespace {

template <int FORMAT>
void run(const Arguments& a) {
  const int64_t words = a.features / (FORMAT == kFp32 ? 1 : 2);
  for (int64_t block = 0; block < blocks_of(a); ++block)
    for (int64_t word = 0; word < words; ++word) cast_word<FORMAT>(a, block, word);
}

}  // namespace

extern "C" void cast_columns_on_host(const void* x, void* codes, void* scale, int64_t rows, int64_t features,
                                     int64_t stride, int format, int carry, int swizzled) {
  const Arguments a = arguments_of(x, codes, scale, rows, features, stride, format, carry, swizzled);
  if (format == kBf16) run<kBf16>(a);
  if (format == kFp16) run<kFp16>(a);
  if (format == kFp32) run<kFp32>(a);
}
