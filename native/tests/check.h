// Checks that report and go on; `main` returns report(). No framework.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

namespace check {

inline int failures = 0;

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  }
}

inline int report(const char* program) {
  std::printf("%s: %d failed\n", program, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace check

// CHECK(condition, "what" << values): streamed only when it fails.
#define CHECK(condition, message)                                  \
  do {                                                             \
    if (!(condition)) {                                            \
      std::ostringstream check_stream;                             \
      check_stream << #condition << " does not hold: " << message; \
      check::fail(__FILE__, __LINE__, check_stream.str());         \
    }                                                              \
  } while (false)

// CHECK_THROWS(expression, "part of the message")
#define CHECK_THROWS(expression, part)                                                                     \
  do {                                                                                                     \
    std::string check_message = "nothing was thrown";                                                      \
    try {                                                                                                  \
      (void)(expression);                                                                                  \
    } catch (const std::invalid_argument& error) {                                                         \
      check_message = error.what();                                                                        \
    }                                                                                                      \
    CHECK(check_message.find(part) != std::string::npos, "'" << part << "' in '" << check_message << "'"); \
  } while (false)
