// Code addresses as source lines, for messages and counts.
#pragma once

#include <string>
#include <vector>

#include "emulation/runtime.h"

namespace emulation {

struct CodeLine {
  std::string file;  // without its folder; "library.so+0xoffset" when line is 0: no debug information or no addr2line
  int line;
  std::string function;  // the kernel or its helper, with template arguments
};

// Looks many addresses up at once, which takes little longer than one.
void resolve_code(const std::vector<const void*>& addresses);
const CodeLine& code_line(const void* address);
std::string describe_code(const void* address);  // "file:line (function)"
std::string describe_site(Site site);            // "file:line"

}  // namespace emulation
