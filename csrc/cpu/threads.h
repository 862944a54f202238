// A pool of threads that run the same function together (SPMD), and the barrier they meet at.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace pelton::cpu {

// Tells the core that this is a spin loop.
void spin_pause();

// Sense-reversing barrier. Spins, as the wait is usually shorter than a system call; yields after long
// spins, because the missing thread may be waiting for this very core.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

private:
    const uint32_t threads_;
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

class ThreadPool {
public:
    explicit ThreadPool(int threads);  // the caller of run() is one of them
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return threads_; }
    // Runs body(thread) on all threads and returns when all are done. One caller at a time.
    // The body must not throw.
    void run(const std::function<void(int)>& body);
    // For use inside the body.
    void barrier() {
        if (threads_ > 1) barrier_.wait();
    }

private:
    void work(int thread);

    const int threads_;
    Barrier barrier_;
    const std::function<void(int)>* body_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};  // changes when there is work
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace pelton::cpu
