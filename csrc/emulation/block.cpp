// Runs blocks: threads as fibers with stacks of their own, barriers, the order in which threads and blocks run.
#include "emulation/block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "emulation/memory.h"
#include "emulation/sites.h"

// emulation_switch(&save, load): pushes the callee-saved registers, stores the stack pointer in save, continues at
// load.
#if defined(__x86_64__)
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
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
.size emulation_switch, .-emulation_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, %function
emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulation_switch, .-emulation_switch
)");
#else
#error "the emulator's context switch is written for x86-64 and aarch64"
#endif
extern "C" void emulation_switch(void** save, void* load);

namespace emulation {

Block block;
unsigned char* stacks;

namespace {

std::mutex one_launch;
void* launcher_stack_pointer;
std::string failure;
std::mutex host_failure_lock;
std::string host_failure;
void (*body)(void*);
void* body_context;

unsigned stacks_ready;

// The mapping is made once; pages that no fiber touches cost nothing.
void prepare_stacks(unsigned count) {
  if (!stacks) {
    void* mapped =
        mmap(nullptr, kStackStride * kMostThreads, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("no address space for the stacks of an emulated block");
    stacks = static_cast<unsigned char*>(mapped);
  }
  for (; stacks_ready < count; ++stacks_ready) {
    if (mprotect(stacks + stacks_ready * kStackStride + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE)) {
      throw std::runtime_error("no memory for the stacks of an emulated block");
    }
  }
}

void switch_to(unsigned thread) {
  void** save = &current_thread().stack_pointer;
  block.current = thread;
  memory_switch();
  emulation_switch(save, block.threads[thread].stack_pointer);
}

// The next thread that can run: of this warp if any, else of the next warp that has one. -1 when all wait or are done.
int next_ready() {
  const unsigned first = block.current / kLanes;
  for (unsigned i = 0, w = first; i < block.warp_count; ++i) {
    if (block.warps[w].ready) return static_cast<int>(w * kLanes) + __builtin_ctz(block.warps[w].ready);
    if (++w == block.warp_count) w = 0;
  }
  return -1;
}

void set_waiting(unsigned thread, unsigned Warp::* set) {
  Warp& warp = block.warps[thread / kLanes];
  warp.ready &= ~(1u << thread % kLanes);
  warp.*set |= 1u << thread % kLanes;
}

void fiber_main() {
  body(body_context);
  set_waiting(block.current, &Warp::done);
  yield();
  __builtin_unreachable();
}

void start_thread(unsigned thread) {
  // The tops are spread over the sets of the first-level cache: at equal offsets in a page all would share a few.
  unsigned char* top = stacks + (thread + 1) * kStackStride - thread % 32 * 128;
#if defined(__x86_64__)
  void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and no return address
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&fiber_main);
#else
  void** frame = reinterpret_cast<void**>(top) - 20;
  std::memset(frame, 0, 20 * sizeof(void*));
  frame[11] = reinterpret_cast<void*>(&fiber_main);  // x30
#endif
  Thread& state = block.threads[thread];
  state.stack_pointer = frame;
  state.index = {thread % block.size.x, thread / block.size.x % block.size.y, thread / (block.size.x * block.size.y)};
  state.waits_for = nullptr;
  state.copies.clear();
  state.group_ends.clear();
  state.waited_for_launch = false;
}

// Why no thread can run: the threads of each kind of waiting, one example each.
std::string deadlock() {
  bool at_mbarrier = false;
  for (unsigned w = 0; w < block.warp_count; ++w) at_mbarrier = at_mbarrier || block.warps[w].at_mbarrier;
  std::string text = at_mbarrier ? "deadlock: no thread can go on" : "divergence: no thread can go on";
  for (unsigned Warp::* set : {&Warp::at_barrier, &Warp::at_mbarrier, &Warp::in_collective, &Warp::done}) {
    unsigned count = 0, example = 0;
    for (unsigned t = 0; t < block.thread_count; ++t) {
      if (!(block.warps[t / kLanes].*set >> t % kLanes & 1u)) continue;
      if (count++ == 0) example = t;
    }
    if (count == 0) continue;
    const Thread& thread = block.threads[example];
    text +=
        "; " + std::to_string(count) + (count == 1 ? " thread (" : " threads (first: ") + thread_name(example) + ") ";
    if (set == &Warp::done) {
      text += "ended";
    } else {
      text += std::string("in ") + thread.waits_for + " at " + describe_site(thread.site);
      if (set == &Warp::in_collective) {
        char mask[16];
        snprintf(mask, sizeof(mask), "%08x", thread.mask);
        text += std::string(" for lanes ") + mask;
      }
      if (set == &Warp::at_mbarrier) text += describe_waits(example);
    }
  }
  return text;
}

void run_block() {
  const unsigned warps = block.warp_count;
  for (unsigned w = 0; w < warps; ++w) {
    const unsigned lanes = std::min(kLanes, block.thread_count - w * kLanes);
    Warp& warp = block.warps[w];
    warp.lanes = warp.ready = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warp.in_collective = warp.at_barrier = warp.at_mbarrier = warp.done = warp.order = 0;
  }
  for (unsigned t = 0; t < block.thread_count; ++t) start_thread(t);
  block.at_barrier = 0;
  block.barrier_votes = 0;
  memory_begin_block();
  mbarrier_begin_block();
  wgmma_begin_block();
  // A shuffled order starts with another warp, which shows results that depend on who comes first.
  const unsigned seed = options().seed;
  block.current = seed ? (seed * 2654435761u + block.index.x * 40503u) % warps * kLanes : 0;
  memory_switch();
  block.running = true;
  emulation_switch(&launcher_stack_pointer, current_thread().stack_pointer);
  block.running = false;
  if (!failure.empty()) return;
  for (unsigned w = 0; w < warps; ++w) count_flush(w);
  for (unsigned w = 0; w < warps; ++w) {
    if (block.warps[w].done != block.warps[w].lanes) {
      failure = deadlock();
      return;
    }
  }
  failure = mbarrier_end_block();
  if (failure.empty()) failure = wgmma_end_block();
}

std::string where_failed() {
  const auto triple = [](uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  return " [kernel " + describe_code(static_cast<const char*>(block.kernel) + 1) + ", block " + triple(block.index) +
         " of " + triple(block.grid) + ", " + std::to_string(block.thread_count) + " threads]";
}

}  // namespace

uint3 thread_index() { return current_thread().index; }
uint3 block_index() { return block.index; }
uint3 block_size() { return block.size; }
uint3 grid_size() { return block.grid; }

void yield() {
  const int next = next_ready();
  if (next >= 0) {
    switch_to(static_cast<unsigned>(next));
  } else {
    emulation_switch(&current_thread().stack_pointer, launcher_stack_pointer);
  }
}

void fail(const std::string& message) {
  if (!block.running) throw std::runtime_error(message);
  failure = message;
  emulation_switch(&current_thread().stack_pointer, launcher_stack_pointer);
  __builtin_unreachable();
}

void fail_undefined(const std::string& message) {
  if (on_stack(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)))) {
    fail(message + ", " + thread_name(block.current));
  }
  const std::lock_guard<std::mutex> lock(host_failure_lock);
  host_failure = message + ", in host code";
}

