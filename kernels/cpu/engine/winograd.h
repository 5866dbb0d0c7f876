// Winograd's convolution: 36 products per channel and filter give 4 x 4 outputs of a kernel 3 x 3, instead of 144, and
// 64 give 4 x 4 outputs of a kernel 5 x 5, instead of 400. Where such tiles would lie mostly outside of an image, 16
// and 36 give 2 x 2 outputs, instead of 36 and 100.
//
// For kernels (kd, 3, 3) and (kd, 5, 5) without stride and dilation: Winograd in the plane, a sum over the depth taps;
// and for strided ones of few channels that are such a convolution of the phases of x (winograd_phases.h).
// Results differ from those of a direct convolution by rounding, of a few times its size (see winograd_transform.h).
// NaN and infinity reach all outputs of their tile, an infinity maybe as NaN.
#pragma once

#include "engine.h"

namespace hpctrain {

// Rows and columns, less than a tile has, by which the first tile starts before the first output: blocks of a larger
// image, cut anywhere, can have their tiles where the whole image has them. And how many points a tile has per dim: 4
// or 6 for kernels 3 x 3, 6 or 8 for 5 x 5; 0 is what takes the fewest operations.
struct TileAnchor {
    int h = 0, w = 0, edge = 0;
};

// The functions of one instruction set. Arrays and their meaning as in Engine; weights are transformed on the way, as
// that costs less than to read transformed ones from memory.
struct Winograd {
    // Whether the functions below can compute it.
    bool (*fits)(const Convolution&);
    // Their time relative to that of a direct convolution in float, about; `cost` for y and dw, `cost_dx` for dx.
    double (*cost)(const Convolution&);
    double (*cost_dx)(const Convolution&);
    // Whether `conv` and `conv_dw` can compute this convolution too, which has a stride, and faster.
    bool (*strided)(const Convolution&);

    void (*conv)(const Convolution&, const float* x, const float* w, const Epilogue&, float* y, TileAnchor);
    void (*conv_dx)(const Convolution&, const float* dy, const float* w, float* dx, TileAnchor);
    void (*conv_dw)(const Convolution&, const float* x, const float* dy, float* dw, TileAnchor);
};

namespace portable {
extern const Winograd WINOGRAD;
}
namespace avx2 {
extern const Winograd WINOGRAD;
}
namespace avx512 {
extern const Winograd WINOGRAD;
}

#ifdef HPCTRAIN_ISA
namespace HPCTRAIN_ISA {

// --- winograd.cpp ---
bool winograd_fits(const Convolution&);
double winograd_cost(const Convolution&);
double winograd_cost_dx(const Convolution&);
bool winograd_strided(const Convolution&);

// --- winograd_conv.cpp ---
void winograd_conv(const Convolution&, const float* x, const float* w, const Epilogue&, float* y, TileAnchor);
void winograd_dx(const Convolution&, const float* dy, const float* w, float* dx, TileAnchor);

// --- winograd_dw.cpp ---
void winograd_dw(const Convolution&, const float* x, const float* dy, float* dw, TileAnchor);

}  // namespace HPCTRAIN_ISA
#endif

}  // namespace hpctrain
