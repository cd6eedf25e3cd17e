// Global memory of emulated kernels: the ranges a launch may access, and which block wrote what.
//
// Blocks run in any order, so no block may write what another block of the launch has written, nor read it. One 32-bit
// cell for each byte of a writable range names the block that wrote it, by a number that no other block of any launch
// has.
#include <link.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "emulation/block.h"
#include "emulation/memory.h"

namespace emulation {

namespace {

struct Range {
  uintptr_t begin, bytes;
  bool writable;
  bool constant;  // while the launch before this one runs
  std::string name;
  std::vector<uint32_t> writers;

  // Whether all of the access lies within.
  bool holds(const Access& access) const {
    return access.address - begin < bytes && access.bytes <= bytes - (access.address - begin);
  }
};

std::recursive_mutex users;   // one thread at a time has ranges of its own
std::vector<Range> allowed;   // later ones come first: an inner scope may name a part of an outer one's memory
std::vector<Range> readable;  // the kernel's parameters, and this shared object's own segments: tables of kernels
uint32_t this_block, first_block_of_launch;
Range* last_used;

int add_own_segments(dl_phdr_info* info, size_t, void*) {
  const auto self = reinterpret_cast<uintptr_t>(&add_own_segments);
  std::vector<Range> found(1);  // [0] is for the parameters
  bool own = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    found.push_back({begin, header.p_memsz, false, true, "", {}});
    own = own || self - begin < header.p_memsz;
  }
  if (own) readable = found;
  return own;
}

// The allowed range that holds all of an access, writable ones first; else none.
Range* find(const Access& access) {
  Range* found = nullptr;
  for (Range& range : allowed) {
    if (range.holds(access) && (!found || range.writable)) found = &range;
  }
  return found;
}

[[noreturn]] void fail_unknown(const Access& access) {
  const auto distance = [&](const Range& r) {
    return access.address < r.begin ? r.begin - access.address
                                    : access.address - std::min(access.address, r.begin + r.bytes);
  };
  const auto nearest = std::min_element(allowed.begin(), allowed.end(),
                                        [&](const Range& a, const Range& b) { return distance(a) < distance(b); });
  if (nearest == allowed.end()) fail_access("out of bounds", access, "no global memory was allowed to this launch");
  const bool before = access.address < nearest->begin;
  const uintptr_t offset = before ? nearest->begin - access.address : access.address - nearest->begin;
  fail_access("out of bounds", access,
              "the nearest memory is " + nearest->name + " of " + std::to_string(nearest->bytes) +
                  " bytes, and this is " + std::to_string(offset) + " bytes " + (before ? "before" : "from") +
                  " its start");
}

void check_blocks(Range& range, const Access& access) {
  const size_t offset = access.address - range.begin;
  for (size_t i = offset; i < offset + access.bytes; ++i) {
    uint32_t& writer = range.writers[i];
    if (writer >= first_block_of_launch && writer != this_block) {
      fail_access("race between blocks", access,
                  "byte " + std::to_string(i) + " of " + range.name + " was written by another block of this launch");
    }
    if (access.write) writer = this_block;
  }
}

}  // namespace

Allowed::Allowed() {
  users.lock();
  first_ = allowed.size();
}

Allowed::~Allowed() {
  allowed.erase(allowed.begin() + static_cast<std::ptrdiff_t>(first_), allowed.end());
  last_used = nullptr;
  users.unlock();
}

void Allowed::read(const void* address, size_t bytes, const char* name) {
  allowed.push_back({reinterpret_cast<uintptr_t>(address), bytes, false, true, name, {}});
  last_used = nullptr;
}

void Allowed::input(const void* address, size_t bytes, const char* name) {
  allowed.push_back({reinterpret_cast<uintptr_t>(address), bytes, false, false, name, {}});
  last_used = nullptr;
}

void Allowed::write(void* address, size_t bytes, const char* name) {
  allowed.push_back({reinterpret_cast<uintptr_t>(address), bytes, true, false, name, std::vector<uint32_t>(bytes)});
  last_used = nullptr;
}

void global_begin_launch(const void* parameters, size_t parameter_bytes) {
  if (readable.empty()) dl_iterate_phdr(&add_own_segments, nullptr);
  readable[0] = {reinterpret_cast<uintptr_t>(parameters), parameter_bytes, false, true, "", {}};
  first_block_of_launch = this_block + 1;
}

void global_begin_block() { ++this_block; }

void global_access(const Access& access) {
  if (!last_used || !last_used->holds(access) || (access.write && !last_used->writable)) {
    Range* found = find(access);
    if (!found) {
      const auto holds = [&](const Range& range) { return range.holds(access); };
      if (!access.write && std::any_of(readable.begin(), readable.end(), holds)) return;
      fail_unknown(access);
    }
    if (access.write && !found->writable) {
      const std::string byte = std::to_string(access.address - found->begin);
      fail_access("read-only", access, "byte " + byte + " of " + found->name + " must not be written");
    }
    last_used = found;
  }
  if (options().counts && !access.prefetch) count_access(access, false);
  if (block.dependent && !last_used->constant && !current_thread().waited_for_launch) {
    fail_access("too early", access,
                last_used->name + " may be in use by the launch before this one: grid_dependency_wait() comes first");
  }
  if (last_used->writable && !access.atomic) check_blocks(*last_used, access);
}

}  // namespace emulation
