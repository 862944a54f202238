// pelton.backends.cpu._native: the only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
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
#include "cpu/sampling.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace pelton::cpu {
namespace {

using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<nb::numpy, const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using CacheBytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using Logits = nb::ndarray<nb::numpy, const float, nb::ndim<2>, nb::device::cpu>;
using Mask = nb::ndarray<nb::numpy, const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitsRow = nb::ndarray<nb::numpy, const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Dims = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// The executor and what must live as long as it. Steps run without the GIL and hold their own reference,
// so that close() in another thread takes nothing away from them.
struct State {
    State(const std::string& isa, int threads, int64_t arena_bytes)
        : executor(isa, threads, arena_bytes), sampler(executor) {}

    std::vector<Bytes> constants;  // destroyed after the executor
    Executor executor;
    Sampler sampler;
    // Of a call that samples; they keep their memory.
    std::mutex sampling;
    std::vector<SampleRow> rows;
    std::vector<SampleResult> results;
    std::vector<TopLogprob> top;
};

// A request to sample for, and where its output is found.
struct PySampleRequest {
    PySampleRequest(nb::object output, double temperature, int64_t top_k, double top_p, double min_p, double typical_p,
                    double repetition_penalty, double presence_penalty, double frequency_penalty, uint64_t seed,
                    int64_t min_tokens, int64_t logprobs, std::vector<int32_t> prompt, std::vector<int32_t> stop_ids,
                    std::optional<std::vector<int32_t>> allowed_ids,
                    const std::vector<std::pair<int32_t, double>>& biases, std::vector<std::vector<int32_t>> bad_words)
        : output(std::move(output)), request([&] {
              SampleParams params;
              params.temperature = temperature;
              params.top_k = top_k;
              params.top_p = top_p;
              params.min_p = min_p;
              params.typical_p = typical_p;
              params.repetition_penalty = static_cast<float>(repetition_penalty);
              params.presence_penalty = presence_penalty;
              params.frequency_penalty = frequency_penalty;
              params.seed = seed;
              params.min_tokens = min_tokens;
              params.logprobs = logprobs;
              params.prompt = std::move(prompt);
              params.stop_ids = std::move(stop_ids);
              if (allowed_ids) params.allowed_ids = std::move(*allowed_ids);
              for (const auto& [token, bias] : biases) {
                  params.bias_ids.push_back(token);
                  params.biases.push_back(static_cast<float>(bias));
              }
              params.bad_words = std::move(bad_words);
              params.require_sane();
              return params;
          }()) {}

    // How many tokens are out. What the request needs of them is taken over.
    int64_t update(int64_t vocab) {
        request.fit(vocab);
        const Py_ssize_t size = PyObject_Size(output.ptr());
        if (size < 0) throw nb::python_error();
        if (!request.needs_output()) return size;
        if (static_cast<size_t>(size) < request.output().size()) request.forget();
        for (auto i = static_cast<Py_ssize_t>(request.output().size()); i < size; ++i) {
            nb::object token = nb::steal(PySequence_GetItem(output.ptr(), i));
            if (!token.is_valid()) throw nb::python_error();
            request.append(nb::cast<int32_t>(token));
        }
        return size;
    }

    nb::object output;
    SampleRequest request;
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

    void start(const Dims& dims, const std::vector<Indices>& inputs) {
        with_step(dims, inputs, [&](Executor& executor, const int64_t* sizes, const auto& arrays) {
            executor.start(sizes, arrays);
            return 0.0;
        });
    }

    double wait() {
        const std::shared_ptr<State> state = get();
        nb::gil_scoped_release release;
        return state->executor.wait();
    }

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

    void prefault_caches(int64_t num_blocks) { get()->executor.prefault_caches(num_blocks); }

    void use_block(int64_t block) { get()->executor.use_block(block); }

    int64_t blocks_ready() { return get()->executor.blocks_ready(); }

