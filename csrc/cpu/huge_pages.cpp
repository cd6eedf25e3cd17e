// The regions behind huge_pages.h.
#include "huge_pages.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <memory>
#include <mutex>
#include <vector>

namespace lutgemm {

// The address sanitizer guards what comes from the heap: there every weight has a block of its own.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
namespace {

constexpr int64_t kPage = int64_t(2) << 20;
constexpr int64_t kRegionBytes = 32 * kPage;  // of addresses; memory comes with the first use of a page
constexpr int64_t kLine = 64;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Blocks from the bottom up; addresses are not used again before the region is empty, pages are given back at once.
struct Region {
  explicit Region(int64_t bytes) : bytes(bytes), users(size_t(bytes / kPage)) {}

  uint8_t* base = nullptr;
  int64_t bytes, used = 0, blocks = 0;
  std::vector<int32_t> users;  // blocks in each page
};

// In the line before each block.
struct Block {
  Region* region;
  int64_t bytes;  // with this line
};
static_assert(sizeof(Block) <= kLine, "a block starts on a line of its own");

std::mutex the_mutex;
Region* filling = nullptr;  // the region that the next block comes from

void register_fork_handlers() {
  static std::once_flag once;
  std::call_once(
      once, [] { pthread_atfork([] { the_mutex.lock(); }, [] { the_mutex.unlock(); }, [] { the_mutex.unlock(); }); });
}

Region* new_region(int64_t bytes) {
  auto region = std::make_unique<Region>(bytes);
  const size_t mapped = size_t(bytes + kPage);  // a border of 2 MiB is somewhere in the first page
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  auto* first = static_cast<uint8_t*>(start);
  region->base = first + (kPage - int64_t(reinterpret_cast<uintptr_t>(first) % kPage)) % kPage;
  if (region->base > first) munmap(first, size_t(region->base - first));
  uint8_t* end = region->base + bytes;
  if (first + mapped > end) munmap(end, size_t(first + mapped - end));
  madvise(region->base, size_t(bytes), MADV_HUGEPAGE);
  return region.release();
}

void delete_region(Region* region) {
  munmap(region->base, size_t(region->bytes));
  delete region;
}

// f(page) for the pages of `region` that [begin, end) touches.
template <class F>
void for_pages(int64_t begin, int64_t end, const F& f) {
  for (int64_t page = begin / kPage; page * kPage < end; ++page) f(page);
}

}  // namespace

bool wants_huge_pages(int64_t bytes) { return bytes >= 32 << 10; }

void* allocate_huge(int64_t bytes) {
  register_fork_handlers();
  const int64_t whole = kLine + round_up(bytes, kLine);
  const std::lock_guard<std::mutex> lock(the_mutex);
  Region* region = filling;
  if (region == nullptr || region->bytes - region->used < whole) {
    const bool large = whole > kRegionBytes;  // has a region to itself
    region = new_region(large ? round_up(whole, kPage) : kRegionBytes);
    if (region == nullptr) return nullptr;
    if (!large) {
      if (filling != nullptr && filling->blocks == 0) delete_region(filling);
      filling = region;
    }
  }
  uint8_t* start = region->base + region->used;
  for_pages(region->used, region->used + whole, [&](int64_t page) { ++region->users[size_t(page)]; });
  region->used += whole;
  ++region->blocks;
  *reinterpret_cast<Block*>(start) = {region, whole};
  return start + kLine;
}

void free_huge(void* data) {
  uint8_t* start = static_cast<uint8_t*>(data) - kLine;
  const Block block = *reinterpret_cast<const Block*>(start);
  Region* region = block.region;
  const int64_t begin = start - region->base;
  const std::lock_guard<std::mutex> lock(the_mutex);
  for_pages(begin, begin + block.bytes, [&](int64_t page) {
    if (--region->users[size_t(page)] == 0) madvise(region->base + page * kPage, size_t(kPage), MADV_DONTNEED);
  });
  if (--region->blocks > 0) return;
  if (region == filling) {
    region->used = 0;
  } else {
    delete_region(region);
  }
}

#else

bool wants_huge_pages(int64_t) { return false; }
void* allocate_huge(int64_t) { return nullptr; }
void free_huge(void*) {}

#endif

}  // namespace lutgemm
