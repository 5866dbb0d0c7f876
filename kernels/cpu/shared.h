// What ranks of one host do through memory that they share: hand over, and add
// up what lies there.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"
#include "storage.h"

namespace hpctrain {

// A counter that one rank writes and others read, in a cache line of its own.
using Flag = std::int64_t;

// Everything written before is seen by whoever sees `value`.
void post(Flag* flag, Flag value);

// Whether `flag` has come to `value`, once it has or so many microseconds have
// passed. Spins for a moment, then gives the core to others: there may be more
// ranks than cores.
bool await(const Flag* flag, Flag value, double microseconds);

// out[i] = ((from[0][i] + from[1][i]) + from[2][i]) + ...; `out` may be one of
// these. bf16 is added up in float and rounded once.
template <class T>
void add_up(Index n, const std::vector<const T*>& from, T* out);

}  // namespace hpctrain
