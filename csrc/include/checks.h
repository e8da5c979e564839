// The only way in which C++ code of this package refuses its arguments: the value, then the rule that it
// breaks.
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
