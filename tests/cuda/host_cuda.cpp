// The fibers behind host_cuda.h.
#include "host_cuda.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host_cuda {
namespace {

// ----------------------------------------------------------------------------------------------------- changing stacks
constexpr size_t STACK_BYTES = 128 * 1024;
void fiber_main();

#ifdef __x86_64__
// ucontext asks the kernel for the signal mask at every change, which takes a hundred times as long.
extern "C" void var_fast_change_stack(void** left, void* entered);
asm(R"(
.pushsection .text
.hidden var_fast_change_stack
.type var_fast_change_stack, @function
var_fast_change_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.popsection
)");

struct Context {
    void* stack_pointer = nullptr;

    void start(unsigned char* stack) {
        void** const top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);  // a multiple of 16
        *top = reinterpret_cast<void*>(&fiber_main);                            // what `ret` goes to
        stack_pointer = top - 6;  // below it six registers, of any content
    }
    // Goes on here; what runs now goes on when `left` is entered.
    void enter(Context& left) { var_fast_change_stack(&left.stack_pointer, stack_pointer); }
};
#else
struct Context {
    ucontext_t context;

    void start(unsigned char* stack) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, &fiber_main, 0);
    }
    void enter(Context& left) { swapcontext(&left.context, &context); }
};
#endif

// ----------------------------------------------------------------------------------------------------------- one block
struct Meeting {
    unsigned mask, arrived = 0, times = 0;
    alignas(
        16) unsigned char brought[2][32][32];  // by turns: who comes again cannot overwrite what is still to be read
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    Context context;
    enum { running, at_barrier, at_grid_barrier, ended } state = running;
    unsigned index = 0;
    std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is not closed
};

struct Block {
    dim3 index;
    std::vector<Fiber> fibers;
    std::vector<std::vector<Meeting>> meetings;  // of each warp
    bool any_now = false, any_before = false;
    unsigned char* shared_end = nullptr;
};

std::vector<std::unique_ptr<unsigned char[]>> stacks;
Fiber* current;
Block* current_block;
Context scheduler;
const std::function<void()>* kernel_body;
uint64_t progress;  // grows whenever a fiber gets on
std::string problem;

void give_way() { scheduler.enter(current->context); }

void fiber_main() {
    (*kernel_body)();
    current->state = Fiber::ended;
    ++progress;
    give_way();
}

// Ends the launch from a fiber: it stays where it is, and the scheduler throws.
void fail(const std::string& what) {
    problem = what;
    give_way();
}

std::vector<unsigned> ordered(unsigned n) {
    std::vector<unsigned> all(n);
    std::iota(all.begin(), all.end(), 0u);
    if (order == 1) std::reverse(all.begin(), all.end());
    if (order > 1) std::shuffle(all.begin(), all.end(), std::mt19937(order));
    return all;
}

// Runs a block's fibers until each of them has ended or waits at a barrier.
void run_warps(const std::string& op, Block& block, const std::vector<unsigned>& warp_order,
               const std::vector<unsigned>& lane_order) {
    current_block = &block;
    blockIdx = block.index;
    for (unsigned warp : warp_order) {  // as far as it gets without the others
        for (bool moved = true; moved;) {
            moved = false;
            const uint64_t before = progress;
            for (unsigned lane : lane_order) {
                current = &block.fibers[warp * 32 + lane];
                if (current->state != Fiber::running) continue;
                moved = true;
                threadIdx.x = current->index;
                current->context.enter(scheduler);
                if (!problem.empty()) throw std::runtime_error(op + ": " + problem);
            }
            if (moved && progress == before)
                throw std::runtime_error(op + ": lanes wait for others that do not come");
        }
    }
}

size_t count(const Block& block, decltype(Fiber::state) state) {
    return std::count_if(block.fibers.begin(), block.fibers.end(),
                         [&](const Fiber& fiber) { return fiber.state == state; });
}

void release(Block& block, decltype(Fiber::state) from) {
    for (Fiber& fiber : block.fibers)
        if (fiber.state == from) fiber.state = Fiber::running;
}

// Blocks side by side, to their end.
void run_blocks(const std::string& op, std::vector<Block>& blocks, const std::vector<unsigned>& warp_order,
                const std::vector<unsigned>& lane_order) {
    size_t stack = 0;
    for (Block& block : blocks)
        for (size_t i = 0; i < block.fibers.size(); ++i) {
            block.fibers[i].index = static_cast<unsigned>(i);
            block.fibers[i].context.start(stacks[stack++].get());
        }
    problem.clear();
    while (true) {
        bool released = false;
        size_t ended = 0, waiting = 0;
        for (Block& block : blocks) {
            run_warps(op, block, warp_order, lane_order);
            if (count(block, Fiber::at_barrier) > 0) {
                release(block, Fiber::at_barrier);
                block.any_before = block.any_now;
                block.any_now = false;
                released = true;
            }
            ended += count(block, Fiber::ended);
            waiting += count(block, Fiber::at_grid_barrier);
        }
        if (ended == stack) return;
        if (released) continue;
        if (waiting != stack) throw std::runtime_error(op + ": blocks wait for others that have ended");
        for (Block& block : blocks) release(block, Fiber::at_grid_barrier);
    }
}

