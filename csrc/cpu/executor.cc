#include "cpu/executor.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "cpu/registry.h"

namespace pelton::cpu {
namespace {

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr int kMaxThreads = 1024;  // far above any machine; guards against a negative or wild number

}  // namespace

void Executor::Share::reset(int64_t begin, int64_t end) { bounds_.store(pack(begin, end), std::memory_order_relaxed); }

bool Executor::Share::take(bool front, int64_t most, int64_t* begin, int64_t* end) {
    uint64_t now = bounds_.load(std::memory_order_relaxed), left;
    do {
        const auto first = static_cast<int64_t>(now & UINT32_MAX), stop = static_cast<int64_t>(now >> 32);
        if (first >= stop) return false;
        const int64_t count = std::min(most, stop - first);
        *begin = front ? first : stop - count;
        *end = *begin + count;
        left = front ? pack(*end, stop) : pack(first, *begin);
    } while (!bounds_.compare_exchange_weak(now, left, std::memory_order_relaxed));
    return true;
}

Executor::Executor(const std::string& isa, int threads, int64_t arena_bytes)
    : isa_((require_isa(isa), isa)),
      pool_(threads < 1 || threads > kMaxThreads ? throw std::invalid_argument("threads must be 1 to 1024") : threads) {
    if (arena_bytes < 0) throw std::invalid_argument("arena_bytes must not be negative");
    arena_ = std::make_shared<Mapping>(arena_bytes);
    shares_ = std::make_unique<Share[]>(2 * static_cast<size_t>(threads));
}

Executor::~Executor() {
    if (!pool_.in_own_process()) prefault_.release();  // after a fork there is no thread to join
    if (!driver_.joinable()) return;
    if (!pool_.in_own_process()) {
        new std::thread(std::move(driver_));
        return;
    }
    for (uint32_t turn; (turn = driver_turn_.load(std::memory_order_acquire)) % 2;) driver_turn_.wait(turn);
    stop_.store(true, std::memory_order_relaxed);
    driver_turn_.fetch_add(1);
    driver_turn_.notify_all();
    driver_.join();
}

Executor::Claim::Claim(std::atomic<bool>& busy) : busy_(busy) {
    if (busy_.exchange(true, std::memory_order_acquire)) {
        throw std::invalid_argument("the executor is running a step already");
    }
}

Executor::Claim::~Claim() {
    if (!kept_) busy_.store(false, std::memory_order_release);
}

int Executor::add_constant(const char* data, int64_t bytes) {
    pool_.placement().share_out(data, bytes);
    constants_.push_back({const_cast<char*>(data), bytes});  // kernels only read constants
    return static_cast<int>(constants_.size()) - 1;
}

int Executor::add_cache(int64_t bytes) {
    if (bytes < 0) throw std::invalid_argument("a cache must not have a negative size");
    caches_.push_back(std::make_shared<Mapping>(bytes));
    pool_.placement().interleave(caches_.back()->data(), bytes);  // a block may be anybody's
    return static_cast<int>(caches_.size()) - 1;
}

void Executor::prefault_caches(int64_t num_blocks) {
    if (prefault_ || num_blocks < 1) throw std::invalid_argument("prefault_caches once, for one block or more");
    prefault_ = std::make_unique<Prefault>(caches_, num_blocks);
}

void Executor::use_block(int64_t block) {
    if (prefault_ && pool_.in_own_process()) prefault_->use(block);
}

std::shared_ptr<Mapping> Executor::cache(int64_t index) const {
    if (index < 0 || static_cast<size_t>(index) >= caches_.size()) throw std::invalid_argument("no such cache");
    return caches_[static_cast<size_t>(index)];
}

void Executor::reject(const Contract& contract, const std::string& why) const {
    throw std::invalid_argument(std::string(contract.name) + ": " + why + "; contract: " + contract.text);
}

void Executor::add_call(const std::string& kernel, const std::vector<OperandRef>& operands,
                        const std::vector<int64_t>& ints, const std::vector<double>& floats) {
    pool_.require_own_process();  // before the claim, which the fork may have copied
    Claim claim(busy_);
    DefaultFloatMode mode;  // for the conversion of `floats`
    const Contract* contract = find_contract(kernel);
    if (!contract) throw std::invalid_argument("unknown kernel '" + kernel + "'");
    const size_t want = std::strlen(contract->operands);
    if (operands.size() != want) {
        reject(*contract, std::to_string(operands.size()) + " operands, not " + std::to_string(want));
    }
    if (ints.size() != static_cast<size_t>(contract->num_ints)) {
        reject(*contract, std::to_string(ints.size()) + " ints, not " + std::to_string(contract->num_ints));
    }
    if (floats.size() != static_cast<size_t>(contract->num_floats)) {
        reject(*contract, std::to_string(floats.size()) + " floats, not " + std::to_string(contract->num_floats));
    }
    constexpr int64_t kLargest = int64_t{1} << 31;  // so that products of two numbers stay within 64 bits
    for (int64_t value : ints) {
        if (value < 0 || value >= kLargest) reject(*contract, "ints must be 0 to 2^31 - 1");
    }
    PlannedCall planned = {};
    planned.contract = contract;
    Call& call = planned.call;
    std::copy(ints.begin(), ints.end(), call.ints);
    std::transform(floats.begin(), floats.end(), call.floats, [](double f) { return static_cast<float>(f); });
    call.kernel = find_kernel(isa_, kernel);
    if (!call.kernel) throw std::invalid_argument("no kernel for '" + kernel + "'");

    int inputs_needed = num_inputs_;
    for (size_t i = 0; i < want; ++i) {
        const OperandRef& ref = operands[i];
        const char kind = contract->operands[i];
        const std::string name = "operand " + std::to_string(i);
        if (ref.space == "none") {
            if (kind != 'C') reject(*contract, name + " must not be absent");
            continue;
        }
        const char* space = kind == 'a' ? "arena" : kind == 'k' ? "cache" : kind == 'i' ? "input" : "const";
        if (ref.space != space) reject(*contract, name + " must be in space '" + space + "', not '" + ref.space + "'");
        if (kind == 'i') {
            if (ref.index < 0 || ref.index >= 256 || ref.offset != 0) reject(*contract, name + ": no such input slot");
            planned.inputs.push_back({static_cast<int>(i), static_cast<int>(ref.index)});
            call.operands[i].bytes = ref.index;  // the slot; plan() looks the array up
            inputs_needed = std::max(inputs_needed, static_cast<int>(ref.index) + 1);
            continue;
        }
        Operand whole = {arena_->data(), arena_->size()};
        if (kind != 'a') {
            const size_t count = kind == 'k' ? caches_.size() : constants_.size();
            if (ref.index < 0 || static_cast<size_t>(ref.index) >= count) reject(*contract, name + ": no such index");
            whole =
                kind == 'k' ? Operand{caches_[ref.index]->data(), caches_[ref.index]->size()} : constants_[ref.index];
        }
        // Kernels read f32 and pairs of bf16; a table of bytes has no need of it but is aligned as well.
        if (ref.offset < 0 || ref.offset > whole.bytes || ref.offset % 4) {
            reject(*contract, name + ": offset must be a multiple of 4 within the buffer");
        }
        call.operands[i] = {whole.data + ref.offset, whole.bytes - ref.offset};
    }
    std::string error = contract->validate(call);
    if (!error.empty()) reject(*contract, error);
    num_inputs_ = inputs_needed;
    const int64_t scratch = (contract->scratch_bytes(call) + 4095) / 4096 * 4096;  // threads on pages of their own
    scratch_per_thread_ = std::max(scratch_per_thread_, scratch);
    calls_.push_back(std::move(planned));
    work_.clear();
}

// The step works on copies: whoever owns the arrays may write to them while it runs, after the checks.
void Executor::copy_inputs(const std::vector<StepInput>& inputs) {
    size_t total = 0;
    for (const StepInput& input : inputs) total += static_cast<size_t>(input.size);
    if (input_values_.size() < total) input_values_.resize(total);
    step_.inputs.resize(inputs.size());
    int32_t* to = input_values_.data();
    for (size_t i = 0; i < inputs.size(); ++i) {
        const int64_t size = inputs[i].size;
        Input& input = step_.inputs[i];
        input = {to, size, 0, -1};
        if (size == 0) continue;
        std::memcpy(to, inputs[i].data, size * sizeof(int32_t));
        int32_t low = to[0], high = low;
        for (int64_t j = 1; j < size; ++j) {
            low = std::min(low, to[j]);
            high = std::max(high, to[j]);
        }
        input.min = low;
        input.max = high;
        to += size;
    }
}

void Executor::plan(const int64_t dims[4], const std::vector<StepInput>& inputs, size_t first, size_t last) {
    for (int i = 0; i < 4; ++i) {
        if (dims[i] < 0 || dims[i] > INT32_MAX) throw std::invalid_argument("dims must not be negative");
        step_.dims[i] = dims[i];
    }
    if (inputs.size() < static_cast<size_t>(num_inputs_)) {
        throw std::invalid_argument("the calls need " + std::to_string(num_inputs_) + " inputs");
    }
    step_.threads = pool_.size();
    copy_inputs(inputs);
    if (work_.empty()) {  // calls were added since the last step
        std::vector<Work> work(calls_.size() * kMaxStages);
        auto scratch = std::make_unique<Mapping>(scratch_per_thread_ * pool_.size());
        std::vector<Worker> workers(pool_.size());
        for (int i = 0; i < pool_.size(); ++i) {
            workers[i] = {i, scratch->data() ? scratch->data() + i * scratch_per_thread_ : nullptr, 0};
        }
        step_.attention_plans.resize(calls_.size());
        step_.lora_plans.resize(calls_.size());
        // Nothing throws from here on: a step that could not have its memory leaves the next one to try again.
        scratch_ = std::move(scratch);
        workers_ = std::move(workers);
        work_ = std::move(work);
    }
    step_.num_attention_plans = step_.num_lora_plans = 0;
    num_work_ = 0;
    int64_t shared_bytes = 0;
    for (size_t index = first; index < last; ++index) {
        PlannedCall& planned = calls_[index];
        Call& call = planned.call;
        for (const InputOperand& in : planned.inputs) {
            call.operands[in.operand].data =
                reinterpret_cast<char*>(const_cast<int32_t*>(step_.inputs[in.slot].data));  // only read
        }
        call.tag = ++tag_;
        call.shared_bytes = 0;
        std::string error = planned.contract->plan(call, step_);
        if (!error.empty()) reject(*planned.contract, error);
        shared_bytes = std::max(shared_bytes, call.shared_bytes);
        for (int s = 0; s < kMaxStages && call.kernel->stages[s]; ++s) {
            if (call.cuts[s].items == 0) continue;
            const Cut cut = call.cuts[s];
            if (cut.items > UINT32_MAX) reject(*planned.contract, "too many rows for one step");
            const bool solo = pool_.size() == 1 || cut.items <= cut.grain;
            work_[num_work_++] = {call.kernel->stages[s], &call, cut, solo, true, 0};
        }
    }
    if (!shared_ || shared_->size() < shared_bytes) {  // grows to the largest step seen
        shared_.reset();
        shared_ = std::make_unique<Mapping>(shared_bytes);
    }
    for (PlannedCall& planned : calls_) planned.call.shared = shared_->data();
    // Thread 0 needs nobody's permission to go from one piece of its own work to the next, and the pool
    // meets at the end of the step anyway.
    size_t wide = num_work_;
    for (size_t i = num_work_; i-- > 0;) {
        const bool last = i + 1 == num_work_;
        work_[i].barrier = !last && !(work_[i].solo && work_[i + 1].solo);
        work_[i].next_wide = wide;
        if (!work_[i].solo) wide = i;
    }
    for (int t = 0; t < pool_.size() && wide < num_work_; ++t) reset_share(work_[wide], t, shares_.get());
}

// Whole chunks, so that helpers find whole chunks as well.
void Executor::reset_share(const Work& work, int thread, Share* shares) {
    const int64_t chunks = (work.cut.items + work.cut.grain - 1) / work.cut.grain;
    const auto at = [&](int64_t t) { return std::min(work.cut.items, chunks * t / pool_.size() * work.cut.grain); };
    shares[thread].reset(at(thread), at(thread + 1));
}

void Executor::do_wide(const Work& work, int thread, Share* shares) {
    int64_t begin, end;
    while (shares[thread].take(true, work.cut.grain, &begin, &end)) {
        work.stage(*work.call, begin, end, workers_[thread]);
    }
    for (int i = 1; i < pool_.size(); ++i) {
        Share& other = shares[(thread + i) % pool_.size()];
        while (other.take(false, work.cut.grain, &begin, &end)) work.stage(*work.call, begin, end, workers_[thread]);
    }
}

void Executor::walk(int thread, std::vector<double>* per_call) {
    double before = per_call && thread == 0 ? seconds_now() : 0.0;
    Share *shares = shares_.get(), *next_shares = shares + pool_.size();
    for (size_t i = 0; i < num_work_; ++i) {
        const Work& work = work_[i];
        if (!work.solo) {
            if (work.next_wide < num_work_) reset_share(work_[work.next_wide], thread, next_shares);
            do_wide(work, thread, shares);
            std::swap(shares, next_shares);
        } else if (thread == 0) {
            work.stage(*work.call, 0, work.cut.items, workers_[thread]);
        }
        if (work.barrier || per_call) pool_.barrier();
        if (!per_call) continue;
        if (thread == 0) {
            const double now = seconds_now();
            // Calls are stored in order, so the address tells the index.
            const auto offset =
                reinterpret_cast<const char*>(work.call) - reinterpret_cast<const char*>(&calls_[0].call);
            (*per_call)[offset / static_cast<ptrdiff_t>(sizeof(PlannedCall))] += now - before;
            before = now;
        }
        pool_.barrier();  // nobody starts the next stage before the clock was read
    }
}

double Executor::run(const int64_t dims[4], const std::vector<StepInput>& inputs, std::vector<double>* per_call) {
    return run_range(dims, inputs, per_call, 0, -1);
}

double Executor::run_calls(const int64_t dims[4], const std::vector<StepInput>& inputs, int64_t first, int64_t last) {
    if (first < 0 || last < first) throw std::invalid_argument("calls must be a range [first, last)");
    return run_range(dims, inputs, nullptr, first, last);
}

void Executor::run_on_threads(const std::function<void(int)>& body, bool alone) {
    pool_.require_own_process();
    Claim claim(busy_);
    if (alone) {
        DefaultFloatMode mode;
        body(0);
    } else {
        pool_.run(body);
    }
}

// A negative `last` means the end.
double Executor::run_range(const int64_t dims[4], const std::vector<StepInput>& inputs, std::vector<double>* per_call,
                           int64_t first, int64_t last) {
    pool_.require_own_process();
    Claim claim(busy_);
    const auto count = static_cast<int64_t>(calls_.size());
    if (last > count) throw std::invalid_argument("there are " + std::to_string(count) + " calls");
    const double start = seconds_now();
    plan(dims, inputs, static_cast<size_t>(first), static_cast<size_t>(last < 0 ? count : last));
    if (per_call) per_call->assign(calls_.size(), 0.0);
    const auto body = [&](int thread) { walk(thread, per_call); };
    pool_.run(body);
    return seconds_now() - start;
}

void Executor::start(const int64_t dims[4], const std::vector<StepInput>& inputs) {
    pool_.require_own_process();
    Claim claim(busy_);
    const double start = seconds_now();
    if (!driver_.joinable()) driver_ = std::thread([this] { drive(); });
    plan(dims, inputs, 0, calls_.size());
    claim.keep();
    started_ = true;
    seconds_ = seconds_now() - start;
    driver_turn_.fetch_add(1);
    driver_turn_.notify_all();
}

double Executor::wait() {
    pool_.require_own_process();
    if (!started_) throw std::invalid_argument("no step was started");
    for (uint32_t turn; (turn = driver_turn_.load(std::memory_order_acquire)) % 2;) driver_turn_.wait(turn);
    started_ = false;
    busy_.store(false, std::memory_order_release);
    return seconds_;
}

void Executor::drive() {
    for (;;) {
        for (uint32_t turn; (turn = driver_turn_.load(std::memory_order_acquire)) % 2 == 0;) driver_turn_.wait(turn);
        if (stop_.load(std::memory_order_relaxed)) return;
        const double start = seconds_now();
        const auto body = [&](int thread) { walk(thread, nullptr); };
        pool_.run(body);
        seconds_ += seconds_now() - start;
        driver_turn_.fetch_add(1);
        driver_turn_.notify_all();
    }
}

}  // namespace pelton::cpu
