// The engine's part of hpctrain._native: convolution and matrix products of arrays of float32, or of bfloat16, which
// Python has as uint16.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "arrays.h"
#include "bindings.h"
#include "engine/bf16.h"
#include "engine/engine.h"
#include "engine/scratch.h"
#include "engine/winograd.h"

namespace hpctrain {
namespace {

using I = const In<float>&;
using O = const Out<float>&;
using HalfI = const In<std::uint16_t>&;
using HalfO = const Out<std::uint16_t>&;
using Bias = std::optional<In<float>>;
using Numbers = std::vector<Index>;

// The convolution of x (N, *inputs, C) by w (*kernel, C / groups, filters) that gives y (N, *outputs, filters).
template <class X, class Y, class Z>
Convolution convolution(const char* name, const X& x, const Y& w, const Z& y, const Numbers& stride,
                        const Numbers& dilation, Index groups) {
    const size_t dims = stride.size();
    if (dims < 1 || dims > 3 || dilation.size() != dims || x.ndim() != dims + 2 || w.ndim() != dims + 2 ||
        y.ndim() != dims + 2) {
        refuse(name, "stride and dilation need one number per position dim, of which there are 1 to 3, not " +
                         std::to_string(dims) + " and " + std::to_string(dilation.size()) + " beside " + shape_of(x) +
                         ", " + shape_of(w) + ", " + shape_of(y));
    }
    require_rows(name, x), require_rows(name, w), require_rows(name, y);
    const Index channels = Index(x.shape(dims + 1)), filters = Index(y.shape(dims + 1));
    if (groups < 1 || channels % groups || filters % groups) {
        refuse(name, std::to_string(channels) + " channels and " + std::to_string(filters) +
                         " filters do not part into " + std::to_string(groups) + " equal groups");
    }
    Convolution c;
    c.samples = Index(x.shape(0)), c.groups = groups, c.channels = channels / groups, c.filters = filters / groups;
    c.x[0] = Index(x.stride(0)), c.y[0] = Index(y.stride(0)), c.w[3] = Index(w.stride(dims));
    bool fits = x.shape(0) == y.shape(0) && Index(w.shape(dims)) == c.channels && Index(w.shape(dims + 1)) == filters;
    for (size_t d = 0; d < dims; ++d) {
        if (stride[d] < 1 || dilation[d] < 1) refuse(name, "stride and dilation start at 1");
        const size_t to = 3 - dims + d;
        c.input[to] = Index(x.shape(d + 1)), c.output[to] = Index(y.shape(d + 1)), c.kernel[to] = Index(w.shape(d));
        c.x[to + 1] = Index(x.stride(d + 1)), c.y[to + 1] = Index(y.stride(d + 1)), c.w[to] = Index(w.stride(d));
        c.stride[to] = stride[d], c.dilation[to] = dilation[d];
        const Index room = c.input[to] - dilation[d] * (c.kernel[to] - 1) - 1;
        fits = fits && c.kernel[to] > 0 && c.output[to] == (room < 0 ? 0 : room / stride[d] + 1);
    }
    if (!fits) refuse(name, "weights " + shape_of(w) + " over " + shape_of(x) + " do not give " + shape_of(y));
    return c;
}

const float* bias_of(const char* name, const Bias& bias, Index columns) {
    if (!bias) return nullptr;
    if (bias->ndim() != 1 || Index(bias->shape(0)) != columns || (columns > 1 && bias->stride(0) != 1)) {
        refuse(name, "bias must be a contiguous vector of " + std::to_string(columns) +
                         " numbers, not an array of shape " + shape_of(*bias));
    }
    return bias->data();
}

// Winograd's convolution where it is faster, unless the result must be exact to the rounding of its sums.
const Winograd* winograd(const Engine& e, const Convolution& c, bool exact, bool dx = false) {
    if (!exact && !dx && e.winograd->strided(c)) return e.winograd;
    return !exact && e.winograd->fits(c) && (dx ? e.winograd->cost_dx : e.winograd->cost)(c) < 1 ? e.winograd : nullptr;
}

void conv_floats(I x, I w, O out, const Numbers& stride, const Numbers& dilation, Index groups, const Bias& bias,
          bool accumulate, bool exact, double slope) {
    const Convolution c = convolution("conv", x, w, out, stride, dilation, groups);
    const Epilogue epilogue{bias_of("conv", bias, c.groups * c.filters), accumulate, float(slope)};
    const Engine& e = engine();
    if (const Winograd* faster = winograd(e, c, exact))
        return faster->conv(c, x.data(), w.data(), epilogue, out.data(), {});
    Scratch scratch;
    float* packed = scratch.array<float>(e.packed_size(c));
    e.pack(c, w.data(), packed);
    e.conv(c, x.data(), packed, epilogue, out.data());
}

void conv_dx_floats(I dy, I w, O out, const Numbers& stride, const Numbers& dilation, Index groups, bool exact) {
    const Convolution c = convolution("conv_dx", out, w, dy, stride, dilation, groups);
    const Engine& e = engine();
    if (const Winograd* faster = winograd(e, c, exact, true))
        return faster->conv_dx(c, dy.data(), w.data(), out.data(), {});
    Scratch scratch;
    float* packed = scratch.array<float>(e.packed_dx_size(c));
    e.pack_dx(c, w.data(), packed);
    e.conv_dx(c, dy.data(), packed, out.data());
}

void conv_dw_floats(I x, I dy, O out, const Numbers& stride, const Numbers& dilation, Index groups, bool exact) {
    const Convolution c = convolution("conv_dw", x, out, dy, stride, dilation, groups);
    const Engine& e = engine();
    if (const Winograd* faster = winograd(e, c, exact)) return faster->conv_dw(c, x.data(), dy.data(), out.data(), {});
    e.conv_dw(c, x.data(), dy.data(), out.data());
}

const Bf16* halves(HalfI a) { return reinterpret_cast<const Bf16*>(a.data()); }
Bf16* halves(HalfO a) { return reinterpret_cast<Bf16*>(a.data()); }

void conv_bf16(HalfI x, HalfI w, HalfO out, const Numbers& stride, const Numbers& dilation, Index groups,
               const Bias& bias, bool exact, double slope) {
    const Convolution c = convolution("conv", x, w, out, stride, dilation, groups);
    conv(c, halves(x), halves(w), {bias_of("conv", bias, c.groups * c.filters), false, float(slope)}, exact, halves(out));
}

void conv_dx_bf16(HalfI dy, HalfI w, HalfO out, const Numbers& stride, const Numbers& dilation, Index groups,
                  bool exact) {
    const Convolution c = convolution("conv_dx", out, w, dy, stride, dilation, groups);
    conv_dx(c, halves(dy), halves(w), exact, halves(out));
}

void conv_dw_bf16(HalfI x, HalfI dy, O out, const Numbers& stride, const Numbers& dilation, Index groups, bool exact) {
    const Convolution c = convolution("conv_dw", x, out, dy, stride, dilation, groups);
    conv_dw(c, halves(x), halves(dy), exact, out.data());
}

// Winograd's convolution whether it is faster or not, with its tiles anywhere.
template <class X, class Y, class Z>
Convolution winograd_convolution(const char* name, const X& x, const Y& w, const Z& y, Index groups,
                                 const Numbers& anchor) {
    const Numbers ones(x.ndim() < 2 ? 0 : x.ndim() - 2, 1);
    const Convolution c = convolution(name, x, w, y, ones, ones, groups);
    if (!engine().winograd->fits(c)) {
        refuse(name,
               "Winograd's convolution takes kernels 3 x 3 and 5 x 5, with a depth or without, and arrays that have "
               "outputs, not weights " +
                   shape_of(w) + " over " + shape_of(x));
    }
    const Index small = c.kernel[1] == 3 ? 4 : 6, edge = anchor.size() == 3 ? anchor[2] : 6, most = edge - c.kernel[1];
    if (anchor.size() < 2 || anchor.size() > 3 || (edge != small && edge != small + 2) || anchor[0] < 0 ||
        anchor[0] > most || anchor[1] < 0 || anchor[1] > most) {
        refuse(name, "anchor needs two numbers from 0 to " + std::to_string(most) +
                         ", for height and width, and maybe a third one, the points of a tile per dim: " +
                         std::to_string(small) + " or " + std::to_string(small + 2));
    }
    return c;
}

TileAnchor anchor_of(const Numbers& anchor) {
    return {int(anchor[0]), int(anchor[1]), anchor.size() == 3 ? int(anchor[2]) : 6};
}

void winograd_conv(I x, I w, O out, Index groups, const Bias& bias, bool accumulate, const Numbers& anchor,
                   double slope) {
    const Convolution c = winograd_convolution("winograd_conv", x, w, out, groups, anchor);
    const Epilogue epilogue{bias_of("winograd_conv", bias, c.groups * c.filters), accumulate, float(slope)};
    engine().winograd->conv(c, x.data(), w.data(), epilogue, out.data(), anchor_of(anchor));
}

void winograd_dx(I dy, I w, O out, Index groups, const Numbers& anchor) {
    const Convolution c = winograd_convolution("winograd_dx", out, w, dy, groups, anchor);
    engine().winograd->conv_dx(c, dy.data(), w.data(), out.data(), anchor_of(anchor));
}

void winograd_dw(I x, I dy, O out, Index groups, const Numbers& anchor) {
    const Convolution c = winograd_convolution("winograd_dw", x, out, dy, groups, anchor);
    engine().winograd->conv_dw(c, x.data(), dy.data(), out.data(), anchor_of(anchor));
}

// A matrix of which rows or columns are contiguous: the steps between its rows and columns.
template <class A>
std::pair<Index, Index> steps(const A& a, bool transpose) {
    if (a.ndim() != 2) refuse("gemm", "matrices are needed, not an array of shape " + shape_of(a));
    Index row = Index(a.stride(0)), column = Index(a.stride(1));
    if (a.shape(1) <= 1) column = 1;  // whatever NumPy says
    if (a.shape(0) <= 1 && column != 1) row = 1;
    if (a.size() > 0 && row != 1 && column != 1) {
        refuse("gemm", "rows or columns must be contiguous, but the elements of a matrix of shape " + shape_of(a) +
                           " lie " + std::to_string(row) + " and " + std::to_string(column) +
                           " apart; pass numpy.ascontiguousarray(...)");
    }
    return transpose ? std::pair{column, row} : std::pair{row, column};
}

Matrix matrix(I a, std::pair<Index, Index> steps) { return {a.data(), steps.first, steps.second}; }
Bf16Matrix matrix(HalfI a, std::pair<Index, Index> steps) { return {halves(a), steps.first, steps.second}; }

// Calls compute(m, n, k, a, b, bias) for the product of two matrices.
template <class A, class C, class Compute>
void product(const A& a, const A& b, const C& out, bool transpose_a, bool transpose_b, const Bias& bias,
             Compute compute) {
    const auto left = matrix(a, steps(a, transpose_a)), right = matrix(b, steps(b, transpose_b));
    const size_t m = a.shape(transpose_a), k = a.shape(!transpose_a), n = b.shape(!transpose_b);
    if (out.ndim() != 2 || b.shape(transpose_b) != k || out.shape(0) != m || out.shape(1) != n) {
        refuse("gemm", shape_of(a) + (transpose_a ? " transposed" : "") + " times " + shape_of(b) +
                           (transpose_b ? " transposed" : "") + " does not give " + shape_of(out));
    }
    require_rows("gemm", out);
    compute(Index(m), Index(n), Index(k), left, right, bias_of("gemm", bias, Index(n)));
}

void gemm_floats(I a, I b, O out, bool transpose_a, bool transpose_b, const Bias& bias, bool accumulate, double slope) {
    product(a, b, out, transpose_a, transpose_b, bias, [&](Index m, Index n, Index k, Matrix left, Matrix right, auto b) {
        engine().gemm(m, n, k, left, right, {b, accumulate, float(slope)}, out.data(), Index(out.stride(0)));
    });
}

void gemm_bf16(HalfI a, HalfI b, HalfO out, bool transpose_a, bool transpose_b, const Bias& bias, double slope) {
    product(a, b, out, transpose_a, transpose_b, bias, [&](Index m, Index n, Index k, auto left, auto right, auto b) {
        gemm(m, n, k, left, right, {b, false, float(slope)}, halves(out), Index(out.stride(0)));
    });
}

void gemm_bf16_to_floats(HalfI a, HalfI b, O out, bool transpose_a, bool transpose_b, const Bias& bias, double slope) {
    product(a, b, out, transpose_a, transpose_b, bias, [&](Index m, Index n, Index k, auto left, auto right, auto b) {
        gemm(m, n, k, left, right, {b, false, float(slope)}, out.data(), Index(out.stride(0)));
    });
}

// Two vectors of one length, as one row.
template <class A, class B>
Rows vectors(const char* name, const A& a, const B& b) {
    if (a.ndim() != 1 || b.ndim() != 1 || a.shape(0) != b.shape(0))
        refuse(name, "1D arrays of one length are needed, not " + shape_of(a) + " and " + shape_of(b));
    require_rows(name, a), require_rows(name, b);
    return {1, {1, 1, 1}, Index(a.shape(0)), {}, {}};
}

}  // namespace

void define_engine(nb::module_& m) {
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };
    def(m, "conv", conv_floats, arg("x"), arg("w"), arg("out"), arg("stride"), arg("dilation"), arg("groups") = 1,
        arg("bias") = nb::none(), arg("accumulate") = false, arg("exact") = false, arg("slope") = 1.0);
    def(m, "conv_dx", conv_dx_floats, arg("dy"), arg("w"), arg("out"), arg("stride"), arg("dilation"), arg("groups") = 1,
        arg("exact") = false);
    def(m, "conv_dw", conv_dw_floats, arg("x"), arg("dy"), arg("out"), arg("stride"), arg("dilation"), arg("groups") = 1,
        arg("exact") = false);
    const auto anchor = [&] { return arg("anchor") = Numbers{0, 0}; };
    def(m, "winograd_conv", winograd_conv, arg("x"), arg("w"), arg("out"), arg("groups") = 1, arg("bias") = nb::none(),
        arg("accumulate") = false, anchor(), arg("slope") = 1.0);
    def(m, "winograd_dx", winograd_dx, arg("dy"), arg("w"), arg("out"), arg("groups") = 1, anchor());
    def(m, "winograd_dw", winograd_dw, arg("x"), arg("dy"), arg("out"), arg("groups") = 1, anchor());
    def(m, "gemm", gemm_floats, arg("a"), arg("b"), arg("out"), arg("transpose_a") = false, arg("transpose_b") = false,
        arg("bias") = nb::none(), arg("accumulate") = false, arg("slope") = 1.0);
    def(m, "conv", conv_bf16, arg("x"), arg("w"), arg("out"), arg("stride"), arg("dilation"), arg("groups") = 1,
        arg("bias") = nb::none(), arg("exact") = false, arg("slope") = 1.0);
    def(m, "conv_dx", conv_dx_bf16, arg("dy"), arg("w"), arg("out"), arg("stride"), arg("dilation"), arg("groups") = 1,
        arg("exact") = false);
    def(m, "conv_dw", conv_dw_bf16, arg("x"), arg("dy"), arg("out"), arg("stride"), arg("dilation"), arg("groups") = 1,
        arg("exact") = false);
    def(m, "gemm", gemm_bf16, arg("a"), arg("b"), arg("out"), arg("transpose_a") = false, arg("transpose_b") = false,
        arg("bias") = nb::none(), arg("slope") = 1.0);
    def(m, "gemm", gemm_bf16_to_floats, arg("a"), arg("b"), arg("out"), arg("transpose_a") = false,
        arg("transpose_b") = false, arg("bias") = nb::none(), arg("slope") = 1.0);
    def(m, "widen", [](HalfI x, O out) { engine().widen(vectors("widen", x, out), halves(x), out.data()); }, arg("x"),
        arg("out"));
    def(m, "narrow", [](I x, HalfO out) { engine().narrow(vectors("narrow", out, x), x.data(), halves(out)); }, arg("x"),
        arg("out"));
    for (const char* name : {"conv", "conv_dx", "conv_dw", "winograd_conv", "winograd_dx", "winograd_dw", "gemm", "widen", "narrow"}) {
        refuse_others(m, name,
                      "takes float32 NumPy arrays, or bfloat16 ones as uint16 (weight gradients and biases float32), the "
                      "output writeable");
    }
    m.def(
        "use_threads",
        [](int count) {
            if (count < 1) refuse("use_threads", std::to_string(count) + " threads; give 1 or more");
            engine().use_threads(count);
        },
        nb::arg("count"), "Run the engine on so many threads from now on, in the calling thread.");
    m.def("isa", [] { return std::string(engine().isa); }, "The instruction set that the engine uses.");
    m.def("isas", engines, "The instruction sets that the engine can use here, the best first.");
    m.def("select_isa", select_engine, nb::arg("isa"),
          "Use an instruction set from now on; '' is the choice at the start.");
}

}  // namespace hpctrain
