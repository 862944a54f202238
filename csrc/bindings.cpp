// pelton.backends.cpu._native: the only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/executor.h"
#include "cpu/features.h"
#include "cpu/numa.h"
#include "cpu/ops/attention/contract.h"
#include "cpu/ops/linear/contract.h"
#include "cpu/peaks.h"
#include "cpu/registry.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace pelton::cpu {
namespace {

using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<nb::numpy, const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using CacheBytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using Dims = std::tuple<int64_t, int64_t, int64_t>;

// The executor and what must live as long as it. Steps run without the GIL and hold their own reference,
// so that close() in another thread takes nothing away from them.
struct State {
    State(const std::string& isa, int threads, int64_t arena_bytes) : executor(isa, threads, arena_bytes) {}

    std::vector<Bytes> constants;  // destroyed after the executor
    Executor executor;
};

class PyExecutor {
public:
    PyExecutor(const std::string& isa, int threads, int64_t arena_bytes)
        : state_(std::make_shared<State>(isa, threads, arena_bytes)) {}

    int add_constant(Bytes data) {
        State& state = *get();
        if (reinterpret_cast<uintptr_t>(data.data()) % 4) {
            throw std::invalid_argument("a constant must start at a multiple of 4 bytes");
        }
        int index;
        {
            nb::gil_scoped_release release;  // it may read the whole of it
            index = state.executor.add_constant(reinterpret_cast<const char*>(data.data()),
                                                static_cast<int64_t>(data.size()));
        }
        state.constants.push_back(std::move(data));
        return index;
    }

    int add_cache(int64_t bytes) { return get()->executor.add_cache(bytes); }

    void add_call(const std::string& kernel, const std::vector<std::tuple<std::string, int64_t, int64_t>>& operands,
                  const std::vector<int64_t>& ints, const std::vector<double>& floats) {
        std::vector<OperandRef> refs;
        for (const auto& [space, index, offset] : operands) refs.push_back({space, index, offset});
        get()->executor.add_call(kernel, refs, ints, floats);
    }

    double run(const Dims& dims, const std::vector<Indices>& inputs) { return run_step(dims, inputs, nullptr); }

    double run_calls(const Dims& dims, const std::vector<Indices>& inputs, int64_t first, int64_t last) {
        return with_step(dims, inputs, [&](Executor& executor, const int64_t* sizes, const auto& arrays) {
            return executor.run_calls(sizes, arrays, first, last);
        });
    }

    std::vector<double> run_profiled(const Dims& dims, const std::vector<Indices>& inputs) {
        std::vector<double> seconds;
        run_step(dims, inputs, &seconds);
        return seconds;
    }

    // A view; the arena lives as long as the last view of it.
    Rows arena(int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
        std::shared_ptr<Mapping> arena = get()->executor.arena();
        const bool sane = offset >= 0 && offset % 4 == 0 && rows >= 0 && cols >= 0 && ld >= cols &&
                          offset <= arena->size() && cols <= arena->size() && ld <= arena->size() &&
                          (rows == 0 || rows - 1 <= arena->size() / (4 * std::max<int64_t>(ld, 1)));
        if (!sane || (rows > 0 && offset + ((rows - 1) * ld + cols) * 4 > arena->size())) {
            throw std::invalid_argument("the view leaves the arena of " + std::to_string(arena->size()) + " bytes");
        }
        nb::capsule owner = keep(arena);
        const size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(cols)};
        const int64_t strides[2] = {ld, 1};
        return Rows(reinterpret_cast<float*>(arena->data() + offset), 2, shape, owner, strides);
    }

    // A view, as above; nobody may write to it while a step runs.
    CacheBytes cache(int64_t index) {
        std::shared_ptr<Mapping> cache = get()->executor.cache(index);
        const size_t shape[1] = {static_cast<size_t>(cache->size())};
        return CacheBytes(reinterpret_cast<uint8_t*>(cache->data()), 1, shape, keep(cache));
    }

    void close() { state_.reset(); }

private:
    static nb::capsule keep(const std::shared_ptr<Mapping>& mapping) {
        return nb::capsule(new std::shared_ptr<Mapping>(mapping),
                           [](void* p) noexcept { delete static_cast<std::shared_ptr<Mapping>*>(p); });
    }

    const std::shared_ptr<State>& get() {
        if (!state_) throw std::runtime_error("the executor is closed");
        return state_;
    }

    double run_step(const Dims& dims, const std::vector<Indices>& inputs, std::vector<double>* per_call) {
        return with_step(dims, inputs, [&](Executor& executor, const int64_t* sizes, const auto& arrays) {
            return executor.run(sizes, arrays, per_call);
        });
    }

    template <typename Run>
    double with_step(const Dims& dims, const std::vector<Indices>& inputs, const Run& run) {
        const std::shared_ptr<State> state = get();  // let go after the GIL is back
        const int64_t sizes[3] = {std::get<0>(dims), std::get<1>(dims), std::get<2>(dims)};
        std::vector<StepInput> arrays;
        arrays.reserve(inputs.size());
        for (const Indices& input : inputs) arrays.push_back({input.data(), static_cast<int64_t>(input.size())});
        nb::gil_scoped_release release;
        return run(state->executor, sizes, arrays);
    }

