// The Python face of the sampler: checks shapes, dtypes and layout, and releases the GIL while it draws.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "philox.h"
#include "sampler.h"

namespace py = pybind11;

namespace {

// `array_t` with flags 0 and `noconvert` below: the dtype must match, any strides may come, nothing is copied.
template <typename Value>
using Array = py::array_t<Value, 0>;

template <typename Value>
auto per_row(const char* name, const Array<Value>& array, py::ssize_t rows) {
    if (array.ndim() != 1 || array.shape(0) != rows) {
        throw py::value_error(std::string(name) + " must be [rows] with rows = " + std::to_string(rows));
    }
    return array.template unchecked<1>();
}

py::array_t<std::int64_t> draw(const Array<float>& logits, const Array<std::int64_t>& seed,
                               const Array<std::int64_t>& frame, std::uint32_t codebook,
                               const Array<float>& temperature, const Array<std::int32_t>& top_k) {
    if (logits.ndim() != 2) throw py::value_error("logits must be [rows, vocabulary]");
    const py::ssize_t row_count = logits.shape(0), vocabulary = logits.shape(1);
    if (row_count > 0 && vocabulary > 1 && logits.strides(1) != sizeof(float)) {
        throw py::value_error("logits must be contiguous along the vocabulary");
    }
    const auto seeds = per_row("seed", seed, row_count);
    const auto frames = per_row("frame", frame, row_count);
    const auto temperatures = per_row("temperature", temperature, row_count);
    const auto top_ks = per_row("top_k", top_k, row_count);

    std::vector<aloud::Row> rows;
    rows.reserve(row_count);
    const char* first = reinterpret_cast<const char*>(logits.data());
    for (py::ssize_t row = 0; row < row_count; ++row) {
        rows.push_back({reinterpret_cast<const float*>(first + row * logits.strides(0)),
                        static_cast<std::uint64_t>(seeds(row)), static_cast<std::uint64_t>(frames(row)),
                        temperatures(row), top_ks(row)});
    }
    py::array_t<std::int64_t> tokens(row_count);
    std::int64_t* tokens_data = tokens.mutable_data();
    {
        py::gil_scoped_release release;
        aloud::draw(rows, static_cast<std::size_t>(vocabulary), codebook, tokens_data);
    }
    return tokens;
}

std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t> philox(std::uint64_t seed,
                                                                              const aloud::Words& counter) {
    const aloud::Words words = aloud::philox(seed, counter);
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace

PYBIND11_MODULE(_sampler, module) {
    module.doc() = "The token draw of kernels/draw.py in C++, and the random words under it.";
    module.def("draw", &draw, "Draw one token a row: int64 [rows], -1 where a row has none.",
               py::arg("logits").noconvert(), py::arg("seed").noconvert(), py::arg("frame").noconvert(),
               py::arg("codebook"), py::arg("temperature").noconvert(), py::arg("top_k").noconvert());
    module.def("philox", &philox, "The four words of Philox4x32-10 for a 64-bit seed and a counter of four words.",
               py::arg("seed"), py::arg("counter"));
}
