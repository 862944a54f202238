// Executes AMX instructions on processors that have none: load with LD_PRELOAD, and tell the program that
// the instructions exist. Every one of them raises SIGILL; the handler here carries it out on the registers
// of the thread and lets the thread go on behind it.
#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "decoder.h"
#include "tiles.h"

#define AMX_EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace amx_emulator {
namespace {

// Storage that exists from the start of the thread: a signal handler must not make the loader allocate it.
__attribute__((tls_model("initial-exec"))) thread_local Tiles tiles;

std::atomic<int> configured_threads{0};
std::atomic<int64_t> executed{0};

struct sigaction programs_action;  // what the program wants done about other illegal instructions

using SigactionFunction = int (*)(int, const struct sigaction*, struct sigaction*);

SigactionFunction real_sigaction() {
    static SigactionFunction function = reinterpret_cast<SigactionFunction>(dlsym(RTLD_NEXT, "sigaction"));
    return function;
}

Registers registers_of(const ucontext_t& context) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    Registers registers;
    for (int i = 0; i < 16; ++i) {
        registers.general[i] = static_cast<uint64_t>(context.uc_mcontext.gregs[order[i]]);
    }
    registers.ip = static_cast<uint64_t>(context.uc_mcontext.gregs[REG_RIP]);
    return registers;
}

[[noreturn]] void stop(const Instruction& i, uint64_t ip, const char* fault) {
    std::fprintf(stderr, "amx_emulator: %s at %#llx (c = tmm%d, a = tmm%d, b = tmm%d): %s\n", name_of(i.op),
                 static_cast<unsigned long long>(ip), i.c, i.a, i.b, fault);
    if (tiles.palette) {
        for (int t = 0; t < kTiles; ++t) {
            std::fprintf(stderr, "  tmm%d: %d rows of %d bytes\n", t, tiles.rows[t], tiles.row_bytes[t]);
        }
    }
    std::abort();
}

const char* execute(const Instruction& i) {
    uint8_t* memory = reinterpret_cast<uint8_t*>(i.address);
    switch (i.op) {
        case Op::kLdtilecfg:
            return load_config(tiles, memory);
        case Op::kSttilecfg:
            store_config(tiles, memory);
            return nullptr;
        case Op::kTilerelease:
            release(tiles);
            return nullptr;
        case Op::kTilezero:
            return zero(tiles, i.c);
        case Op::kTileloadd:
        case Op::kTileloaddt1:  // a hint about caches, the same otherwise
            return load(tiles, i.c, memory, i.stride);
        case Op::kTilestored: {
            const char* fault = store(tiles, i.c, memory, i.stride);
            if (!fault) tiles.start_row = 0;
            return fault;
        }
        case Op::kTdpbf16ps:
            return dot_bf16(tiles, i.c, i.a, i.b);
        case Op::kTdpbssd:
            return dot_int8(tiles, i.c, i.a, i.b, true, true);
        case Op::kTdpbsud:
            return dot_int8(tiles, i.c, i.a, i.b, true, false);
        case Op::kTdpbusd:
            return dot_int8(tiles, i.c, i.a, i.b, false, true);
        case Op::kTdpbuud:
            return dot_int8(tiles, i.c, i.a, i.b, false, false);
    }
    return "not emulated";
}

void pass_on(int signal, siginfo_t* info, void* context) {
    const bool with_info = programs_action.sa_flags & SA_SIGINFO;
    const auto handler = programs_action.sa_handler;
    if (!with_info && (handler == SIG_DFL || handler == SIG_IGN)) {
        struct sigaction none = {};  // the instruction runs again and ends the program, core dump included
        none.sa_handler = SIG_DFL;
        real_sigaction()(SIGILL, &none, nullptr);
    } else if (with_info) {
        programs_action.sa_sigaction(signal, info, context);
    } else {
        handler(signal);
    }
}

void on_illegal_instruction(int signal, siginfo_t* info, void* untyped) {
    ucontext_t& context = *static_cast<ucontext_t*>(untyped);
    const bool was_configured = tiles.palette != 0;
    int count = 0;
    Instruction instruction;
    const char* fault = nullptr;
    // A signal takes microseconds, so instructions that follow one another share it.
    for (Registers registers = registers_of(context); decode(registers, instruction, fault); ++count) {
        if (!fault) fault = execute(instruction);
        if (fault) stop(instruction, registers.ip, fault);
        registers.ip += static_cast<uint64_t>(instruction.length);
        context.uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(registers.ip);
    }
    if (count == 0) {
        pass_on(signal, info, untyped);
        return;
    }
    executed.fetch_add(count, std::memory_order_relaxed);
    const bool is_configured = tiles.palette != 0;
    if (was_configured != is_configured) configured_threads.fetch_add(is_configured ? 1 : -1);
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // an illegal instruction in a handler of the program works too
    real_sigaction()(SIGILL, &action, &programs_action);
}

}  // namespace
}  // namespace amx_emulator

// Threads whose tiles are configured now, and instructions carried out so far in all threads.
AMX_EMULATOR_EXPORT int amx_emulator_configured_threads() { return amx_emulator::configured_threads.load(); }
AMX_EMULATOR_EXPORT int64_t amx_emulator_executed() { return amx_emulator::executed.load(); }

// The program's own wishes about SIGILL (Python's faulthandler has one) are kept and not installed.
AMX_EMULATOR_EXPORT int sigaction(int signal, const struct sigaction* action, struct sigaction* old) noexcept {
    if (signal != SIGILL) return amx_emulator::real_sigaction()(signal, action, old);
    const struct sigaction before = amx_emulator::programs_action;
    if (action) amx_emulator::programs_action = *action;
    if (old) *old = before;
    return 0;
}

AMX_EMULATOR_EXPORT sighandler_t signal(int number, sighandler_t handler) noexcept {
    struct sigaction action = {}, old = {};
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    return sigaction(number, &action, &old) == 0 ? old.sa_handler : SIG_ERR;
}
