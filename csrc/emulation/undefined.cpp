// What code compiled with -fsanitize=bounds,signed-integer-overflow,shift-exponent,integer-divide-by-zero calls where
// its behaviour is undefined, in place of the sanitizer's own. Arrays in registers are checked here alone: a fiber's
// stack is no business of memory.cpp.
#include <string>

#include "emulation/block.h"
#include "emulation/sites.h"

namespace {

// The first member of every handler's data.
struct Location {
  const char* file;
  uint32_t line, column;
};

void report(const void* data, const char* what) {
  const auto* location = static_cast<const Location*>(data);
  emulation::fail_undefined(std::string("undefined behaviour: ") + what + " at " +
                            emulation::describe_site({location->file, static_cast<int>(location->line)}));
}

}  // namespace

#define EMULATION_UNDEFINED(name, what, ...)                                                               \
  extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(void* data, ##__VA_ARGS__) { \
    report(data, what);                                                                                    \
  }
EMULATION_UNDEFINED(out_of_bounds, "an index outside of its array", void*)
EMULATION_UNDEFINED(add_overflow, "a signed sum overflows", void*, void*)
EMULATION_UNDEFINED(sub_overflow, "a signed difference overflows", void*, void*)
EMULATION_UNDEFINED(mul_overflow, "a signed product overflows", void*, void*)
EMULATION_UNDEFINED(negate_overflow, "a signed negation overflows", void*)
EMULATION_UNDEFINED(divrem_overflow, "a division by zero, or one that overflows", void*, void*)
EMULATION_UNDEFINED(shift_out_of_bounds, "a shift by a negative number, or by more than the width", void*, void*)
