#include <chrono>

#include "kvmix/engine.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// Length of the longest prefix of `text` that does not end inside a UTF-8 character.
size_t whole_characters(const std::string& text) {
  for (size_t back = 1; back <= 4 && back <= text.size(); ++back) {
    const auto c = static_cast<unsigned char>(text[text.size() - back]);
    if ((c & 0xc0) == 0x80) continue;  // continuation byte: look further back
    const size_t length = c < 0x80 ? 1 : c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;
    return length > back ? text.size() - back : text.size();
  }
  return text.size();
}

// Where a stop string starts in text, or how much of the end could still become one.
struct StopScan {
  size_t stop = std::string::npos;
  size_t held = 0;
};

StopScan scan_stops(const std::string& text, const std::vector<std::string>& stops) {
  StopScan scan;
  for (const std::string& stop : stops) {
    if (stop.empty()) continue;
    scan.stop = std::min(scan.stop, text.find(stop));
    for (size_t n = std::min(stop.size() - 1, text.size()); n > scan.held; --n) {
      if (text.compare(text.size() - n, n, stop, 0, n) == 0) scan.held = n;
    }
  }
  return scan;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

GenerateResult generate(Engine& engine, SequenceId sequence, std::span<const Token> prompt, const GenerateOptions& options,
                        const std::function<bool(std::string_view)>& on_text) {
  Sampler sampler(options.sampling);
  GenerateResult result;
  result.prompt_tokens = static_cast<int>(prompt.size());
  const auto start = std::chrono::steady_clock::now();
  std::span<const float> logits = engine.prefill(sequence, prompt);
  result.prefill_seconds = seconds_since(start);

  const auto decode_start = std::chrono::steady_clock::now();
  std::string pending;  // not handed out yet
  result.stop_reason = "length";
  const auto emit = [&](size_t n) {
    if (n == 0) return true;
    const std::string text = pending.substr(0, n);
    pending.erase(0, n);
    result.text += text;
    return !on_text || on_text(text);
  };
  while (result.new_tokens < options.max_tokens) {
    const Token token = sampler.sample(logits);
    if (engine.model().is_end(token)) {
      result.stop_reason = "end";
      break;
    }
    pending += engine.model().token_text(token);
    ++result.new_tokens;
    const StopScan scan = scan_stops(pending, options.stop);
    if (scan.stop != std::string::npos) {
      pending.resize(scan.stop);
      result.stop_reason = "stop";
      break;
    }
    if (!emit(whole_characters(pending.substr(0, pending.size() - scan.held)))) {
      result.stop_reason = "cancelled";
      pending.clear();
      break;
    }
    if (engine.cache().length(sequence) + 1 > engine.model().shape().context_tokens) {
      result.stop_reason = "context";
      break;
    }
    // The last token enters the cache as well, so that a next turn continues from it.
    const EngineItem item{sequence, {&token, 1}};
    logits = engine.step({&item, 1});
    result.cached.push_back(token);
  }
  emit(pending.size());
  result.decode_seconds = seconds_since(decode_start);
  return result;
}

}  // namespace kvmix
