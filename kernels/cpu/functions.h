// Elementary functions, in double unless it says float, to a few units in the last place. Not those of the C library: these are the same
// operations on every machine, and free of branches and calls, so that loops over them become vector instructions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define HPCTRAIN_INLINE inline __attribute__((always_inline))
#else
#define HPCTRAIN_INLINE inline
#endif

namespace hpctrain {

// first + c[0] x + c[1] x^2 + ...
template <size_t N>
HPCTRAIN_INLINE double polynomial(double first, const double (&c)[N], double x) {
    double sum = 0;
#pragma GCC unroll 32
    for (size_t i = N; i > 0; --i) sum = (sum + c[i - 1]) * x;
    return first + sum;
}

// exp(x) = scale * (1 + rest), for x <= 0.
struct Exponential {
    double scale, rest;
};

// The Taylor series of exp(y) - 1 where |y| <= ln(2) / 2, and a power of two. Below -708, close to the smallest normal
// number, the result is 0.
HPCTRAIN_INLINE Exponential exponential(double x) {
    constexpr double LOWEST = -708, INTEGER = 0x1.8p52;  // added to a number, it leaves its integer in the last bits
    constexpr double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33;
    constexpr double TAYLOR[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                 1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    const double near = x < LOWEST ? LOWEST : x;
    const double shifted = near * 1.4426950408889634 + INTEGER;  // near / ln(2)
    const double k = shifted - INTEGER;
    const double y = (near - k * LN2_HIGH) - k * LN2_LOW;
    std::uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;  // k in the exponent
    double scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return {x < LOWEST ? 0 : scale, y * polynomial(1, TAYLOR, y)};
}

// exp(x) for x <= 0.
HPCTRAIN_INLINE double exp_negative(double x) {
    const Exponential e = exponential(x);
    return e.scale + e.scale * e.rest;
}

// exp(x) - 1 for x <= 0.
HPCTRAIN_INLINE double expm1_negative(double x) {
    const Exponential e = exponential(x);
    return e.scale * e.rest + (e.scale - 1);
}

// log(1 + x) for 0 <= x <= 1: twice the series of artanh(x / (2 + x)).
HPCTRAIN_INLINE double log1p_unit(double x) {
    constexpr double ARTANH[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17,
                                 1.0 / 19, 1.0 / 21, 1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33};
    const double s = x / (2 + x);
    return 2 * s * polynomial(1, ARTANH, s * s);
}

// The same to a few units in the last place of a float. Below -87, close to the smallest normal number, it is 0.
HPCTRAIN_INLINE float exp_negative(float x) {
    constexpr float LOWEST = -87, INTEGER = 0x1.8p23f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
    const float near = x < LOWEST ? LOWEST : x;
    const float shifted = near * 1.44269504f + INTEGER;
    const float k = shifted - INTEGER;
    const float y = (near - k * LN2_HIGH) - k * LN2_LOW;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    scale = x < LOWEST ? 0 : scale;
    float rest = 1.0f / 5040;
    rest = rest * y + 1.0f / 720;
    rest = rest * y + 1.0f / 120;
    rest = rest * y + 1.0f / 24;
    rest = rest * y + 1.0f / 6;
    rest = rest * y + 1.0f / 2;
    rest = rest * y + 1;
    return scale + scale * (rest * y);
}

// log(1 + x) for 0 <= x <= 1, in float.
HPCTRAIN_INLINE float log1p_unit(float x) {
    const float s = x / (2 + x), square = s * s;
    float sum = 1.0f / 15;
    sum = sum * square + 1.0f / 13;
    sum = sum * square + 1.0f / 11;
    sum = sum * square + 1.0f / 9;
    sum = sum * square + 1.0f / 7;
    sum = sum * square + 1.0f / 5;
    sum = sum * square + 1.0f / 3;
    return 2 * s + 2 * s * (sum * square);
}

// log(x) for 1 <= x < infinity, NaN of what is not finite: of the exponent, and of a mantissa between sqrt(1/2) and
// sqrt(2).
HPCTRAIN_INLINE double log_positive(double x) {
    constexpr double ARTANH[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11, 1.0 / 13,
                                 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23, 1.0 / 25};
    constexpr double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33;
    std::uint64_t bits, one;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint64_t exponent = (bits >> 52) | 0x4330000000000000;  // the number 2^52 + exponent
    one = (bits & 0x000fffffffffffff) | 0x3ff0000000000000;
    double m, k;
    std::memcpy(&m, &one, sizeof m);
    std::memcpy(&k, &exponent, sizeof k);
    const bool large = m > 1.4142135623730951;
    m = large ? m / 2 : m;
    k = k - (0x1p52 + 1023) + (large ? 1 : 0);
    const double s = (m - 1) / (m + 1);
    return (k * LN2_HIGH + (k * LN2_LOW + 2 * s * polynomial(1, ARTANH, s * s))) + (x - x);
}

// exp(x^2) erfc(x) for 0 <= x < infinity: a polynomial in (x - 3) / (x + 3), divided by 1 + 2x, after Shepherd &
// Laframboise 1981. Coefficients: Chebyshev interpolation in 50 digits, written out in powers.
HPCTRAIN_INLINE double scaled_erfc(double x) {
    constexpr double FIRST = 1.2530080582697296;
    constexpr double REST[] = {
        -0.1356211061245812,     -0.0475622943534492,     0.12964515870276475,    -0.11927366341538638,
        0.06830802734384515,     -0.02377051491717134,    0.0025293918180474668,  0.0018886903449991718,
        -0.0007798322884823084,  -0.00010515971958448065, 0.0001250994355712812,  4.949196649968345e-06,
        -2.0100843094844725e-05, -7.308281468783614e-07,  3.473024167841533e-06,  3.5576086684080595e-07,
        -6.175617678992323e-07,  -1.4047654315428462e-07, 1.0277997488271058e-07, 4.1064013667940355e-08,
        -1.3906145791730994e-08, -8.217595058711455e-09,  1.2019719440135793e-09, 8.393734858690877e-10,
        -3.451497487664328e-11};
    return polynomial(FIRST, REST, (x - 3) / (x + 3)) / (1 + 2 * x);
}

}  // namespace hpctrain