    // extras: (row, draft, mask, changed logits) of the rows that have any.
    nb::tuple sample(
        Logits logits, nb::list requests,
        const std::vector<std::tuple<int64_t, std::vector<int32_t>, std::optional<Mask>, std::optional<LogitsRow>>>&
            extras) {
        const std::shared_ptr<State> state = get();
        std::unique_lock<std::mutex> lock(state->sampling, std::try_to_lock);
        if (!lock.owns_lock()) throw std::invalid_argument("the executor is sampling already");
        const auto count = static_cast<int64_t>(logits.shape(0)), vocab = static_cast<int64_t>(logits.shape(1));
        check_logits(logits, static_cast<int64_t>(requests.size()));
        std::vector<SampleRow>& rows = state->rows;
        rows.clear();
        size_t most = 0;
        for (int64_t i = 0; i < count; ++i) {
            PySampleRequest& request = nb::cast<PySampleRequest&>(requests[i]);
            const int64_t step = request.update(vocab);
            rows.push_back(
                {&request.request, logits.data() + i * logits.stride(0), nullptr, nullptr, nullptr, 0, step});
            most = std::max(most, static_cast<size_t>(std::max<int64_t>(0, request.request.params().logprobs)));
        }
        for (const auto& [index, draft, mask, changed] : extras) {
            if (index < 0 || index >= count) throw std::invalid_argument("extras name a row that there is not");
            SampleRow& row = rows[index];
            for (int32_t token : draft) {
                if (token < 0 || token >= vocab) throw std::invalid_argument("a draft has a token that is none");
            }
            row.draft = draft.data();
            row.draft_size = static_cast<int64_t>(draft.size());
            row.step += row.draft_size;
            if (mask) {
                if (static_cast<int64_t>(mask->size()) != (vocab + 31) / 32) {
                    throw std::invalid_argument("a mask of " + std::to_string(mask->size()) + " words for " +
                                                std::to_string(vocab) + " logits");
                }
                row.mask = reinterpret_cast<const uint32_t*>(mask->data());
            }
            if (changed) {
                if (static_cast<int64_t>(changed->size()) != vocab) {
                    throw std::invalid_argument("changed logits of another length");
                }
                row.changed = changed->data();
            }
        }
        state->results.resize(static_cast<size_t>(count));
        state->top.resize(static_cast<size_t>(count) * most);
        {
            nb::gil_scoped_release release;
            state->sampler.sample(rows, vocab, state->results.data(), state->top.data(), static_cast<int64_t>(most));
        }
        nb::object failed = nb::none();
        nb::list tokens, logprobs;
        // A row that came broken goes before one that its request broke.
        for (const bool raw : {true, false}) {
            for (int64_t i = 0; i < count && failed.is_none(); ++i) {
                const SampleResult& result = state->results[i];
                if (result.status == SampleStatus::kDone) continue;
                if (raw == (result.status == SampleStatus::kBrokenLogits)) {
                    failed = nb::make_tuple(i, static_cast<int>(result.status), result.peak);
                }
            }
        }
        for (int64_t i = 0; i < count && failed.is_none(); ++i) {
            const SampleResult& result = state->results[i];
            tokens.append(result.token);
            const int64_t wanted = rows[i].request->params().logprobs;
            if (wanted >= 0) logprobs.append(nb::make_tuple(i, entry(*state, result, i * most, wanted, vocab)));
        }
        return nb::make_tuple(tokens, logprobs, failed);
    }

    nb::tuple logprobs(Logits logits, Indices tokens, int64_t count) {
        const std::shared_ptr<State> state = get();
        std::unique_lock<std::mutex> lock(state->sampling, std::try_to_lock);
        if (!lock.owns_lock()) throw std::invalid_argument("the executor is sampling already");
        const auto rows = static_cast<int64_t>(logits.shape(0)), vocab = static_cast<int64_t>(logits.shape(1));
        check_logits(logits, static_cast<int64_t>(tokens.size()));
        if (count < 0 || count > vocab) throw std::invalid_argument("count must be 0 to the length of a row");
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t token = tokens.data()[i];
            if (token < 0 || token >= vocab) throw std::invalid_argument("a token is outside of the vocabulary");
        }
        state->results.resize(static_cast<size_t>(rows));
        state->top.resize(static_cast<size_t>(rows * count));
        {
            nb::gil_scoped_release release;
            state->sampler.logprobs(logits.data(), logits.stride(0), rows, vocab, tokens.data(), count,
                                    state->results.data(), state->top.data());
        }
        nb::list entries;
        for (int64_t i = 0; i < rows; ++i) {
            const SampleResult& result = state->results[i];
            if (result.status != SampleStatus::kDone) {
                return nb::make_tuple(entries, nb::make_tuple(i, result.peak));
            }
            entries.append(entry(*state, result, i * count, count, vocab));
        }
        return nb::make_tuple(entries, nb::none());
    }

    void close() { state_.reset(); }

private:
    static nb::capsule keep(const std::shared_ptr<Mapping>& mapping) {
        return nb::capsule(new std::shared_ptr<Mapping>(mapping),
                           [](void* p) noexcept { delete static_cast<std::shared_ptr<Mapping>*>(p); });
    }

    static void check_logits(const Logits& logits, int64_t rows) {
        if (static_cast<int64_t>(logits.shape(0)) != rows || (logits.shape(1) > 1 && logits.stride(1) != 1)) {
            throw std::invalid_argument("logits must be rows of neighbouring numbers, one for each request");
        }
    }

