#include "cpu/prefault.h"

#include <algorithm>
#include <new>

namespace pelton::cpu {
namespace {

constexpr int64_t kPage = int64_t{2} << 20;            // asked for at a time: a huge page
constexpr int64_t kSpare = int64_t{512} << 20;         // of all caches, beyond what is used, while nothing runs
constexpr auto kIdle = std::chrono::milliseconds(50);  // without a new step

}  // namespace

Prefault::Prefault(std::vector<std::shared_ptr<Mapping>> caches, int64_t num_blocks)
    : caches_(std::move(caches)), num_blocks_(num_blocks) {
    int64_t largest = 1, sum = 1;  // bytes of a block
    for (const auto& cache : caches_) {
        largest = std::max(largest, cache->size() / num_blocks);
        sum += cache->size() / num_blocks;
    }
    page_ = std::max<int64_t>(1, kPage / largest);
    spare_ = kSpare / sum;
    ended_ = caches_.empty() || num_blocks <= page_;
}

Prefault::~Prefault() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_one();
    if (thread_.joinable()) thread_.join();
}

void Prefault::use(int64_t block) {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    last_use_ = std::chrono::steady_clock::now();
    used_ = std::min(std::max(used_, block + 1), num_blocks_);
    const int64_t ahead = ready_blocks() - used_;
    if (!thread_.joinable()) {
        thread_ = std::thread([this] { run(); });
    } else if (ahead < page_ / 2 || (sleeps_ && ahead < spare_)) {
        wake_.notify_one();
    }
}

int64_t Prefault::ready() const {
    std::lock_guard lock(mutex_);
    return ready_blocks();
}

int64_t Prefault::ready_blocks() const {
    if (caches_.empty()) return num_blocks_;
    return std::min(cursor_ / static_cast<int64_t>(caches_.size()) * page_, num_blocks_);
}

void Prefault::run() {
    std::unique_lock lock(mutex_);
    while (!stop_ && ready_blocks() < num_blocks_) {
        const int64_t ahead = ready_blocks() - used_;
        const bool idle = std::chrono::steady_clock::now() - last_use_ > kIdle;
        if (ahead < page_ / 2 || (idle && ahead < spare_)) {
            const auto count = static_cast<int64_t>(caches_.size());
            const Mapping& cache = *caches_[cursor_ % count];
            const int64_t bytes = page_ * (cache.size() / num_blocks_), begin = cursor_ / count * bytes;
            lock.unlock();
            const bool there = cache.populate(begin, begin + bytes);
            lock.lock();
            if (!there) break;
            ++cursor_;
        } else if (ahead < spare_) {
            wake_.wait_for(lock, kIdle);
        } else {
            sleeps_ = true;
            wake_.wait(lock);
            sleeps_ = false;
        }
    }
    ended_ = true;
}

}  // namespace pelton::cpu
