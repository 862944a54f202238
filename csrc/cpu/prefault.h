// Memory of the KV cache that is there before a step writes to it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/mapping.h"

namespace pelton::cpu {

// The first write to a page waits until the system has found and cleared one, and the caches of all layers come to the
// end of a page in the same step. So a thread asks for them ahead of use: the next page of each cache when half of the
// last one is used, and more of them while no step runs. The thread begins with the first use.
class Prefault {
public:
    // Blocks are used from the first one on.
    Prefault(std::vector<std::shared_ptr<Mapping>> caches, int64_t num_blocks);
    ~Prefault();
    Prefault(const Prefault&) = delete;
    Prefault& operator=(const Prefault&) = delete;

    void use(int64_t block);  // a step begins whose highest block is this one
    int64_t ready() const;    // blocks, from the first one on, whose memory was asked for

private:
    int64_t ready_blocks() const;
    void run();

    const std::vector<std::shared_ptr<Mapping>> caches_;
    const int64_t num_blocks_;
    int64_t page_, spare_;  // blocks
    mutable std::mutex mutex_;
    std::condition_variable wake_;
    std::thread thread_;
    std::chrono::steady_clock::time_point last_use_;
    int64_t used_ = 0;    // blocks
    int64_t cursor_ = 0;  // pages of all caches, those of the first blocks first
    bool sleeps_ = false, stop_ = false, ended_ = false;
};

}  // namespace pelton::cpu
