// hpctrain._native, what ranks of a host do in shared memory. Arrays are those
// of the others' windows.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "arrays.h"
#include "bindings.h"
#include "shared.h"

namespace hpctrain {
namespace {

using Flags = nb::ndarray<Flag, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

// Ranks that come together again and again. Each posts how often it has come
// and waits for the others; no rank can be two rounds ahead of another, so that
// one flag per rank is enough.
class Meeting {
  public:
    Meeting(std::vector<Flags> flags, std::size_t me) : flags_(std::move(flags)), me_(me) {
        for (const Flags& flag : flags_)
            if (flag.shape(0) < 1) refuse("Meeting", "a flag of no elements");
        if (me_ >= flags_.size()) refuse("Meeting", "a rank that has no flag");
    }

    void come() {
        post(flags_[me_].data(), ++round_);
        next_ = 0;
    }

    // Whether all have come, waiting for so long.
    bool complete(double microseconds) {
        for (; next_ < flags_.size(); ++next_)
            if (!await(flags_[next_].data(), round_, microseconds)) return false;
        return true;
    }

    // Who has not.
    std::vector<std::size_t> missing() const {
        std::vector<std::size_t> found;
        for (std::size_t rank = 0; rank < flags_.size(); ++rank)
            if (!await(flags_[rank].data(), round_, 0)) found.push_back(rank);
        return found;
    }

  private:
    std::vector<Flags> flags_;
    std::size_t me_;
    Flag round_ = 0;
    std::size_t next_ = 0;  // all before it have come
};

template <class T>
void define_sum(nb::module_& m) {
    def(
        m, "add_up",
        [](const std::vector<Vector<const T>>& from, const Vector<T>& out) {
            std::vector<const T*> sources;
            for (const auto& source : from) {
                if (source.shape(0) != out.shape(0))
                    refuse("add_up",
                           "vectors of one length are needed, not " + shape_of(source) + " and " + shape_of(out));
                sources.push_back(source.data());
            }
            if (sources.empty()) refuse("add_up", "nothing to add");
            add_up<T>(Index(out.shape(0)), sources, out.data());
        },
        nb::arg("from").noconvert(), nb::arg("out").noconvert());
}

// Sums over the ranks of a host, each making its share, in one call where
// nobody has to be waited for.
template <class T>
class SharedSum {
  public:
    SharedSum(std::vector<Vector<const T>> from, Vector<T> out, Meeting& written, Meeting& summed)
        : from_(std::move(from)), out_(std::move(out)), written_(written), summed_(summed) {
        for (const auto& source : from_) {
            if (source.shape(0) != out_.shape(0)) refuse("SharedSum", "shares of different lengths");
            sources_.push_back(source.data());
        }
        if (sources_.empty()) refuse("SharedSum", "nothing to add");
    }

    // Whether all ranks have made their shares, of what all had written, waiting
    // for so long at each of two meetings.
    bool run(double microseconds) {
        if (!added_ && !add(microseconds)) return false;
        if (!came_) summed_.come(), came_ = true;
        if (!summed_.complete(microseconds)) return false;
        added_ = came_ = false;
        return true;
    }

    // Whether this rank's share is made; the others are met later, by `run`.
    bool add(double microseconds) {
        if (added_) return true;
        if (!waiting_) written_.come(), waiting_ = true;
        if (!written_.complete(microseconds)) return false;
        add_up<T>(Index(out_.shape(0)), sources_, out_.data());
        waiting_ = false, added_ = true;
        return true;
    }

  private:
    std::vector<Vector<const T>> from_;
    Vector<T> out_;
    std::vector<const T*> sources_;
    Meeting& written_;
    Meeting& summed_;
    bool waiting_ = false, added_ = false, came_ = false;
};

template <class T>
void define_shared_sum(nb::module_& m, const char* name) {
    nb::class_<SharedSum<T>>(m, name)
        .def(nb::init<std::vector<Vector<const T>>, Vector<T>, Meeting&, Meeting&>(), nb::arg("from").noconvert(),
             nb::arg("out").noconvert(), nb::arg("written"), nb::arg("summed"), nb::keep_alive<1, 4>(),
             nb::keep_alive<1, 5>())
        .def("add", &SharedSum<T>::add, nb::arg("microseconds"), nb::call_guard<nb::gil_scoped_release>())
        .def("run", &SharedSum<T>::run, nb::arg("microseconds"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

void define_shared(nb::module_& m) {
    def(
        m, "post",
        [](const Flags& flag, Flag value) {
            if (flag.shape(0) < 1) refuse("post", "a flag of no elements");
            post(flag.data(), value);
        },
        nb::arg("flag").noconvert(), nb::arg("value"));
    def(
        m, "wait",
        [](const Flags& flag, Flag value, double microseconds) {
            if (flag.shape(0) < 1) refuse("wait", "a flag of no elements");
            return await(flag.data(), value, microseconds);
        },
        nb::arg("flag").noconvert(), nb::arg("value"), nb::arg("microseconds"));
    nb::class_<Meeting>(m, "Meeting")
        .def(nb::init<std::vector<Flags>, std::size_t>(), nb::arg("flags").noconvert(), nb::arg("me"))
        .def("come", &Meeting::come, nb::call_guard<nb::gil_scoped_release>())
        .def("complete", &Meeting::complete, nb::arg("microseconds"), nb::call_guard<nb::gil_scoped_release>())
        .def("missing", &Meeting::missing);
    define_sum<float>(m);
    define_sum<double>(m);
    define_sum<bf16>(m);
    define_shared_sum<float>(m, "SharedSumFloat");
    define_shared_sum<double>(m, "SharedSumDouble");
}

}  // namespace hpctrain
