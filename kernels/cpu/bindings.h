// How the functions of hpctrain._native are bound.
#pragma once

#include <nanobind/nanobind.h>

namespace hpctrain {

// Other Python threads run meanwhile. Arguments should say noconvert(): none is copied unseen.
template <class F, class... Arguments>
void def(nanobind::module_& m, const char* name, F function, Arguments... arguments) {
    m.def(name, function, arguments..., nanobind::call_guard<nanobind::gil_scoped_release>());
}

// An overload tried last: says what was wrong with the arguments, which nanobind's own message does not.
void refuse_others(nanobind::module_& m, const char* name, const char* takes);

// What arrays of activations may be.
constexpr const char* TAKES =
    "takes NumPy arrays of one type, float32, float64 or, as uint16, bf16 (statistics always float64, indices int32, "
    "vectors beside bf16 float32), outputs writeable";

void define_normalization(nanobind::module_& m);
void define_engine(nanobind::module_& m);
void define_losses(nanobind::module_& m);
void define_planner(nanobind::module_& m);
void define_positions(nanobind::module_& m);
void define_shared(nanobind::module_& m);
void define_statistics(nanobind::module_& m);

}  // namespace hpctrain
