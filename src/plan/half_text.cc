#include "plan/half_text.h"

#include <array>
#include <cmath>

#include "base/fp16.h"

namespace kvmix {
namespace {

constexpr float kLargestHalf = 65504.0f;
constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

}  // namespace

std::string half_text(const std::vector<float>& values) {
  std::string bytes;
  bytes.reserve(2 * values.size());
  for (const float v : values) {
    if (!(std::abs(v) <= kLargestHalf))
      throw Error(Status::kInvalidArgument,
                  "a transform's number is " + std::to_string(v) + ", which fp16 cannot hold; calibrate it again");
    const uint16_t h = f32_to_f16(v);
    bytes += static_cast<char>(h & 255);
    bytes += static_cast<char>(h >> 8);
  }
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const auto at = [&](size_t k) { return k < bytes.size() ? static_cast<unsigned>(static_cast<uint8_t>(bytes[k])) : 0u; };
    const unsigned word = at(i) << 16 | at(i + 1) << 8 | at(i + 2);
    for (size_t k = 0; k < 4; ++k) text += i + k <= bytes.size() ? kDigits[word >> (18 - 6 * k) & 63] : '=';
  }
  return text;
}

std::vector<float> read_half_text(JsonObject& object, const std::string& key, size_t most) {
  static const std::array<int, 256> kValues = [] {
    std::array<int, 256> values{};
    values.fill(-1);
    for (int i = 0; i < 64; ++i) values[static_cast<uint8_t>(kDigits[i])] = i;
    return values;
  }();
  std::string text = object.text(key, most * 8 / 3 + 4);
  const std::string expected = "expected base64 of little-endian fp16 numbers";
  if (text.size() % 4 != 0) object.fail(key, expected);
  while (!text.empty() && text.back() == '=') text.pop_back();
  std::string bytes;
  unsigned word = 0, bits = 0;
  for (const char c : text) {
    const int digit = kValues[static_cast<uint8_t>(c)];
    if (digit < 0) object.fail(key, expected);
    word = (word << 6 | static_cast<unsigned>(digit)) & 0xffffffu;
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      bytes += static_cast<char>(word >> bits & 255u);
    }
  }
  if (bytes.size() % 2 != 0) object.fail(key, expected);
  std::vector<float> values;
  for (size_t i = 0; i < bytes.size(); i += 2) {
    const unsigned h = static_cast<uint8_t>(bytes[i]) | static_cast<unsigned>(static_cast<uint8_t>(bytes[i + 1])) << 8;
    values.push_back(f16_to_f32(static_cast<uint16_t>(h)));
    if (!std::isfinite(values.back())) object.fail(key, "expected finite numbers");
  }
  return values;
}

}  // namespace kvmix
