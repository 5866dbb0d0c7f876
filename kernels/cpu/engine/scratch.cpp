#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <vector>

namespace hpctrain {
namespace {

constexpr std::size_t LINE = 64, HUGE_PAGE = std::size_t(2) << 20;

struct Block {
    char* memory;
    std::size_t size;
};

Block allocate(std::size_t size) {
    // Huge pages: the packed weights of a layer would else need more pages than the processor holds translations of.
    const std::size_t unit = size < HUGE_PAGE ? 4096 : HUGE_PAGE;
    size = (size + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, size);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (unit == HUGE_PAGE) madvise(memory, size, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
    return {static_cast<char*>(memory), size};
}

// Blocks are filled one after the other; when all is given back, several become one that would have sufficed.
struct Arena {
    std::vector<Block> blocks;
    std::size_t current = 0, used = 0, depth = 0;

    ~Arena() { clear(); }

    void clear() {
        for (Block& block : blocks) std::free(block.memory);
        blocks.clear();
        current = used = 0;
    }

    void* take(std::size_t count) {
        count = (count + LINE - 1) / LINE * LINE;
        while (current < blocks.size() && used + count > blocks[current].size) ++current, used = 0;
        if (current == blocks.size()) {
            blocks.reserve(current + 1);
            blocks.push_back(allocate(count));
            used = 0;
        }
        void* memory = blocks[current].memory + used;
        used += count;
        return memory;
    }

    void merge() {
        if (blocks.size() < 2) return;
        std::size_t total = 0;
        for (const Block& block : blocks) total += block.size;
        clear();
        try {
            blocks.reserve(1);
            blocks.push_back(allocate(total));
        } catch (const std::bad_alloc&) {  // the next call asks again, and says so
        }
    }
};

Arena& arena() {
    thread_local Arena instance;
    return instance;
}

}  // namespace

Scratch::Scratch() : block_(arena().current), used_(arena().used) { ++arena().depth; }

Scratch::~Scratch() {
    Arena& a = arena();
    a.current = block_;
    a.used = used_;
    if (--a.depth == 0) a.merge();
}

void* Scratch::bytes(std::size_t count) { return arena().take(count); }

}  // namespace hpctrain
