#include "cpu/peaks.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "cpu/executor.h"
#include "cpu/registry.h"

namespace pelton::cpu {
namespace {

// Larger than the last-level cache of nearly all sockets, so that reads come from DRAM.
constexpr int64_t kDramBytes = int64_t{512} << 20;
// A few core-private caches deep but within a last-level cache slice.
constexpr int64_t kCacheBytes = int64_t{4} << 20;
// 12 chains times this is some 50 us, long against the barrier and short against a time slice.
constexpr int64_t kRounds = 20000;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Repeats until the time is up and returns the best rate: other jobs can only make it slower.
double best_rate(ThreadPool& pool, double amount, double seconds, const std::function<float(int)>& work) {
    double best = 0.0;
    std::vector<float> sink(pool.size() * 16);  // a cache line each
    const double end = now() + seconds;
    int repeats = 0;
    do {
        double start = 0.0, stop = 0.0;
        pool.run([&](int thread) {
            pool.barrier();
            if (thread == 0) start = now();
            sink[thread * 16] += work(thread);
            pool.barrier();
            if (thread == 0) stop = now();
        });
        best = std::max(best, amount / (stop - start));
        ++repeats;
    } while (now() < end || repeats < 3);
    return best;
}

}  // namespace

std::vector<std::pair<std::string, double>> measure_peaks(const std::string& isa, int threads, double seconds) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
    if (!(seconds >= 0.0 && seconds <= 60.0)) throw std::invalid_argument("seconds must be 0 to 60");
    const PeakKernels& kernels = peak_kernels(isa);
    ThreadPool pool(threads);
    std::vector<std::pair<std::string, double>> peaks;

    const int64_t part = kDramBytes / threads / 4096 * 4096;
    Mapping buffer(part * threads);
    pool.run([&](int t) { std::memset(buffer.data() + t * part, 0, part); });  // each thread touches its own part
    peaks.emplace_back("read_bandwidth", best_rate(pool, static_cast<double>(part) * threads, seconds, [&](int t) {
                           return kernels.read(buffer.data() + t * part, part);
                       }));
    const int64_t small = std::min(kCacheBytes, part);
    constexpr int kPasses = 8;  // make a measurement longer than the barriers around it
    peaks.emplace_back("l3_bandwidth",
                       best_rate(pool, static_cast<double>(small) * threads * kPasses, seconds, [&](int t) {
                           float total = 0.0f;
                           for (int i = 0; i < kPasses; ++i) total += kernels.read(buffer.data() + t * part, small);
                           return total;
                       }));
    const auto compute = [&](const char* name, float (*kernel)(int64_t), double ops) {
        if (!kernel) return;
        peaks.emplace_back(name,
                           best_rate(pool, ops * kRounds * threads, seconds, [&](int) { return kernel(kRounds); }));
    };
    compute("f32", kernels.f32, kernels.f32_ops);
    compute("bf16", kernels.bf16, kernels.bf16_ops);
    compute("int8", kernels.int8, kernels.int8_ops);
    return peaks;
}

}  // namespace pelton::cpu
