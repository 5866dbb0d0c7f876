// What the kernels require of arrays that come from Python, checked before they run; and layouts made of them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"
#include "storage.h"

namespace nb = nanobind;

// NumPy has no bf16: such arrays come as uint16.
template <>
struct nanobind::detail::dtype_traits<hpctrain::bf16> {
    static constexpr dlpack::dtype value{uint8_t(dlpack::dtype_code::UInt), 16, 1};
    static constexpr auto name = const_name("uint16");
};

namespace hpctrain {

template <class T>
using In = nb::ndarray<const T, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::device::cpu>;

template <class A>
std::string shape_of(const A& a) {
    std::ostringstream text;
    text << "(";
    for (size_t d = 0; d < a.ndim(); ++d) text << (d ? ", " : "") << a.shape(d);
    text << ")";
    return text.str();
}

[[noreturn]] inline void refuse(const char* name, const std::string& what) {
    throw std::invalid_argument(std::string("hpctrain._native.") + name + ": " + what);
}

// Of a fused activation: its derivative is told by the sign of its output.
inline void require_slope(const char* name, double slope) {
    if (!(slope >= 0)) refuse(name, "slope " + std::to_string(slope) + "; a fused activation's is 0 or more");
}

inline void require_dims(const char* name, size_t ndim, size_t least) {
    if (ndim < least || ndim >= size_t(MAX_DIMS)) {
        refuse(name, "an array of " + std::to_string(ndim) + " dims; it takes " + std::to_string(least) + " to " +
                         std::to_string(MAX_DIMS - 1));
    }
}

// The layout of dims [begin, end) of arrays of one shape.
template <class First, class... Rest>
Layout<1 + sizeof...(Rest)> layout_of(const char* name, size_t begin, size_t end, const First& a, const Rest&... rest) {
    const auto same = [&](const auto& b) {
        bool equal = a.ndim() == b.ndim();
        for (size_t d = 0; equal && d < a.ndim(); ++d) equal = a.shape(d) == b.shape(d);
        if (!equal) refuse(name, "arrays of one shape are needed, not " + shape_of(a) + " and " + shape_of(b));
    };
    (same(rest), ...);
    Layout<1 + sizeof...(Rest)> layout;
    for (size_t d = begin; d < end; ++d)
        layout.append(Index(a.shape(d)), {Index(a.stride(d)), Index(rest.stride(d))...});
    return layout;
}

template <class... A>
Layout<sizeof...(A)> elements(const char* name, const A&... arrays) {
    size_t ndim = 0;
    ((ndim = arrays.ndim()), ...);
    require_dims(name, ndim, 0);
    auto layout = layout_of(name, 0, ndim, arrays...);
    layout.end_in_runs();
    return layout;
}

template <class A>
void require_rows(const char* name, const A& a) {
    const size_t last = a.ndim() - 1;
    if (a.size() > 0 && a.shape(last) > 1 && a.stride(last) != 1) {  // without elements NumPy says any stride
        refuse(name, "channels must be contiguous, but those of an array of shape " + shape_of(a) + " lie " +
                         std::to_string(a.stride(last)) + " elements apart; pass numpy.ascontiguousarray(...)");
    }
}

// The positions of channels-last arrays, from dim `begin` on.
template <class... A>
Layout<sizeof...(A)> positions(const char* name, size_t begin, const A&... arrays) {
    size_t ndim = 0;
    ((ndim = arrays.ndim()), ...);
    (require_dims(name, arrays.ndim(), begin + 1), ...);
    (require_rows(name, arrays), ...);
    auto layout = layout_of(name, begin, ndim - 1, arrays...);
    layout.end_in_rows();
    return layout;
}

// Vectors with one contiguous element per channel; the number of channels.
template <class A, class... Vectors>
Index channels(const char* name, const A& a, const Vectors&... vectors) {
    const size_t count = a.shape(a.ndim() - 1);
    const auto check = [&](const auto& v) {
        if (v.ndim() != 1 || v.shape(0) != count || (count > 1 && v.stride(0) != 1)) {
            refuse(name, "a contiguous vector of " + std::to_string(count) +
                             " channels is needed, not an array of shape " + shape_of(v));
        }
    };
    (check(vectors), ...);
    return Index(count);
}

// (N, C) beside an array (N, ..., C)
template <class A, class B>
void require_samples(const char* name, const A& whole, const B& reduced) {
    if (whole.ndim() < 2 || reduced.ndim() != 2 || reduced.shape(0) != whole.shape(0) ||
        reduced.shape(1) != whole.shape(whole.ndim() - 1)) {
        refuse(name, "(N, C) beside (N, ..., C) is needed, not " + shape_of(reduced) + " beside " + shape_of(whole));
    }
    require_rows(name, reduced);
}

// The layout of one sample's outputs of (N, *outputs, C) of windows over x (N, *inputs, C), and the offsets of a
// window's elements; whether windows share no element, and whether they leave none out either.
struct Windows {
    Layout<3> outputs;
    std::vector<Index> taps;
    bool disjoint = true, cover = true;
};

template <class X, class Y, class I>
Windows windows(const char* name, const X& x, const Y& y, const I& index, const std::vector<Index>& kernel,
                const std::vector<Index>& stride, const std::vector<Index>& dilation) {
    const size_t dims = kernel.size();
    require_dims(name, x.ndim(), 3);
    require_rows(name, x), require_rows(name, y), require_rows(name, index);
    layout_of(name, 0, 0, y, index);
    if (x.ndim() != dims + 2 || y.ndim() != x.ndim() || stride.size() != dims || dilation.size() != dims) {
        refuse(name, "kernel, stride and dilation need one number per position dim of " + shape_of(x) + " and " +
                         shape_of(y));
    }
    Windows found;
    found.taps = {0};
    bool fits = x.shape(0) == y.shape(0) && x.shape(dims + 1) == y.shape(dims + 1);
    for (size_t d = 0; d < dims; ++d) {
        if (kernel[d] < 1 || stride[d] < 1 || dilation[d] < 1) refuse(name, "kernel, stride and dilation start at 1");
        const Index room = Index(x.shape(d + 1)) - dilation[d] * (kernel[d] - 1) - 1, step = Index(x.stride(d + 1));
        found.disjoint = found.disjoint && dilation[d] == 1 && stride[d] >= kernel[d];
        found.cover = found.cover && stride[d] == kernel[d] && x.shape(d + 1) == y.shape(d + 1) * size_t(stride[d]);
        fits = fits && Index(y.shape(d + 1)) == (room < 0 ? 0 : room / stride[d] + 1);
        found.outputs.append(Index(y.shape(d + 1)),
                             {step * stride[d], Index(y.stride(d + 1)), Index(index.stride(d + 1))});
        std::vector<Index> taps;
        for (Index before : found.taps) {
            for (Index t = 0; t < kernel[d]; ++t) taps.push_back(before + t * dilation[d] * step);
        }
        found.taps.swap(taps);
    }
    if (!fits) refuse(name, "windows over " + shape_of(x) + " do not give outputs " + shape_of(y));
    found.outputs.end_in_rows();
    return found;
}

}  // namespace hpctrain
