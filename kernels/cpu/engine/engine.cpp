// Chooses the engine of an instruction set at run time.
#include "engine.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa.h"

namespace hpctrain {
namespace {

std::atomic<const Engine*> selected{nullptr};

// The best first.
std::vector<const Engine*> supported() {
    std::vector<const Engine*> found;
#ifdef HPCTRAIN_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")) {
        static const Engine with_pairs = [] {
            Engine e = avx512::ENGINE;
            e.isa = "avx512_bf16", e.pairs = &avx512_bf16::PAIRS;
            return e;
        }();
        found.push_back(&with_pairs);
    }
#endif
#ifdef HPCTRAIN_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
        found.push_back(&avx512::ENGINE);
#endif
#ifdef HPCTRAIN_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::ENGINE);
#endif
    found.push_back(&portable::ENGINE);
    return found;
}

const Engine* find(const std::string& isa, const std::string& origin) {
    std::string names;
    for (const Engine* one : supported()) {
        if (isa.empty() || isa == one->isa) return one;
        names += (names.empty() ? "" : ", ") + std::string(one->isa);
    }
    throw std::invalid_argument(
        origin + " '" + isa + "' is no instruction set that this machine and build have; choose " + "one of " + names);
}

const Engine* of_environment() {
    const char* isa = std::getenv("HPCTRAIN_ISA");
    return find(isa ? isa : "", "HPCTRAIN_ISA");
}

}  // namespace

const Engine& engine() {
    const Engine* found = selected.load(std::memory_order_acquire);
    if (!found) selected.store(found = of_environment(), std::memory_order_release);
    return *found;
}

void select_engine(const std::string& isa) { selected.store(isa.empty() ? of_environment() : find(isa, "select_isa")); }

std::vector<std::string> engines() {
    std::vector<std::string> names;
    for (const Engine* one : supported()) names.emplace_back(one->isa);
    return names;
}

}  // namespace hpctrain
