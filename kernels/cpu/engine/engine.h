// The CPU engine: convolution and matrix multiplication of float arrays, one set of functions per instruction set.
//
// Same meaning as hpctrain/backends/base.py. Nothing is copied but weights, which are packed for the vectors; outer
// dims may have any strides, channels are contiguous. Threads are OpenMP's: for one number of threads a result has the
// same bits every time.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../layout.h"

namespace hpctrain {

// Depth, height, width; 1D and 2D convolutions have extents 1 in front.
using Sizes = std::array<Index, 3>;
// Strides in elements: of sample, depth, height, width; of a weight: kernel depth, height, width, channel.
using Strides = std::array<Index, 4>;

struct Convolution {
    Index samples = 0, groups = 1, channels = 0, filters = 0;  // channels and filters of one group
    Sizes input{1, 1, 1}, output{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1}, dilation{1, 1, 1};
    Strides x{}, y{}, w{};  // y also of dy, x also of dx, w also of dw

    Index taps() const { return kernel[0] * kernel[1] * kernel[2]; }
    // Each channel alone: groups of one channel and one filter.
    bool depthwise() const { return groups > 1 && channels == 1 && filters == 1; }
};

// A matrix: element (i, j) lies at i * row + j * column; one of the two is 1.
struct Matrix {
    const float* data;
    Index row, column;
};

// What is done with sums before they are stored: + bias (of all columns; may be null), + what stands there, and then
// what is <= 0 becomes slope times itself: 1 changes nothing, 0 is a ReLU, which takes -infinity to 0 too.
struct Epilogue {
    const float* bias = nullptr;
    bool accumulate = false;
    float slope = 1;
};

// A bfloat16: the upper half of a float.
struct Bf16 {
    std::uint16_t bits;
};

// An array (samples, *extent, channels) and its copy: their strides.
struct Rows {
    Index samples;
    Sizes extent;
    Index channels;
    Strides array, copy;
};

struct Winograd;  // winograd.h

struct Products {
    // Packed weights of `conv` and of `conv_dx`: their size in floats, and how to make them. Good for every input of
    // the same kernel, channels and groups.
    Index (*packed_size)(const Convolution&);
    void (*pack)(const Convolution&, const float* w, float* packed);
    Index (*packed_dx_size)(const Convolution&);
    void (*pack_dx)(const Convolution&, const float* w, float* packed);

    // y = epilogue(conv(x, w))
    void (*conv)(const Convolution&, const float* x, const float* packed, const Epilogue&, float* y);
    void (*conv_dx)(const Convolution&, const float* dy, const float* packed, float* dx);
    void (*conv_dw)(const Convolution&, const float* x, const float* dy, float* dw);
    // c (m, n), rows `row` apart, = epilogue(a (m, k) b (k, n))
    void (*gemm)(Index m, Index n, Index k, Matrix a, Matrix b, const Epilogue&, float* c, Index row);
};

struct Pairs;  // bf16.h

struct Engine : Products {
    const char* isa;
    const Winograd* winograd;
    const Pairs* pairs;  // null where the processor has no products of bfloat16

    // An array of bfloat16 to its copy, and back, rounded to nearest, ties to even; NaN stays NaN.
    void (*widen)(const Rows&, const Bf16* array, float* copy);
    void (*narrow)(const Rows&, const float* copy, Bf16* array);
    // array += copy
    void (*add)(const Rows&, const float* copy, float* array);
    // OpenMP's number of threads, for what the calling thread starts.
    void (*use_threads)(int count);
};

// The engine in use: the best that this machine runs, or the one that the environment variable HPCTRAIN_ISA names.
// Throws std::invalid_argument where that names none that it runs.
const Engine& engine();
// Use the engine called `isa` from now on; "" is the choice above.
void select_engine(const std::string& isa);
// Names of the engines that this machine runs, the best first.
std::vector<std::string> engines();

}  // namespace hpctrain
