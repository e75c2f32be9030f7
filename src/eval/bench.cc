// Speed of prefill and decode at depth, rows interleaved so that a busy machine treats them alike.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "eval/contender.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Anonymous resident memory of this process.
size_t resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/status", "r");
  if (file == nullptr) return 0;
  char line[256];
  size_t kib = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "RssAnon: %zu kB", &kib) == 1) break;
  }
  std::fclose(file);
  return kib * 1024;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.size() % 2 == 1 ? v[v.size() / 2] : 0.5 * (v[v.size() / 2 - 1] + v[v.size() / 2]);
}

constexpr const char* kParagraph =
    "The harbour master kept three notebooks. In the first he wrote down every ship that came in, with its colours and the "
    "hour "
    "of its arrival; in the second, the weather, which he disliked; and in the third, things that people had said to him on "
    "the "
    "quay and that he did not want to forget. Nobody was allowed to read the third one until the winter of the great frost. ";

}  // namespace

std::vector<BenchRow> bench(std::shared_ptr<const Model> model, std::span<const EvalSubject> subjects,
                            const BenchOptions& options, const Progress& progress) {
  std::vector<int64_t> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  if (depths.empty() || options.repetitions < 1 || options.decode_tokens < 1 || options.sequences < 1) {
    throw Error(Status::kInvalidArgument, "a benchmark needs depths, repetitions, tokens and sequences of at least 1");
  }
  const int64_t context = depths.back() + options.decode_tokens;
  if (context > model->shape().context_tokens) {
    throw Error(Status::kInvalidArgument, "depth " + std::to_string(depths.back()) + " and " +
                                              std::to_string(options.decode_tokens) +
                                              " decoded tokens exceed the model's context of " +
                                              std::to_string(model->shape().context_tokens) + "; take a smaller depth");
  }
  std::vector<Token> tokens;
  const std::vector<Token> paragraph = model->tokenize(kParagraph, false);
  while (static_cast<int64_t>(tokens.size()) < context + 1) tokens.insert(tokens.end(), paragraph.begin(), paragraph.end());
  const std::span<const Token> text(tokens);

  ContenderOptions contender;
  contender.context = (context + 255) / 256 * 256;
  contender.threads = options.threads;
  contender.sequences = options.sequences;
  contender.kernel = options.kernel;
  contender.force_plan = options.force_plan;
  std::vector<std::unique_ptr<Contender>> rows;
  std::vector<size_t> added(subjects.size());
  std::vector<std::string> lost(subjects.size());
  const auto or_lose = [&](size_t s, const auto& work) {
    try {
      work();
    } catch (const Error& e) {
      if (subjects[s].plan || e.status() == Status::kCancelled || e.status() == Status::kInvalidArgument) throw;
      rows[s].reset();
      lost[s] = e.what();
    }
  };
  for (size_t s = 0; s < subjects.size(); ++s) {
    const size_t before = resident_bytes();
    rows.emplace_back();
    or_lose(s, [&] { rows[s] = make_contender(model, subjects[s], contender); });
    added[s] = resident_bytes() - std::min(before, resident_bytes());
  }

  const double total =
      static_cast<double>(depths.back()) * static_cast<double>(subjects.size() * static_cast<size_t>(options.sequences)) +
      static_cast<double>(depths.size() * subjects.size() * static_cast<size_t>(options.repetitions * options.decode_tokens));
  double done = 0;
  const auto report = [&](double n, const std::string& name, int64_t at) {
    done += n;
    if (progress && !progress(done, total, name + " at " + std::to_string(at)))
      throw Error(Status::kCancelled, "stopped while benchmarking");
  };

  std::vector<BenchRow> out;
  std::vector<double> prefill_seconds(subjects.size(), 0.0);
  int64_t depth = 0;
  std::vector<Token> step(static_cast<size_t>(options.sequences));
  for (const int64_t target : depths) {
    for (size_t s = 0; s < subjects.size(); ++s) {
      if (target == depth || !rows[s]) continue;
      const size_t before = resident_bytes();
      size_t peak = before;
      const double start = now();
      or_lose(s, [&] {
        if (options.sequences > 1) {
          if (depth > 0) rows[s]->truncate(0);
          rows[s]->fill(text.first(static_cast<size_t>(target)));
          prefill_seconds[s] = now() - start;
          peak = std::max(peak, resident_bytes());
          report(static_cast<double>((target - depth) * options.sequences), subjects[s].name, target);
        } else {
          constexpr int64_t kChunk = 512;
          rows[s]->set_prompt(target);
          for (int64_t at = depth; at < target; at += kChunk) {
            const int64_t n = std::min(kChunk, target - at);
            const double chunk_start = now();
            rows[s]->feed(text.subspan(static_cast<size_t>(at), static_cast<size_t>(n)), false);
            prefill_seconds[s] += now() - chunk_start;
            peak = std::max(peak, resident_bytes());
            report(static_cast<double>(n), subjects[s].name, target);
          }
        }
      });
      added[s] += peak - before;
    }
    depth = target;
    std::vector<std::vector<double>> rates(subjects.size());
    // One unmeasured round lets every row build its graph and touch its memory.
    for (int repetition = -1; repetition < options.repetitions; ++repetition) {
      for (size_t s = 0; s < subjects.size(); ++s) {
        if (!rows[s]) continue;
        const int count = repetition < 0 ? std::min(2, options.decode_tokens) : options.decode_tokens;
        const double start = now();
        or_lose(s, [&] {
          for (int t = 0; t < count; ++t) {
            std::fill(step.begin(), step.end(), text[static_cast<size_t>(depth + t)]);
            rows[s]->decode(step);
          }
        });
        if (!rows[s]) continue;
        const double seconds = now() - start;
        rows[s]->truncate(depth);
        if (repetition < 0) continue;
        rates[s].push_back(count * options.sequences / seconds);
        report(count, subjects[s].name, depth);
      }
    }
    for (size_t s = 0; s < subjects.size(); ++s) {
      BenchRow row;
      row.name = subjects[s].name;
      row.depth = depth;
      row.lost = lost[s];
      if (!rows[s]) {
        if (options.on_row) options.on_row(row);
        out.push_back(row);
        continue;
      }
      row.decode_tokens_per_s = median(rates[s]);
      row.decode_min = *std::min_element(rates[s].begin(), rates[s].end());
      row.decode_max = *std::max_element(rates[s].begin(), rates[s].end());
      if (depth > 0) row.prefill_tokens_per_s = static_cast<double>(depth * options.sequences) / prefill_seconds[s];
      row.cache_bytes = rows[s]->cache_bytes(depth) * static_cast<size_t>(options.sequences);
      row.peak_rss_bytes = added[s];
      row.kernel = rows[s]->kernel();
      if (options.on_row) options.on_row(row);
      out.push_back(row);
    }
  }
  return out;
}

}  // namespace kvmix
