#include "cpu/peaks.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "cpu/executor.h"
#include "cpu/features.h"
#include "cpu/registry.h"

namespace pelton::cpu {
namespace {

// Four times the L3 for each thread, as each may sit beside an L3 of its own, within reason: reads come from DRAM.
constexpr int64_t kLeastDramBytes = int64_t{128} << 20, kMostDramBytes = int64_t{512} << 20;
// 12 chains times this is some 50 us, long against the barrier and short against a time slice.
constexpr int64_t kRounds = 20000;
// What one measurement of a bandwidth reads, for the same reasons: half a millisecond from DRAM.
constexpr int64_t kReads = int64_t{16} << 20;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Repeats until the time is up and returns the best rate: other jobs can only make it slower. From the first
// start to the last stop: were one thread the clock, one that is kept waiting for its core would miss the
// part of the work that others do without it.
double best_rate(ThreadPool& pool, double amount, double seconds, const std::function<float(int)>& work) {
    struct alignas(64) Lane {
        double start, stop;
        float sink;
    };
    std::vector<Lane> lanes(pool.size());
    double best = 0.0;
    const double end = now() + seconds;
    int repeats = 0;
    do {
        pool.run([&](int thread) {
            Lane& lane = lanes[thread];
            pool.barrier();
            lane.start = now();
            lane.sink += work(thread);
            lane.stop = now();
        });
        double start = lanes[0].start, stop = lanes[0].stop;
        for (const Lane& lane : lanes) {
            start = std::min(start, lane.start);
            stop = std::max(stop, lane.stop);
        }
        best = std::max(best, amount / (stop - start));
        ++repeats;
    } while (now() < end || repeats < 3);
    return best;
}

}  // namespace

std::vector<std::pair<std::string, double>> measure_peaks(const std::string& isa, int threads, double seconds,
                                                          const std::vector<std::string>& names) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
    if (!(seconds >= 0.0 && seconds <= 60.0)) throw std::invalid_argument("seconds must be 0 to 60");
    const PeakKernels& kernels = peak_kernels(isa);
    ThreadPool pool(threads);
    std::vector<std::pair<std::string, double>> peaks;
    const auto measure = [&](const char* name, double amount, const std::function<float(int)>& work) {
        const bool wanted = names.empty() || std::find(names.begin(), names.end(), name) != names.end();
        if (wanted) peaks.emplace_back(name, best_rate(pool, amount * threads, seconds, work));
    };

    const Features features = detect_features();
    // Slice after slice, round and round: each has left the caches when its turn comes again.
    const int64_t l3 = features.l3_bytes > 0 ? features.l3_bytes : kMostDramBytes;
    const int64_t part = std::clamp(4 * l3 * threads, kLeastDramBytes, kMostDramBytes) / threads / 4096 * 4096;
    const int64_t slice = std::min(std::max(kReads / threads, int64_t{1} << 20), part);
    Mapping buffer(part * threads);
    std::vector<int64_t> at(threads * 8, -1);  // a cache line each
    measure("read_bandwidth", static_cast<double>(slice), [&](int t) {
        int64_t& offset = at[t * 8];
        char* own = buffer.data() + t * part;
        if (offset < 0) std::memset(own, 0, part);  // each thread touches its own part; this time does not count
        offset = offset < 0 || offset + 2 * slice > part ? 0 : offset + slice;
        return (offset / slice % 2 ? kernels.read : kernels.read_plain)(own + offset, slice);
    });

    const auto cache = [&](const char* name, int64_t bytes) {
        bytes = std::min(bytes, part) / 4096 * 4096;
        const int64_t passes = (kReads + bytes - 1) / bytes;
        measure(name, static_cast<double>(bytes * passes), [&, bytes, passes](int t) {
            float total = 0.0f;
            for (int64_t i = 0; i < passes; ++i) total += kernels.read_plain(buffer.data() + t * part, bytes);
            return total;
        });
    };
    const int64_t l1 = features.l1_bytes > 0 ? features.l1_bytes : 32 << 10;
    const int64_t l2 = features.l2_bytes > l1 ? features.l2_bytes : 512 << 10;
    // Past the thread's own L2, and half of its share of the L3; reading round and round leaves nothing in an LRU
    // cache that is smaller than the round.
    cache("l3_bandwidth", std::clamp(features.l3_bytes / threads / 2, l2 + l2 / 2, 4 * l2));
    cache("l2_bandwidth", std::max(l2 / 2, 2 * l1));
    cache("l1_bandwidth", l1 / 2);

    const auto compute = [&](const char* name, float (*kernel)(int64_t), double ops) {
        if (kernel) measure(name, ops * kRounds, [kernel](int) { return kernel(kRounds); });
    };
    compute("f32", kernels.f32, kernels.f32_ops);
    compute("bf16", kernels.bf16, kernels.bf16_ops);
    compute("int8", kernels.int8, kernels.int8_ops);
    return peaks;
}

}  // namespace pelton::cpu
