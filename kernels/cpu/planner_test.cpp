// Tests of what the search for a plan computes, for ctest and the sanitizers.
#include "planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

namespace {

using namespace hpctrain;

int failures = 0;

void expect(bool holds, const char* what) {
    if (!holds && ++failures < 20) std::printf("%s\n", what);
}

void test_min_plus(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (const Index n : {1, 3, 65}) {
        for (const Index m : {0, 1, 5, 130, 257}) {
            for (const Index k : {1, 33, 515}) {
                std::vector<float> a(size_t(n * m)), b(size_t(m * k)), got(size_t(n * k));
                for (float& x : a) x = normal(random);
                for (float& x : b) x = normal(random);
                if (!a.empty()) a[0] = std::numeric_limits<float>::infinity();
                min_plus(n, m, k, a.data(), b.data(), got.data());
                for (Index i = 0; i < n; ++i) {
                    for (Index c = 0; c < k; ++c) {
                        float want = std::numeric_limits<float>::infinity();
                        for (Index j = 0; j < m; ++j) want = std::min(want, a[i * m + j] + b[j * k + c]);
                        expect(got[i * k + c] == want, "min_plus: another least sum");
                    }
                }
            }
        }
    }
}

// Two ranks own halves [0, 5) and [5, 10) of a line, along one axis; each wants its half and two elements more.
struct Halves {
    const std::int32_t one[1] = {0};
    const double wanted[2] = {7, 7}, own[2] = {5, 5}, none[2] = {0, 0}, kept[2] = {5, 5}, both[2] = {2, 2};
    const double given[2] = {7, 7}, two[2] = {2, 2}, present[2] = {1, 1};
    // What each rank of a host gives and takes: the first, then the second.
    const double gives[4] = {5, 2, 2, 5}, takes[4] = {5, 2, 2, 5}, nobody[4] = {0, 0, 0, 0};
    double beside[4] = {0, 1, 1, 0};
    std::vector<EdgeDims> dims{{one, one, 1, 1, wanted, own, none, kept, both, none, given, both, none, gives, nobody,
                                takes, nobody, two, two}};

    float price(Index neighbours, const EdgePrices& prices) const {
        const EdgeRanks ranks = {1, 1, 2, neighbours, false, present, present, beside, beside};
        float found = 0, diagonal = 0;
        edge_bounds(ranks, dims, prices, false, &found);
        edge_bounds(ranks, dims, prices, true, &diagonal);
        expect(found == diagonal, "edge_bounds: another price on the diagonal");
        return found;
    }
};

bool near(float a, double b) { return std::abs(double(a) - b) < 1e-6; }

void test_a_halo_is_priced_by_hand() {
    const Halves halves;
    const EdgePrices copies = {0.5, 0.25, 0.125, 8, 4, true, true, true};
    EdgePrices messages = copies;
    messages.copies = false;
    // once, two elements, one run; both ways
    expect(near(halves.price(0, copies), 2 * (0.5 + 2 * 0.25 + 0.125)), "edge_bounds: copies on one host");
    expect(near(halves.price(2, copies), 2 * (0.5 + 2 * 0.25 + 0.125)), "edge_bounds: neighbours that copy");
    expect(near(halves.price(0, messages), 2 * (0.5 + 2 * 0.25)), "edge_bounds: messages on one host");
    EdgePrices forward = messages;
    forward.to_owners = false;
    expect(near(halves.price(0, forward), 0.5 + 2 * 0.25), "edge_bounds: one way");
    Halves apart;
    std::fill_n(apart.beside, 4, 0.0);
    expect(near(apart.price(2, copies), 2 * (8 + 2 * 4)), "edge_bounds: between hosts");
}

}  // namespace

int main() {
    std::mt19937 random(5);
    test_min_plus(random);
    test_a_halo_is_priced_by_hand();
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
