#include <string>

#include "emulation/control.h"

namespace emulation {

Options current_options;

size_t shared_limit() { return options().architecture == 80 ? 163 * 1024 : 227 * 1024; }

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
