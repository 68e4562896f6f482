// The fibers behind host_cuda.h.
#include "host_cuda.h"

#include <sys/mman.h>
#include <unistd.h>

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

struct Fiber {
    Context context;
    enum { running, at_barrier, ended } state = running;
    unsigned index;
};

std::vector<std::unique_ptr<unsigned char[]>> stacks;
std::vector<Fiber> fibers;
std::vector<std::vector<Meeting>> meetings;  // of each warp
Fiber* current;
Context scheduler;
const std::function<void()>* kernel_body;
uint64_t progress;  // grows whenever a fiber gets on
bool any_now, any_before;
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

void run_block(const std::string& op, const std::vector<unsigned>& warp_order,
               const std::vector<unsigned>& lane_order) {
    for (size_t i = 0; i < fibers.size(); ++i) {
        fibers[i].state = Fiber::running;
        fibers[i].index = static_cast<unsigned>(i);
        fibers[i].context.start(stacks[i].get());
    }
    for (auto& of_warp : meetings) of_warp.clear();
    any_now = false;
    problem.clear();
    while (true) {
        size_t ended = 0;
        for (unsigned warp : warp_order) {  // as far as it gets without the others
            for (bool moved = true; moved;) {
                moved = false;
                const uint64_t before = progress;
                for (unsigned lane : lane_order) {
                    current = &fibers[warp * 32 + lane];
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
        for (const Fiber& fiber : fibers) ended += fiber.state == Fiber::ended;
        if (ended == fibers.size()) return;
        for (Fiber& fiber : fibers)
            if (fiber.state == Fiber::at_barrier) fiber.state = Fiber::running;
        any_before = any_now;
        any_now = false;
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
unsigned char* shared_end;
int64_t shared_bytes;

}  // namespace

void run(const std::string& op, const std::function<void()>& body, dim3 grid, int64_t threads, int64_t shared) {
    if (threads < 1 || threads > 1024 || threads % 32 || grid.y > 65535 || grid.z > 65535 || shared > MOST_SHARED ||
        grid.x == 0 || grid.y == 0 || grid.z == 0)
        throw std::runtime_error(op + ": invalid launch");
    if (shared_end == nullptr) shared_end = fenced(MOST_SHARED, 1) + MOST_SHARED;
    while (stacks.size() < static_cast<size_t>(threads))
        stacks.push_back(std::make_unique<unsigned char[]>(STACK_BYTES));
    fibers.resize(threads);
    meetings.resize(threads / 32);
    kernel_body = &body;
    shared_bytes = (shared + 15) / 16 * 16;
    blockDim = dim3(static_cast<unsigned>(threads));
    gridDim = grid;
    const auto warp_order = ordered(static_cast<unsigned>(threads / 32)), lane_order = ordered(32);
    for (unsigned block : ordered(grid.x * grid.y * grid.z)) {
        blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
        std::memset(shared_memory(), 0xff, shared_bytes);
        run_block(op, warp_order, lane_order);
    }
}

bool barrier(bool any) {
    any_now = any_now || any;
    current->state = Fiber::at_barrier;
    ++progress;
    give_way();
    return any_before;
}

const unsigned char* meet(unsigned mask, const void* brought, int bytes) {
    auto& of_warp = meetings[current->index / 32];
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

unsigned char* shared_memory() { return shared_end - shared_bytes; }

}  // namespace host_cuda

extern "C" void* host_cuda_fenced(int64_t bytes) { return host_cuda::fenced(static_cast<size_t>(bytes), 16); }
extern "C" void host_cuda_set_order(int order) { host_cuda::order = order; }
