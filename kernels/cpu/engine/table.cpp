// The functions of one instruction set.
#include "isa.h"
#include "threads.h"
#include "winograd.h"

#define HPCTRAIN_TEXT(name) #name
#define HPCTRAIN_NAME(name) HPCTRAIN_TEXT(name)

namespace hpctrain::HPCTRAIN_ISA {

const Engine ENGINE = {
    HPCTRAIN_NAME(HPCTRAIN_ISA), &WINOGRAD, packed_size, pack, packed_dx_size, pack_dx, conv, conv_dx, conv_dw, gemm,
    widen, narrow, add, use_threads,
};

}  // namespace hpctrain::HPCTRAIN_ISA
