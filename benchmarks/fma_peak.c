// How many floating-point operations a core does per second at most: fused multiply-adds on registers alone.
// Compiled by common.py for the machine that it runs on.
#define _POSIX_C_SOURCE 200809L
#include <time.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float Vector __attribute__((vector_size(BYTES)));

// Enough sums side by side to cover the latency of an addition on two units.
enum { SUMS = 12, LANES = BYTES / (int)sizeof(float) };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Operations per second of the calling thread; `keep` gets a number that depends on all of them.
double fma_peak(long iterations, float* keep) {
    Vector sum[SUMS], a, b;
    for (int i = 0; i < LANES; ++i) a[i] = 0.5f, b[i] = 1.0f;
    for (int s = 0; s < SUMS; ++s) sum[s] = b * (float)s;
    const double begin = now();
    for (long n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
        for (int s = 0; s < SUMS; ++s) sum[s] = sum[s] * a + b;
    }
    const double seconds = now() - begin;
    Vector all = sum[0];
    for (int s = 1; s < SUMS; ++s) all += sum[s];
    *keep = all[0];
    return 2.0 * SUMS * LANES * (double)iterations / seconds;
}
