#include "text.h"

#include <fmt/core.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "command.h"
#include "kvmix/error.h"

namespace kvmix::app {
namespace {

struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

// Length of the valid UTF-8 sequence at `p` (RFC 3629: no overlong forms, no surrogates), 0 if there is none.
size_t utf8_length(const unsigned char* p, size_t left) {
  const auto continues = [&](size_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
  if (p[0] < 0x80) return 1;
  if (p[0] >= 0xC2 && p[0] <= 0xDF) return continues(1) ? 2 : 0;
  if (p[0] >= 0xE0 && p[0] <= 0xEF) {
    if (!continues(1) || !continues(2)) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F)) return 0;
    return 3;
  }
  if (p[0] >= 0xF0 && p[0] <= 0xF4) {
    if (!continues(1) || !continues(2) || !continues(3)) return 0;
    if ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    return 4;
  }
  return 0;
}

}  // namespace

std::string human_bytes(double bytes) {
  constexpr std::array<const char*, 4> kUnits = {"B", "KiB", "MiB", "GiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.{}f} {}", bytes, bytes < 10 ? 2 : 1, kUnits[unit]);
}

size_t parse_bytes(const std::string& text) {
  size_t used = 0;
  double value = -1;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  std::string unit = text.substr(used);
  unit.erase(0, unit.find_first_not_of(' '));
  for (char& c : unit) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  double factor = 0;
  if (unit.empty() || unit == "b") factor = 1;
  if (unit == "k" || unit == "kib") factor = 1024.0;
  if (unit == "m" || unit == "mib") factor = 1024.0 * 1024;
  if (unit == "g" || unit == "gib") factor = 1024.0 * 1024 * 1024;
  if (unit == "kb") factor = 1e3;
  if (unit == "mb") factor = 1e6;
  if (unit == "gb") factor = 1e9;
  if (used == 0 || factor == 0 || !(value > 0) || value * factor > 1e15) {
    throw UsageError("'" + text + "' is not a size: write a number of bytes, or one with KiB, MiB or GiB, e.g. 64MiB");
  }
  return static_cast<size_t>(value * factor);
}

std::string short_number(double value) {
  if (value >= 1e6) return fmt::format("{:.1f}M", value / 1e6);
  if (value >= 1e4) return fmt::format("{:.1f}k", value / 1e3);
  return fmt::format("{:.{}f}", value, value < 10 ? 2 : 0);
}

std::string clock_time(double seconds) {
  const auto s = static_cast<int64_t>(std::clamp(std::ceil(seconds), 0.0, 359999.0));
  return s >= 3600 ? fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60) : fmt::format("{}:{:02}", s / 60, s % 60);
}

std::string bar(double share, int columns) {
  constexpr std::array<const char*, 8> kEighths = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = static_cast<int>(std::lround(std::clamp(share, 0.0, 1.0) * columns * 8));
  std::string text;
  for (int i = 0; i < eighths / 8; ++i) text += "█";
  return text + kEighths[static_cast<size_t>(eighths % 8)];
}

std::string gauge(double share, int columns) {
  const int full = static_cast<int>(std::lround(std::clamp(share, 0.0, 1.0) * columns));
  std::string text = "[";
  for (int i = 0; i < columns; ++i) text += i < full ? "█" : "·";
  return text + "]";
}

std::string first_columns(const std::string& text, size_t columns) {
  size_t end = 0;
  for (; end < text.size(); ++end) {
    if ((text[end] & 0xC0) != 0x80 && columns-- == 0) break;
  }
  return text.substr(0, end);
}

size_t display_width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

void check_utf8(const std::string& text, const std::string& what) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  for (size_t i = 0; i < text.size();) {
    const size_t n = utf8_length(bytes + i, text.size() - i);
    if (n == 0 || bytes[i] == 0) {
      throw Error(Status::kInvalidArgument,
                  fmt::format("{} is not UTF-8 text: byte 0x{:02x} at offset {}; convert it, e.g. with iconv -t utf-8", what,
                              bytes[i], i));
    }
    i += n;
  }
}

std::string read_text_file(const std::string& path) {
  const bool standard_input = path == "-";
  const std::string name = standard_input ? "standard input" : path;
  File opened;
  std::FILE* file = stdin;
  if (!standard_input) {
    struct stat info {};
    if (stat(path.c_str(), &info) != 0) throw Error(Status::kNotFound, name + ": " + std::strerror(errno) + "; check the path");
    if (S_ISDIR(info.st_mode)) throw Error(Status::kInvalidArgument, name + " is a directory; name a text file");
    opened.reset(std::fopen(path.c_str(), "rb"));
    file = opened.get();
    if (file == nullptr) throw Error(Status::kIo, name + ": " + std::strerror(errno) + "; check its permissions");
  }
  std::string text;
  std::array<char, 65536> block;
  while (const size_t n = std::fread(block.data(), 1, block.size(), file)) text.append(block.data(), n);
  if (std::ferror(file) != 0) throw Error(Status::kIo, name + ": " + std::strerror(errno) + " while reading");
  if (text.starts_with("\xef\xbb\xbf")) text.erase(0, 3);  // a mark of the encoding, not of the text
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw Error(Status::kInvalidArgument, name + " is empty; give it some text");
  }
  check_utf8(text, name);
  return text;
}

void write_file_atomically(const std::string& path, const std::string& content) {
  const std::string temporary = path + ".part" + std::to_string(getpid());
  const auto refuse = [&](const char* what) {
    const std::string reason = std::strerror(errno);
    std::remove(temporary.c_str());
    throw Error(Status::kIo, path + ": cannot " + what + ": " + reason + "; free space or name another place");
  };
  File file(std::fopen(temporary.c_str(), "wb"));
  if (!file) refuse("create");
  if (std::fwrite(content.data(), 1, content.size(), file.get()) != content.size()) refuse("write");
  if (std::fflush(file.get()) != 0 || fsync(fileno(file.get())) != 0) refuse("write");
  if (std::fclose(file.release()) != 0) refuse("write");
  if (std::rename(temporary.c_str(), path.c_str()) != 0) refuse("rename onto");
}

}  // namespace kvmix::app
