#include <string>

#include "emulation/control.h"

namespace emulation {

Options current_options;

// That a block of this architecture can have, in bytes.
size_t shared_limit() {
  switch (options().architecture) {
    case 80:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    default:
      return 227 * 1024;
  }
}

}  // namespace emulation

extern "C" bool emulation_set(const char* name, long value) {
  emulation::Options& options = emulation::options();
  const std::string key = name;
  if (key == "checks") {
    options.checks = value != 0;
  } else if (key == "races") {
    options.races = value != 0;
  } else if (key == "counts") {
    options.counts = value != 0;
  } else if (key == "seed") {
    options.seed = static_cast<unsigned>(value);
  } else if (key == "sm_count") {
    options.sm_count = static_cast<int>(value);
  } else if (key == "architecture") {
    options.architecture = static_cast<int>(value);
  } else {
    return false;
  }
  return true;
}
