// Memory for the time of one call: each thread keeps what it once needed, so that later calls allocate nothing.
#pragma once

#include <cstddef>

namespace hpctrain {

// What is taken stays valid until the Scratch that it was taken from ends. Nested ones stack. Belongs to one thread,
// but what is taken may be used by others.
class Scratch {
public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Uninitialised, at a multiple of 64 bytes. Throws std::bad_alloc: take it before threads part.
    void* bytes(std::size_t count);

    template <class T>
    T* array(std::ptrdiff_t count) {
        return static_cast<T*>(bytes(std::size_t(count) * sizeof(T)));
    }

private:
    std::size_t block_, used_;
};

}  // namespace hpctrain
