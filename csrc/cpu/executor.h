// Runs a flat list of kernel calls, step after step, on a pool of threads.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/contract.h"
#include "cpu/mapping.h"
#include "cpu/prefault.h"
#include "cpu/threads.h"

namespace pelton::cpu {

// An operand as the caller names it.
struct OperandRef {
    std::string space;
    int64_t index, offset;
};

struct StepInput {
    const int32_t* data;
    int64_t size;
};

class Executor {
public:
    // Throws std::invalid_argument where the caller is wrong; so do add_call and run.
    Executor(const std::string& isa, int threads, int64_t arena_bytes);
    ~Executor();

    int add_constant(const char* data, int64_t bytes);  // the caller keeps the memory alive
    int add_cache(int64_t bytes);
    void prefault_caches(int64_t num_blocks);  // those that are there: have memory before a step writes to it
    void use_block(int64_t block);             // a step begins whose highest block is this one
    int64_t blocks_ready() const { return prefault_ ? prefault_->ready() : 0; }
    void add_call(const std::string& kernel, const std::vector<OperandRef>& operands, const std::vector<int64_t>& ints,
                  const std::vector<double>& floats);
    // Throws std::runtime_error in a process forked after the executor was made.
    // Returns seconds. With `per_call`, also the seconds of each call, with a barrier after each stage.
    double run(const int64_t dims[4], const std::vector<StepInput>& inputs, std::vector<double>* per_call = nullptr);
    // The same beside the caller, by a thread of the executor's own. What the caller did wrong is thrown by start(),
    // and nothing runs then. Between the two the executor may only be destroyed, which waits.
    void start(const int64_t dims[4], const std::vector<StepInput>& inputs);
    double wait();  // seconds of the step that was started last
    // Only the calls [first, last), on what earlier runs left in the arena: to measure an op by itself.
    double run_calls(const int64_t dims[4], const std::vector<StepInput>& inputs, int64_t first, int64_t last);
    std::shared_ptr<Mapping> arena() const { return arena_; }
    std::shared_ptr<Mapping> cache(int64_t index) const;  // throws std::invalid_argument if there is no such one

    const std::string& isa() const { return isa_; }
    int threads() const { return pool_.size(); }
    // Runs `body(thread)` on all threads between two steps, or on the caller's alone. It must not throw.
    void run_on_threads(const std::function<void(int)>& body, bool alone = false);

private:
    struct InputOperand {
        int operand, slot;
    };
    struct PlannedCall {
        const Contract* contract;
        Call call;
        std::vector<InputOperand> inputs;
    };
    // One stage of one call in one step.
    struct Work {
        Stage stage;
        const Call* call;
        Cut cut;
        bool solo;         // one chunk: thread 0 does it
        bool barrier;      // after it
        size_t next_wide;  // the next one that is not solo, or the number of works
    };
    // The items of a stage that a thread still has: it takes them from the front, which keeps its reads in one
    // stream, and others that are done with theirs help from the back.
    class alignas(64) Share {
    public:
        void reset(int64_t begin, int64_t end);
        // Takes up to `most` items from the front or the back; false if there are none.
        bool take(bool front, int64_t most, int64_t* begin, int64_t* end);

    private:
        static uint64_t pack(int64_t begin, int64_t end) {
            return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(begin);
        }

        std::atomic<uint64_t> bounds_{0};  // the first in the lower half, the end in the upper
    };

    // At most one step, or whatever else runs on the threads: throws std::invalid_argument if there is one.
    class Claim {
    public:
        explicit Claim(std::atomic<bool>& busy);
        ~Claim();
        void keep() { kept_ = true; }  // somebody else lets go

    private:
        std::atomic<bool>& busy_;
        bool kept_ = false;
    };

    void drive();
    void copy_inputs(const std::vector<StepInput>& inputs);
    void plan(const int64_t dims[4], const std::vector<StepInput>& inputs, size_t first, size_t last);
    double run_range(const int64_t dims[4], const std::vector<StepInput>& inputs, std::vector<double>* per_call,
                     int64_t first, int64_t last);
    void walk(int thread, std::vector<double>* per_call);
    void reset_share(const Work& work, int thread, Share* shares);
    void do_wide(const Work& work, int thread, Share* shares);
    [[noreturn]] void reject(const Contract& contract, const std::string& why) const;

    const std::string isa_;
    ThreadPool pool_;
    std::shared_ptr<Mapping> arena_;
    std::vector<Operand> constants_;
    std::vector<std::shared_ptr<Mapping>> caches_;
    std::unique_ptr<Prefault> prefault_;
    std::vector<PlannedCall> calls_;
    int num_inputs_ = 0;

    std::atomic<bool> busy_{false};
    std::thread driver_;                    // runs what was started; begun by the first start()
    std::atomic<uint32_t> driver_turn_{0};  // odd: the driver's, even: the caller's
    std::atomic<bool> stop_{false};
    bool started_ = false;
    double seconds_ = 0.0;  // of the step that was started
    Step step_;
    std::vector<int32_t> input_values_;  // what step_.inputs point to; only grows
    std::vector<Work> work_;
    size_t num_work_ = 0;
    // Of all threads, for two stages that are not solo: a thread sets its share of the next one while others are
    // still in this one, and nobody is in the one before.
    std::unique_ptr<Share[]> shares_;
    std::unique_ptr<Mapping> shared_, scratch_;
    int64_t scratch_per_thread_ = 0;
    std::vector<Worker> workers_;
    uint64_t tag_ = 0;
};

}  // namespace pelton::cpu
