// Code addresses as source lines, for messages and counts.
#include "emulation/sites.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>

namespace emulation {

namespace {

std::map<const void*, CodeLine> known;

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// "lutgemm::(anonymous namespace)::gather(float*, int)" -> "lutgemm::gather"
std::string short_name(std::string function) {
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = function.find(unnamed)) != std::string::npos;) function.erase(at, unnamed.size());
  if (function.compare(0, 5, "void ") == 0) function.erase(0, 5);
  return function.substr(0, function.find('('));
}

// Reads addr2line's "function at file:line[ (discriminator n)]"; false for what it does not know.
bool parse(const std::string& text, CodeLine* result, bool* of_emulator) {
  const size_t at = text.rfind(" at ");
  if (at == std::string::npos) return false;
  const std::string place = text.substr(at + 4, text.find(" (discriminator") - at - 4);
  const size_t colon = place.rfind(':');
  if (colon == std::string::npos || place[0] == '?') return false;
  result->file = base_name(place.substr(0, colon));
  result->line = std::atoi(place.c_str() + colon + 1);
  result->function = short_name(text.substr(0, at));
  *of_emulator = place.find("/emulation/") != std::string::npos;
  return true;
}

// Asks addr2line (binutils) about all addresses of one file at once; what it cannot tell stays as file+offset.
void resolve(const std::string& file, const std::map<uintptr_t, const void*>& offsets) {
  char number[32];
  std::string command = "addr2line -Cfipa -e '" + file + "'";
  for (const auto& [offset, address] : offsets) {
    // A return address lies behind its call, maybe already in the next line.
    snprintf(number, sizeof(number), " 0x%zx", static_cast<size_t>(offset - 1));
    command += number;
    snprintf(number, sizeof(number), "+0x%zx", static_cast<size_t>(offset));
    known[address] = {base_name(file) + number, 0, ""};
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return;
  char line[4096];
  CodeLine* target = nullptr;
  bool settled = true;  // the innermost frame that is not of the emulator's own headers is the kernel's
  while (fgets(line, sizeof(line), pipe)) {
    std::string text = line;
    while (!text.empty() && text.back() == '\n') text.pop_back();
    if (text.compare(0, 2, "0x") == 0) {
      const auto found = offsets.find(std::stoull(text, nullptr, 16) + 1);
      target = found == offsets.end() ? nullptr : &known[found->second];
      settled = false;
      text = text.substr(text.find(": ") + 2);
    } else if (const size_t mark = text.find("(inlined by) "); mark != std::string::npos) {
      text = text.substr(mark + 13);
    }
    bool of_emulator = false;
    if (target && !settled && parse(text, target, &of_emulator)) settled = !of_emulator;
  }
  pclose(pipe);
}

}  // namespace

void resolve_code(const std::vector<const void*>& addresses) {
  std::map<std::string, std::map<uintptr_t, const void*>> files;
  for (const void* address : addresses) {
    Dl_info info{};
    if (known.count(address)) continue;
    if (!dladdr(address, &info) || !info.dli_fname) {
      known[address] = {"unknown code", 0, ""};
      continue;
    }
    const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
    files[info.dli_fname][offset] = address;
  }
  for (const auto& [file, offsets] : files) {
    const size_t most = 2000;  // addresses in one command line
    for (auto begin = offsets.begin(); begin != offsets.end();) {
      std::map<uintptr_t, const void*> part;
      for (; begin != offsets.end() && part.size() < most; ++begin) part.insert(*begin);
      resolve(file, part);
    }
  }
}

const CodeLine& code_line(const void* address) {
  resolve_code({address});
  return known[address];
}

std::string describe_code(const void* address) {
  const CodeLine& code = code_line(address);
  if (code.line == 0) return code.file;
  return code.file + ":" + std::to_string(code.line) + " (" + code.function + ")";
}

std::string describe_site(Site site) { return base_name(site.file) + ":" + std::to_string(site.line); }

}  // namespace emulation
