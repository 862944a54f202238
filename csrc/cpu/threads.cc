#include "cpu/threads.h"

#include <sched.h>

namespace pelton::cpu {
namespace {

// A pause is 10 to 40 ns: workers stay awake for some 50 us, which bridges the gap between two steps of
// a busy engine, and give up the core after that.
constexpr int kSpinsBeforePark = 2000;
// About 20 us inside a step, longer than any balanced stage's tail.
constexpr int kSpinsBeforeYield = 1000;

}  // namespace

void spin_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void Barrier::wait() {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
        if (spins < kSpinsBeforeYield) {
            spin_pause();
        } else {
            sched_yield();
        }
    }
}

ThreadPool::ThreadPool(int threads) : threads_(threads), barrier_(threads) {
    workers_.reserve(threads - 1);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
    body_ = &body;
    if (threads_ > 1) {
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }
    body(0);
    barrier();  // the workers are done with the body when they have arrived
}

void ThreadPool::work(int thread) {
    uint32_t seen = 0;
    for (;;) {
        for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < kSpinsBeforePark; ++spins) {
            spin_pause();
        }
        epoch_.wait(seen, std::memory_order_acquire);
        seen = epoch_.load(std::memory_order_acquire);
        if (stop_.load(std::memory_order_relaxed)) return;
        (*body_)(thread);
        barrier_.wait();
    }
}

}  // namespace pelton::cpu
