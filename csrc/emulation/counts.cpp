// Bank conflicts and memory sectors of each access site.
//
// Lanes run one after another, so an access of the warp has to be put together: the n-th access of each lane at one
// site since the lanes last were together (a collective or a barrier). Where lanes take different paths in between,
// that may pair accesses that hardware would not.
#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation/block.h"
#include "emulation/memory.h"
#include "emulation/sites.h"

namespace emulation {

namespace {

constexpr unsigned kBanks = 32, kBankBytes = 4, kSectorBytes = 32;

// One instruction: its code address, and what it does (a cp.async is two: a global read and a shared write).
struct Key {
  const void* where;
  bool shared, write;
  size_t bytes;
  bool operator<(const Key& b) const {
    return std::tie(where, shared, write, bytes) < std::tie(b.where, b.shared, b.write, b.bytes);
  }
};

struct Totals {
  uint64_t accesses = 0;  // of a warp
  uint64_t cost = 0;      // shared: wavefronts; global: sectors
  uint64_t ideal = 0;     // the least cost of such accesses
};

struct Record {
  Key key;
  uintptr_t address;
};

std::vector<Record> records[kMostThreads];
std::map<Key, Totals> totals;
std::string report;

// Shared memory serves 32 banks of 4 bytes in a wavefront, each one word, to any number of lanes. Accesses of 8 bytes
// go by half-warps, those of 16 by quarter-warps.
void add_shared(const std::vector<std::pair<unsigned, uintptr_t>>& lanes, size_t bytes, Totals& total) {
  const unsigned lanes_a_phase = bytes <= kBankBytes ? 32 : kLanes * kBankBytes / static_cast<unsigned>(bytes);
  for (unsigned first = 0; first < kLanes; first += lanes_a_phase) {
    std::set<uintptr_t> words;
    for (const auto& [lane, address] : lanes) {
      if (lane < first || lane >= first + lanes_a_phase) continue;
      for (uintptr_t word = address / kBankBytes; word * kBankBytes < address + bytes; ++word) words.insert(word);
    }
    if (words.empty()) continue;
    unsigned of_bank[kBanks] = {};
    for (const uintptr_t word : words) ++of_bank[word % kBanks];
    total.cost += *std::max_element(of_bank, of_bank + kBanks);
    total.ideal += 1;
  }
}

void add_global(const std::vector<std::pair<unsigned, uintptr_t>>& lanes, size_t bytes, Totals& total) {
  std::set<uintptr_t> sectors, places;
  for (const auto& [lane, address] : lanes) {
    places.insert(address);
    for (uintptr_t s = address / kSectorBytes; s * kSectorBytes < address + bytes; ++s) sectors.insert(s);
  }
  total.cost += sectors.size();
  total.ideal += (places.size() * bytes + kSectorBytes - 1) / kSectorBytes;
}

}  // namespace

void count_begin_launch() {
  for (auto& lane : records) lane.clear();  // of a launch that failed
}

void count_access(const Access& access, bool shared) {
  records[block.current].push_back({{access.where, shared, access.write, access.bytes}, access.address});
}

void count_flush(unsigned warp) {
  if (!options().counts) return;
  std::map<Key, std::vector<std::vector<std::pair<unsigned, uintptr_t>>>> sites;  // [n-th access][lane, address]
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    std::vector<Record>& own = records[warp * kLanes + lane];
    std::map<Key, size_t> seen;
    for (const Record& record : own) {
      auto& accesses = sites[record.key];
      const size_t n = seen[record.key]++;
      if (accesses.size() <= n) accesses.resize(n + 1);
      accesses[n].emplace_back(lane, record.address);
    }
    own.clear();
  }
  for (const auto& [key, accesses] : sites) {
    Totals& total = totals[key];
    total.accesses += accesses.size();
    for (const auto& lanes : accesses) {
      key.shared ? add_shared(lanes, key.bytes, total) : add_global(lanes, key.bytes, total);
    }
  }
}

}  // namespace emulation

// [{"file", "line", "function", "space": "shared"|"global", "write", "bytes": of a lane, "accesses": of a warp, "cost":
// wavefronts or sectors, "ideal": the least cost of such accesses}]; the sites of one line are added up.
extern "C" const char* emulation_report() {
  using namespace emulation;
  std::vector<const void*> addresses;
  for (const auto& entry : totals) addresses.push_back(entry.first.where);
  resolve_code(addresses);
  using Line = std::tuple<std::string, int, std::string, bool, bool, size_t>;
  std::map<Line, Totals> lines;
  for (const auto& [key, total] : totals) {
    const CodeLine& code = code_line(key.where);
    Totals& sum = lines[{code.file, code.line, code.function, key.shared, key.write, key.bytes}];
    sum.accesses += total.accesses;
    sum.cost += total.cost;
    sum.ideal += total.ideal;
  }
  std::ostringstream text;
  text << "[";
  for (const auto& [line, total] : lines) {
    const auto& [file, number, function, shared, write, bytes] = line;
    text << (text.tellp() > 1 ? ",\n" : "") << "{\"file\": \"" << file << "\", \"line\": " << number
         << ", \"function\": \"" << function << "\", \"space\": \"" << (shared ? "shared" : "global")
         << "\", \"write\": " << (write ? "true" : "false") << ", \"bytes\": " << bytes
         << ", \"accesses\": " << total.accesses << ", \"cost\": " << total.cost << ", \"ideal\": " << total.ideal
         << "}";
  }
  text << "]";
  report = text.str();
  return report.c_str();
}

extern "C" void emulation_reset_counts() { emulation::totals.clear(); }
