// Argument checks. All C++ code of this package reports invalid arguments with MLS_CHECK: the value, then the
// rule.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace mls {

template <typename... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace mls

#define MLS_CHECK(condition, ...)                                              \
  do {                                                                         \
    if (!(condition)) throw std::runtime_error(mls::concatenate(__VA_ARGS__)); \
  } while (false)
