// The functions of one instruction set.
#include "isa.h"
#include "threads.h"
#include "winograd.h"

#define HPCTRAIN_TEXT(name) #name
#define HPCTRAIN_NAME(name) HPCTRAIN_TEXT(name)

namespace hpctrain::HPCTRAIN_ISA {

constexpr Products PRODUCTS = {packed_size, pack, packed_dx_size, pack_dx, conv, conv_dx, conv_dw, gemm};

#ifdef HPCTRAIN_PAIRS
const Pairs PAIRS = {PRODUCTS, pair, pad};
#else
const Engine ENGINE = {
    PRODUCTS, HPCTRAIN_NAME(HPCTRAIN_ISA), &WINOGRAD, nullptr, widen, narrow, add, use_threads,
};
#endif

}  // namespace hpctrain::HPCTRAIN_ISA
