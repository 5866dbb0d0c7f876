// What the files of one instruction set define, each in its namespace.
#pragma once

#include "bf16.h"

namespace hpctrain {

namespace portable {
extern const Engine ENGINE;
}
namespace avx2 {
extern const Engine ENGINE;
}
namespace avx512 {
extern const Engine ENGINE;
}

namespace avx512_bf16 {
extern const Pairs PAIRS;
}

#ifdef HPCTRAIN_ISA
namespace HPCTRAIN_ISA {

// --- conv.cpp ---
Index packed_size(const Convolution&);
void pack(const Convolution&, const float* w, float* packed);
void conv(const Convolution&, const float* x, const float* packed, const Epilogue&, float* y);

// --- conv_dx.cpp ---
Index packed_dx_size(const Convolution&);
void pack_dx(const Convolution&, const float* w, float* packed);
void conv_dx(const Convolution&, const float* dy, const float* packed, float* dx);

// --- conv_dw.cpp ---
void conv_dw(const Convolution&, const float* x, const float* dy, float* dw);

// --- gemm.cpp ---
void gemm(Index m, Index n, Index k, Matrix a, Matrix b, const Epilogue&, float* c, Index row);

// --- convert.cpp ---
void widen(const Rows&, const Bf16* array, float* copy);
void narrow(const Rows&, const float* copy, Bf16* array);
void add(const Rows&, const float* copy, float* array);

// --- pairs.cpp ---
void pair(const Rows&, const Bf16* low, const Bf16* high, float* pairs);
void pad(const Rows&, const Bf16* array, Bf16* copy);

}  // namespace HPCTRAIN_ISA
#endif

}  // namespace hpctrain
