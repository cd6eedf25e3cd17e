// Memory of prepared weights: parts of regions that the system backs by pages of 2 MiB where it grants them.
//
// A weight is read once per token, so in pages of 4 KiB each page costs a walk of the page tables: 1024 x 1024 of 2
// bits from DRAM took 14.8 us in place of 11.5 (Zen 4), 4096 x 4096 177 in place of 156. Weights lie end to end, small
// ones share a page, and so do the end of one and the start of the next; at most one page of a process is partly used
// for no other reason than that it is the last. A page goes back to the system when no weight lies in it any more.
#pragma once

#include <cstdint>

namespace lutgemm {

// Whether a block of `bytes` gains from it: smaller ones are few pages of any size.
bool wants_huge_pages(int64_t bytes);

// 64-byte aligned and uninitialised; null when the system grants none. From any thread.
void* allocate_huge(int64_t bytes);
void free_huge(void* data);

}  // namespace lutgemm