// `bytes` of memory that end, but for alignment, where a page begins that nothing may touch.
unsigned char* fenced(size_t bytes, size_t alignment) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page * page;
    void* const start = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    mprotect(static_cast<unsigned char*>(start) + pages, page, PROT_NONE);
    return static_cast<unsigned char*>(start) + (pages - bytes) / alignment * alignment;
}

constexpr int64_t MOST_SHARED = 227 * 1024;
std::vector<unsigned char*> shared_ends;  // one for each block that runs at a time
int64_t shared_bytes;

}  // namespace

void run(const std::string& op, const std::function<void()>& body, dim3 grid, int64_t threads, int64_t shared,
         bool cooperative) {
    if (threads < 1 || threads > 1024 || threads % 32 || grid.y > 65535 || grid.z > 65535 || shared > MOST_SHARED ||
        grid.x == 0 || grid.y == 0 || grid.z == 0)
        throw std::runtime_error(op + ": invalid launch");
    const unsigned total = grid.x * grid.y * grid.z, together = cooperative ? total : 1;
    while (shared_ends.size() < together) shared_ends.push_back(fenced(MOST_SHARED, 1) + MOST_SHARED);
    while (stacks.size() < static_cast<size_t>(threads) * together)
        stacks.push_back(std::make_unique<unsigned char[]>(STACK_BYTES));
    kernel_body = &body;
    shared_bytes = (shared + 15) / 16 * 16;
    blockDim = dim3(static_cast<unsigned>(threads));
    gridDim = grid;
    const auto warp_order = ordered(static_cast<unsigned>(threads / 32)), lane_order = ordered(32);
    const auto block_order = ordered(total);
    for (unsigned first = 0; first < total; first += together) {
        std::vector<Block> blocks(together);
        for (unsigned i = 0; i < together; ++i) {
            const unsigned number = block_order[first + i];
            blocks[i].index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
            blocks[i].fibers.resize(threads);
            blocks[i].meetings.resize(threads / 32);
            blocks[i].shared_end = shared_ends[i];
            std::memset(shared_ends[i] - shared_bytes, 0xff, shared_bytes);
        }
        run_blocks(op, blocks, warp_order, lane_order);
    }
}

bool barrier(bool any) {
    current_block->any_now = current_block->any_now || any;
    current->state = Fiber::at_barrier;
    ++progress;
    give_way();
    return current_block->any_before;
}

void grid_barrier() {
    current->state = Fiber::at_grid_barrier;
    ++progress;
    give_way();
}

void copy_later(void* to, const void* from) {
    if (current->groups.empty()) current->groups.emplace_back();
    current->groups.back().push_back({to, from});
}

void close_group() {
    if (current->groups.empty()) current->groups.emplace_back();
    current->groups.emplace_back();
}

void wait_groups(size_t open) {
    auto& groups = current->groups;
    while (groups.size() > open + 1) {
        for (const Copy& copy : groups.front())
            copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

const unsigned char* meet(unsigned mask, const void* brought, int bytes) {
    auto& of_warp = current_block->meetings[current->index / 32];
    const unsigned me = 1u << current->index % 32;
    if (!(mask & me)) fail("a lane outside its own mask");
    size_t at = 0;
    while (at < of_warp.size() && of_warp[at].mask != mask) ++at;
    if (at == of_warp.size()) {
        of_warp.reserve(64);  // addresses stay
        of_warp.push_back({mask});
    }
    Meeting& meeting = of_warp[at];
    const unsigned time = meeting.times;
    if (bytes > 0) std::memcpy(meeting.brought[time % 2][current->index % 32], brought, bytes);
    meeting.arrived |= me;
    ++progress;
    if (meeting.arrived == mask) {
        meeting.arrived = 0;
        ++meeting.times;
    }
    while (meeting.times == time) give_way();
    return meeting.brought[time % 2][0];
}

unsigned char* shared_memory() { return current_block->shared_end - shared_bytes; }

}  // namespace host_cuda

extern "C" void* host_cuda_fenced(int64_t bytes) { return host_cuda::fenced(static_cast<size_t>(bytes), 16); }
extern "C" void host_cuda_set_order(int order) { host_cuda::order = order; }
