// hpctrain._native, what the search for a plan computes. Arrays are those of
// hpctrain/planner/tables.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "arrays.h"
#include "bindings.h"
#include "planner.h"

namespace hpctrain {
namespace {

using Classes = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using Numbers = nb::ndarray<const double, nb::device::cpu, nb::c_contig>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu, nb::c_contig>;
using FloatsOut = nb::ndarray<float, nb::device::cpu, nb::c_contig>;

constexpr const char* BOUNDS = "edge_bounds";

std::string text_of(const std::vector<Index>& shape) {
    std::ostringstream text;
    for (size_t d = 0; d < shape.size(); ++d) text << (d ? ", " : "(") << shape[d];
    text << ")";
    return text.str();
}

template <class A>
void require_shape(const char* what, const A& a, const std::vector<Index>& shape) {
    bool same = a.ndim() == shape.size();
    for (size_t d = 0; same && d < shape.size(); ++d) same = Index(a.shape(d)) == shape[d];
    if (!same)
        refuse(BOUNDS, std::string(what) + " has shape " + shape_of(a) + ", but " + text_of(shape) + " is needed");
}

Index classes_of(const char* what, const Classes& of, Index partitions, Index classes) {
    require_shape(what, of, {partitions});
    for (Index i = 0; i < partitions; ++i) {
        if (of.data()[i] < 0 || of.data()[i] >= classes)
            refuse(BOUNDS,
                   std::string(what) + ": a class " + std::to_string(of.data()[i]) + " of " + std::to_string(classes));
    }
    return classes;
}

// The rows of a group of dims, in the order of Rows' fields.
EdgeDims dims_of(const EdgeRanks& ranks, const EdgePrices& prices, const Classes& have, const Classes& want,
                 const std::vector<Numbers>& rows) {
    const bool several = ranks.neighbours > 0, runs = prices.copies && prices.run > 0, summed = ranks.summed;
    struct Field {
        const char* name;
        const double* EdgeDims::* rows;
        bool needed, beside;
    };
    const Field fields[] = {
        {"wanted", &EdgeDims::wanted, true, false},
        {"own", &EdgeDims::own, true, false},
        {"own_same", &EdgeDims::own_same, runs, false},
        {"kept", &EdgeDims::kept, true, false},
        {"owners", &EdgeDims::owners, true, false},
        {"owners_same", &EdgeDims::owners_same, runs, false},
        {"given", &EdgeDims::given, true, false},
        {"wanters", &EdgeDims::wanters, true, false},
        {"wanters_same", &EdgeDims::wanters_same, runs, false},
        {"gives", &EdgeDims::gives, several, true},
        {"gives_same", &EdgeDims::gives_same, several && runs, true},
        {"takes", &EdgeDims::takes, several, true},
        {"takes_same", &EdgeDims::takes_same, several && runs, true},
        {"near_owners", &EdgeDims::near_owners, summed, false},
        {"near_wanters", &EdgeDims::near_wanters, summed, false},
    };
    if (rows.size() != std::size(fields))
        refuse(BOUNDS, "a group of dims has " + std::to_string(rows.size()) + " tables");
    if (rows[1].ndim() != 3) refuse(BOUNDS, "own has shape " + shape_of(rows[1]));
    EdgeDims dims = {};
    dims.have = have.data(), dims.want = want.data();
    dims.have_classes = classes_of("have", have, ranks.have_count, Index(rows[1].shape(0)));
    dims.want_classes = classes_of("want", want, ranks.want_count, Index(rows[1].shape(1)));
    for (size_t f = 0; f < std::size(fields); ++f) {
        if (!fields[f].needed) continue;
        std::vector<Index> shape = {dims.have_classes, dims.want_classes, ranks.ranks};
        if (f == 0) shape.erase(shape.begin());
        if (fields[f].beside) shape.insert(shape.begin(), ranks.neighbours);
        require_shape(fields[f].name, rows[f], shape);
        dims.*fields[f].rows = rows[f].data();
    }
    return dims;
}

}  // namespace

void define_planner(nb::module_& m) {
    const auto arg = [](const char* name) { return nb::arg(name).noconvert(); };
    def(
        m, BOUNDS,
        [](const std::vector<Classes>& have, const std::vector<Classes>& want,
           const std::vector<std::vector<Numbers>>& rows, const Numbers& has, const Numbers& wants,
           const Numbers& has_beside, const Numbers& wants_beside, bool summed, const std::vector<double>& prices,
           bool copies, bool to_wanters, bool to_owners, const FloatsOut& out) {
            if (has.ndim() != 2 || wants.ndim() != 2 || has_beside.ndim() != 3)
                refuse(BOUNDS, "has " + shape_of(has) + ", wants " + shape_of(wants) + ", has_beside " +
                                   shape_of(has_beside) + "; two, two and three dims are needed");
            if (prices.size() != 5) refuse(BOUNDS, "five prices are needed");
            const EdgeRanks ranks = {
                Index(has.shape(0)), Index(wants.shape(0)), Index(has.shape(1)), Index(has_beside.shape(1)), summed,
                has.data(),          wants.data(),          has_beside.data(),   wants_beside.data()};
            if (ranks.ranks < 1 || ranks.ranks > MOST_RANKS)
                refuse(BOUNDS, std::to_string(ranks.ranks) + " ranks; it takes 1 to " + std::to_string(MOST_RANKS));
            require_shape("wants", wants, {ranks.want_count, ranks.ranks});
            require_shape("has_beside", has_beside, {ranks.have_count, ranks.neighbours, ranks.ranks});
            require_shape("wants_beside", wants_beside, {ranks.want_count, ranks.neighbours, ranks.ranks});
            const bool diagonal = out.ndim() == 1;
            if (diagonal && ranks.have_count != ranks.want_count) refuse(BOUNDS, "a diagonal of unequal counts");
            require_shape("out", out,
                          diagonal ? std::vector<Index>{ranks.have_count}
                                   : std::vector<Index>{ranks.have_count, ranks.want_count});
            if (summed && ranks.neighbours != 1) refuse(BOUNDS, "sums over hosts are one neighbour");
            const EdgePrices by = {prices[0], prices[1], prices[2],  prices[3],
                                   prices[4], copies,    to_wanters, to_owners};
            if (have.size() != rows.size() || want.size() != rows.size()) refuse(BOUNDS, "classes of other dims");
            std::vector<EdgeDims> dims;
            for (size_t g = 0; g < rows.size(); ++g) dims.push_back(dims_of(ranks, by, have[g], want[g], rows[g]));
            edge_bounds(ranks, dims, by, diagonal, out.data());
        },
        arg("have"), arg("want"), arg("rows"), arg("has"), arg("wants"), arg("has_beside"), arg("wants_beside"),
        nb::arg("summed"), nb::arg("prices"), nb::arg("copies"), nb::arg("to_wanters"), nb::arg("to_owners"),
        arg("out"));
    def(
        m, "min_plus",
        [](const Floats& a, const Floats& b, const FloatsOut& out) {
            const Index n = Index(a.shape(0)), m = Index(a.shape(1)), k = Index(b.shape(1));
            if (Index(b.shape(0)) != m || out.ndim() != 2 || Index(out.shape(0)) != n || Index(out.shape(1)) != k)
                refuse("min_plus", "arrays (n, m), (m, k) and (n, k) are needed, not " + shape_of(a) + ", " +
                                       shape_of(b) + " and " + shape_of(out));
            min_plus(n, m, k, a.data(), b.data(), out.data());
        },
        arg("a"), arg("b"), arg("out"));
}

}  // namespace hpctrain