    // (logprob, rank, ids of the likeliest, their logprobs)
    static nb::tuple entry(const State& state, const SampleResult& result, size_t first, int64_t count, int64_t vocab) {
        nb::list ids, values;
        for (int64_t i = 0; i < std::min(count, vocab); ++i) {
            ids.append(state.top[first + i].token);
            values.append(state.top[first + i].logprob);
        }
        return nb::make_tuple(result.logprob, result.rank, ids, values);
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
        const int64_t sizes[4] = {std::get<0>(dims), std::get<1>(dims), std::get<2>(dims), std::get<3>(dims)};
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
          "Size of the KV cache of one layer; format 0 is f32, 1 is bf16, 2 is int8, 3 is fp8, 4 is f16.");
    m.def("philox", &philox, "key"_a, "counter"_a, "The 64 random bits of numpy.random.Philox(key=, counter=).");
    nb::class_<PySampleRequest>(m, "SampleRequest", "What a request wants of each of its tokens, made ready once.")
        .def(nb::init<nb::object, double, int64_t, double, double, double, double, double, double, uint64_t, int64_t,
                      int64_t, std::vector<int32_t>, std::vector<int32_t>, std::optional<std::vector<int32_t>>,
                      const std::vector<std::pair<int32_t, double>>&, std::vector<std::vector<int32_t>>>(),
             nb::kw_only(), "output"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "typical_p"_a,
             "repetition_penalty"_a, "presence_penalty"_a, "frequency_penalty"_a, "seed"_a, "min_tokens"_a,
             "logprobs"_a, "prompt"_a, "stop_ids"_a, "allowed_ids"_a.none(), "biases"_a, "bad_words"_a);
    nb::class_<PyExecutor>(m, "Executor", "A flat list of kernel calls and the threads that walk it.")
        .def(nb::init<const std::string&, int, int64_t>(), "isa"_a, "threads"_a, "arena_bytes"_a)
        .def("add_constant", &PyExecutor::add_constant, "data"_a.noconvert(),
             "Keeps a reference, does not copy: uint8, contiguous, at a multiple of 4 bytes.")
        .def("add_cache", &PyExecutor::add_cache, "num_bytes"_a, "Zeroed memory that costs nothing until touched.")
        .def("add_call", &PyExecutor::add_call, "kernel"_a, "operands"_a, "ints"_a, "floats"_a,
             "Operands are (space, index, byte_offset); ValueError with the contract's text if they do not fit.")
        .def("run", &PyExecutor::run, "dims"_a, "inputs"_a.noconvert(),
             "Runs one step with dims (T, S, N, L); returns seconds.")
        .def("start", &PyExecutor::start, "dims"_a, "inputs"_a.noconvert(),
             "Begin a step beside the caller; wait() for it before anything else.")
        .def("wait", &PyExecutor::wait, "Seconds of the step that was started.")
        .def("run_profiled", &PyExecutor::run_profiled, "dims"_a, "inputs"_a.noconvert(),
             "Like run, with a barrier after each stage; returns seconds per call.")
        .def("run_calls", &PyExecutor::run_calls, "dims"_a, "inputs"_a.noconvert(), "first"_a, "last"_a,
             "Like run for the calls [first, last) alone, on what earlier runs left in the arena.")
        .def("cache", &PyExecutor::cache, "index"_a, "The bytes of a KV cache, a writable view. Not while a step runs.")
        .def("prefault_caches", &PyExecutor::prefault_caches, "num_blocks"_a,
             "Have memory for the caches that were added before their blocks are used, in a thread of its own.")
        .def("use_block", &PyExecutor::use_block, "block"_a, "A step begins whose highest block is this one.")
        .def("blocks_ready", &PyExecutor::blocks_ready, "Blocks, from the first one on, that have memory.")
        .def("arena", &PyExecutor::arena, "offset"_a, "rows"_a, "cols"_a, "ld"_a, "A float32 view of the arena.")
        .def("sample", &PyExecutor::sample, "logits"_a.noconvert(), "requests"_a, "extras"_a,
             "A token per row, logprobs of the rows that want them, and (row, reason, peak) if one is broken.")
        .def("logprobs", &PyExecutor::logprobs, "logits"_a.noconvert(), "tokens"_a.noconvert(), "count"_a,
             "Per row (logprob, rank, top ids, top logprobs) of a token and the likeliest.")
        .def("close", &PyExecutor::close,
             "Ends the threads and releases the memory, after the step that runs if one does. Idempotent.");
}