std::string thread_name(unsigned thread) {
  const uint3 index = block.threads[thread].index;
  if (block.size.y == 1 && block.size.z == 1) return "thread " + std::to_string(index.x);
  return "thread (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

int sync_threads(Votes votes, int predicate, Site site) {
  static const char* const kNames[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  Thread& thread = current_thread();
  thread.waits_for = kNames[static_cast<int>(votes)];
  thread.site = site;
  block.barrier_votes += predicate != 0;
  set_waiting(block.current, &Warp::at_barrier);
  if (++block.at_barrier < block.thread_count) {
    yield();
  } else {
    for (unsigned t = 0; t < block.thread_count; ++t) {
      const Thread& other = block.threads[t];
      if (other.site.line == site.line && (other.site.file == site.file || !std::strcmp(other.site.file, site.file))) {
        continue;
      }
      fail("divergence: " + thread_name(t) + " waits in " + other.waits_for + " at " + describe_site(other.site) +
           ", " + thread_name(block.current) + " in " + thread.waits_for + " at " + describe_site(site));
    }
    for (unsigned w = 0; w < block.warp_count; ++w) {
      count_flush(w);
      block.warps[w].at_barrier = 0;
      block.warps[w].ready = block.warps[w].lanes;
      block.warps[w].order = 0;
    }
    block.at_barrier = 0;
    block.barrier_result = block.barrier_votes;
    block.barrier_votes = 0;
    memory_interval();
    memory_switch();
  }
  if (votes == Votes::kCount) return block.barrier_result;
  return votes == Votes::kAll ? block.barrier_result == static_cast<int>(block.thread_count)
                              : block.barrier_result != 0;
}

void grid_dependency_wait() { current_thread().waited_for_launch = block.waited = true; }

void launch_body(void (*kernel_body)(void*), void* context, const void* kernel, size_t context_bytes,
                 const LaunchBounds& bounds) {
  const dim3 grid = bounds.grid, size = bounds.block;
  {
    const std::lock_guard<std::mutex> host_lock(host_failure_lock);
    const std::string found = std::exchange(host_failure, "");
    if (!found.empty()) throw std::runtime_error(found);
  }
  const std::lock_guard<std::mutex> lock(one_launch);
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (threads == 0 || threads > kMostThreads || size.z > 64) {
    throw std::runtime_error("launch: a block of " + std::to_string(threads) + " threads; 1 to 1024 are possible");
  }
  if (uint64_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("launch: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                             std::to_string(grid.z) +
                             " blocks; 1 to 2^31 - 1 in x, 1 to 65535 in y and z are possible");
  }
  prepare_stacks(static_cast<unsigned>(threads));
  body = kernel_body;
  body_context = context;
  failure.clear();
  block.kernel = kernel;
  block.dependent = bounds.dependent;
  block.waited = false;
  block.size = {size.x, size.y, size.z};
  block.grid = {grid.x, grid.y, grid.z};
  block.thread_count = static_cast<unsigned>(threads);
  block.warp_count = (block.thread_count + kLanes - 1) / kLanes;
  memory_begin_launch(context, context_bytes, bounds.dynamic_shared);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint32_t> order;
  if (options().seed) {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), std::mt19937(options().seed));
  }
  for (uint64_t i = 0; i < blocks && failure.empty(); ++i) {
    const uint64_t b = order.empty() ? i : order[i];
    block.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / (uint64_t(grid.x) * grid.y))};
    run_block();
  }
  memory_end_launch();
  if (failure.empty() && options().checks && block.dependent && !block.waited) {
    failure =
        "too early: no thread of a dependent launch called grid_dependency_wait(), so that what comes next "
        "cannot tell whether the launch before has ended";
  }
  if (!failure.empty()) throw std::runtime_error(failure + where_failed());
}

}  // namespace emulation