    std::shared_ptr<State> state_;
};

nb::dict cpu_features() {
    const Features features = detect_features();
    nb::dict flags, result;
    for (const auto& [name, present] : features.flags) flags[name.c_str()] = present;
    result["vendor"] = features.vendor;
    result["model_name"] = features.model;
    result["flags"] = flags;
    result["l1_bytes"] = features.l1_bytes;
    result["l2_bytes"] = features.l2_bytes;
    result["l3_bytes"] = features.l3_bytes;
    return result;
}

nb::dict memory_nodes() {
    nb::dict result;
    for (const NumaNode& node : numa_nodes()) result[nb::int_(node.id)] = node.cpus;
    return result;
}

nb::dict kernels(const std::string& isa) {
    nb::dict result;
    for (const std::string& name : kernel_names()) {
        std::string tier;
        if (find_kernel(isa, name, &tier)) result[name.c_str()] = tier;
    }
    return result;
}

nb::dict peaks(const std::string& isa, int threads, double seconds, const std::vector<std::string>& names) {
    std::vector<std::pair<std::string, double>> values;
    {
        nb::gil_scoped_release release;
        values = measure_peaks(isa, threads, seconds, names);
    }
    nb::dict result;
    for (const auto& [name, value] : values) result[name.c_str()] = value;
    return result;
}

int64_t cache_bytes(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_blocks, int64_t format) {
    const char* error = check_cache(kv_heads, head_dim, block_size, num_blocks, format);
    if (error) throw std::invalid_argument(error);
    const int64_t bytes = cache_size(kv_heads, head_dim, block_size, num_blocks, format);
    if (bytes == INT64_MAX) throw std::invalid_argument("a cache of that size has no address");
    return bytes;
}

}  // namespace
}  // namespace pelton::cpu

NB_MODULE(_native, m) {
    using namespace pelton::cpu;
    m.doc() = "Native CPU kernels and the executor that runs them.";
    m.def("supported_isas", &supported_isas, "ISA tiers this machine can run, best last.");
    m.def("memory_nodes", &memory_nodes, "The CPUs of each NUMA node that this process may use, by node id.");
    m.def("cpu_features", &cpu_features, "Vendor, model, flags and cache sizes of the processor.");
    m.def("kernels", &kernels, "isa"_a, "Kernel name -> tier of the implementation that this tier uses.");
    m.def(
        "has_int8_products",
        [](const std::string& isa) { return (find_kernel(isa, "linear")->traits & linear::kInt8Dot) != 0; }, "isa"_a,
        "Whether the tier multiplies quantized weights with int8 activations.");
    m.def("measure_peaks", &peaks, "isa"_a, "threads"_a, "seconds"_a = 0.2, "names"_a = std::vector<std::string>(),
          "Bytes/s of reads from DRAM and each cache, operations/s per precision; the best of several tries.");
    m.def("cache_bytes", &cache_bytes, "kv_heads"_a, "head_dim"_a, "block_size"_a, "num_blocks"_a, "format"_a,
          "Size of the KV cache of one layer; format 0 is f32, 1 is bf16, 2 is int8.");
    nb::class_<PyExecutor>(m, "Executor", "A flat list of kernel calls and the threads that walk it.")
        .def(nb::init<const std::string&, int, int64_t>(), "isa"_a, "threads"_a, "arena_bytes"_a)
        .def("add_constant", &PyExecutor::add_constant, "data"_a.noconvert(),
             "Keeps a reference, does not copy: uint8, contiguous, at a multiple of 4 bytes.")
        .def("add_cache", &PyExecutor::add_cache, "num_bytes"_a, "Zeroed memory that costs nothing until touched.")
        .def("add_call", &PyExecutor::add_call, "kernel"_a, "operands"_a, "ints"_a, "floats"_a,
             "Operands are (space, index, byte_offset); ValueError with the contract's text if they do not fit.")
        .def("run", &PyExecutor::run, "dims"_a, "inputs"_a.noconvert(),
             "Runs one step with dims (T, S, N); returns seconds.")
        .def("run_profiled", &PyExecutor::run_profiled, "dims"_a, "inputs"_a.noconvert(),
             "Like run, with a barrier after each stage; returns seconds per call.")
        .def("run_calls", &PyExecutor::run_calls, "dims"_a, "inputs"_a.noconvert(), "first"_a, "last"_a,
             "Like run for the calls [first, last) alone, on what earlier runs left in the arena.")
        .def("cache", &PyExecutor::cache, "index"_a, "The bytes of a KV cache, a writable view. Not while a step runs.")
        .def("arena", &PyExecutor::arena, "offset"_a, "rows"_a, "cols"_a, "ld"_a, "A float32 view of the arena.")
        .def("close", &PyExecutor::close,
             "Ends the threads and releases the memory, after the step that runs if one does. Idempotent.");
}
