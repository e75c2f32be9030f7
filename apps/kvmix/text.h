// Numbers and files as text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kvmix::app {

std::string human_bytes(double bytes);          // "12.3 MiB"
size_t parse_bytes(const std::string& text);    // "64MiB", "1.5G", "4096"; throws UsageError
std::string short_number(double value);         // "1.2k"
std::string clock_time(double seconds);         // "1:05"
std::string gauge(double share, int columns);   // "[####....]" with block characters
std::string bar(double share, int columns);     // blocks without a frame, eighths of a column
size_t display_width(const std::string& text);  // code points
std::string first_columns(const std::string& text, size_t columns);

// The whole file, or standard input for "-". Throws kNotFound, kIo, or kInvalidArgument for an empty or non-text file.
std::string read_text_file(const std::string& path);
// Throws kInvalidArgument naming `what` and the offset unless the text is UTF-8 without NUL bytes.
void check_utf8(const std::string& text, const std::string& what);
// Writes a temporary beside `path` and renames it over. Throws kIo.
void write_file_atomically(const std::string& path, const std::string& content);

}  // namespace kvmix::app
