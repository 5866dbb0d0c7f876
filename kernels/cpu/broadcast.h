// Arrays that broadcast against another.
#pragma once

#include "arrays.h"

namespace hpctrain {

using Strides = std::array<Index, MAX_DIMS>;

// How far element i + 1 of `a`, which broadcasts against x, lies behind element i, for each dim of x: 0 where it has
// one for all.
template <class X, class A>
Strides broadcast(const char* name, const X& x, const A& a) {
    Strides found{};
    bool fits = a.ndim() <= x.ndim();
    for (size_t d = 0; fits && d < a.ndim(); ++d) {
        const size_t at = x.ndim() - a.ndim() + d;
        fits = a.shape(d) == x.shape(at) || a.shape(d) == 1;
        found[at] = a.shape(d) == 1 ? 0 : Index(a.stride(d));
    }
    if (!fits) refuse(name, "an array of shape " + shape_of(a) + " does not broadcast against " + shape_of(x));
    return found;
}

}  // namespace hpctrain
