// A pool of threads that run the same function together (SPMD), and the barrier they meet at.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/numa.h"

namespace pelton::cpu {

// Tells the core that this is a spin loop.
void spin_pause();

// Rounding to nearest, subnormals kept, no traps: in this scope kernels compute the same whatever mode
// the calling thread is in (a library built with -ffast-math changes it for a whole process).
class DefaultFloatMode {
public:
    DefaultFloatMode();
    ~DefaultFloatMode();
    DefaultFloatMode(const DefaultFloatMode&) = delete;
    DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

private:
    uint64_t before_;
};

// Sense-reversing barrier. Spins, as the wait is usually shorter than a system call; yields after long
// spins, because the missing thread may be waiting for this very core; sleeps when that did not help,
// because many threads that yield to each other keep the one with work from its turn.
class Barrier {
public:
    explicit Barrier(int threads);
    void wait();

private:
    const uint32_t threads_;
    int spins_;
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

class ThreadPool {
public:
    // The caller of run() is one of the threads. Throws std::runtime_error if they cannot be had.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return threads_; }
    // Workers are on the CPUs of their node; the caller of run() is where it wants to be.
    const Placement& placement() const { return placement_; }
    // A child of fork() has none of the threads and would wait for them for ever: throws there.
    void require_own_process() const;
    bool in_own_process() const;
    // Runs body(thread) on all threads and returns when all are done. One caller at a time.
    // The body must not throw.
    void run(const std::function<void(int)>& body);
    // For use inside the body.
    void barrier() {
        if (threads_ > 1) barrier_.wait();
    }

private:
    void work(int thread);
    void wake();
    void stop();

    const int threads_;
    const pid_t process_;
    const Placement placement_;
    Barrier barrier_;
    const std::function<void(int)>* body_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};  // changes when there is work
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace pelton::cpu
