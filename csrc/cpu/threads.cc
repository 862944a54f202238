#include "cpu/threads.h"

#include <sched.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace pelton::cpu {
namespace {

// A pause is 10 to 40 ns: workers stay awake for some 50 us, which bridges the gap between two steps of
// a busy engine, and give up the core after that.
constexpr int kSpinsBeforePark = 2000;
// About 20 us inside a step, longer than any balanced stage's tail.
constexpr int kSpinsBeforeYield = 1000;
// A yield returns at once unless somebody waits for the core: some 20 us more if it is ours alone.
constexpr int kYieldsBeforeSleep = 50;

// The control and status register of floating point.
#if defined(__x86_64__)
constexpr uint64_t kDefaultMode = 0x1f80;
uint64_t float_mode() { return __builtin_ia32_stmxcsr(); }
void set_float_mode(uint64_t mode) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kDefaultMode = 0;
uint64_t float_mode() {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
constexpr uint64_t kDefaultMode = 0;
uint64_t float_mode() { return kDefaultMode; }
void set_float_mode(uint64_t) {}
#endif

}  // namespace

DefaultFloatMode::DefaultFloatMode() : before_(float_mode()) { set_float_mode(kDefaultMode); }

DefaultFloatMode::~DefaultFloatMode() { set_float_mode(before_); }

void spin_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");  // yield takes no time on most cores, this some 10 ns
#endif
}

Barrier::Barrier(int threads) : threads_(threads), spins_(kSpinsBeforeYield) {
    // With more threads than cores, whoever spins keeps the one that everybody waits for from running.
    const unsigned cores = std::thread::hardware_concurrency();  // 0 if unknown
    if (cores && static_cast<unsigned>(threads) > cores) spins_ = 0;
}

void Barrier::wait() {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        // Ordered before notify_all looks for sleepers, or one that is just going to sleep would be missed.
        generation_.store(generation + 1, std::memory_order_seq_cst);
        generation_.notify_all();
        return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
        if (spins < spins_) {
            spin_pause();
        } else if (spins < spins_ + kYieldsBeforeSleep) {
            sched_yield();
        } else {
            generation_.wait(generation, std::memory_order_acquire);
        }
    }
}

ThreadPool::ThreadPool(int threads) : threads_(threads), process_(getpid()), placement_(threads), barrier_(threads) {
    workers_.reserve(threads - 1);
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::exception& error) {
        const std::string count = std::to_string(workers_.size() + 1);
        stop();  // a thread that is not joined would end the process
        throw std::runtime_error("only " + count + " of " + std::to_string(threads) +
                                 " threads could be started: " + error.what());
    }
}

ThreadPool::~ThreadPool() {
    if (in_own_process()) {
        stop();
    } else {
        // There is nothing to join after a fork, and the handles may point to memory that is gone.
        new std::vector<std::thread>(std::move(workers_));
    }
}

bool ThreadPool::in_own_process() const { return process_ == getpid(); }

void ThreadPool::require_own_process() const {
    if (in_own_process()) return;
    throw std::runtime_error(
        "the executor was made before fork() and has no threads here; make the model in the child process");
}

void ThreadPool::stop() {
    stop_.store(true, std::memory_order_relaxed);
    wake();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

void ThreadPool::wake() {
    // Ordered before notify_all looks for sleepers, as in the barrier.
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    epoch_.notify_all();
}

void ThreadPool::run(const std::function<void(int)>& body) {
    body_ = &body;
    DefaultFloatMode mode;
    if (threads_ > 1) wake();
    body(0);
    barrier();  // the workers are done with the body when they have arrived
}

void ThreadPool::work(int thread) {
    placement_.pin(thread);
    DefaultFloatMode mode;  // a thread starts in the mode of its creator
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
