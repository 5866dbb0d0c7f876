// Tests of what ranks of a host do in shared memory, by threads in place of
// ranks, for ctest and the sanitizers.
#include "shared.h"

#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using namespace hpctrain;

int failures = 0;

void expect(bool holds, const char* what) {
    if (!holds && ++failures < 20) std::printf("%s\n", what);
}

template <class T>
void test_sums_are_added_in_order(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (const Index n : {0, 1, 7, 1023, 1025, 300001}) {
        for (const int ranks : {1, 2, 3, 5}) {
            const std::vector<T> zeros(static_cast<size_t>(n));
            std::vector<std::vector<T>> from(static_cast<size_t>(ranks), zeros);
            for (auto& vector : from)
                for (T& value : vector) value = store<T>(Real<T>(normal(random)));
            std::vector<T> want(static_cast<size_t>(n));
            for (size_t i = 0; i < want.size(); ++i) {
                Real<T> sum = load(from[0][i]);
                for (size_t rank = 1; rank < from.size(); ++rank) sum += load(from[rank][i]);
                want[i] = store<T>(sum);
            }
            std::vector<const T*> sources;
            for (const auto& vector : from) sources.push_back(vector.data());
            add_up<T>(n, sources, from[0].data());  // in place
            for (size_t i = 0; i < want.size(); ++i) expect(load(from[0][i]) == load(want[i]), "add_up: other bits");
        }
    }
}

void test_infinity_passes() {
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> a = {infinity, infinity}, b = {1, -infinity};
    add_up<float>(2, {a.data(), b.data()}, a.data());
    expect(a[0] == infinity && a[1] != a[1], "add_up: infinity and NaN");
}

void test_await_gives_up() {
    Flag flag = 3;
    expect(await(&flag, 3, 0) && await(&flag, 2, 0), "await: a value that has come");
    expect(!await(&flag, 4, 0) && !await(&flag, 4, 100), "await: a value that has not");
}

// Many rounds of: every thread writes, all meet, one of them reads what all
// wrote, all meet.
void test_hand_over() {
    constexpr int THREADS = 3, ROUNDS = 2000;
    struct alignas(64) Line {
        Flag written = 0, read = 0;
        int value = 0;
    };
    std::vector<Line> lines(THREADS);
    const auto work = [&](int me) {
        for (int round = 1; round <= ROUNDS; ++round) {
            lines[size_t(me)].value = round * (me + 1);
            post(&lines[size_t(me)].written, round);
            int sum = 0;
            for (Line& line : lines) {
                while (!await(&line.written, round, 1000)) {
                }
                sum += line.value;
            }
            if (sum != round * THREADS * (THREADS + 1) / 2) expect(false, "hand-over: read too early or too late");
            post(&lines[size_t(me)].read, round);
            for (Line& line : lines)
                while (!await(&line.read, round, 1000)) {
                }
        }
    };
    std::vector<std::thread> threads;
    for (int me = 0; me < THREADS; ++me) threads.emplace_back(work, me);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
    std::mt19937 random(1);
    test_sums_are_added_in_order<float>(random);
    test_sums_are_added_in_order<double>(random);
    test_sums_are_added_in_order<bf16>(random);
    test_infinity_passes();
    test_await_gives_up();
    test_hand_over();
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
