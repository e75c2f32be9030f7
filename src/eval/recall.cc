// Loss of what stands in the context already, by how far back it stands.
#include <algorithm>
#include <cmath>
#include <random>

#include "eval/contender.h"
#include "eval/windows.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kChunk = 512;
constexpr size_t kLength = kRecallCue + kRecallScored;
constexpr double kNearest = 2 * static_cast<double>(kPageTokens);  // beyond what is not sealed, about

struct Quoted {
  size_t start;  // in the window
  size_t bin;
};

// Octaves of distance, and the last up to the whole context.
std::vector<RecallBin> make_bins(double farthest) {
  std::vector<RecallBin> bins;
  for (double from = kNearest; from < farthest; from *= 2) {
    bins.emplace_back();
    bins.back().from = static_cast<int64_t>(from);
    bins.back().to = static_cast<int64_t>(std::min(2 * from, farthest + 1));
  }
  return bins;
}

double negative_log_likelihood(std::span<const float> logits, Token token) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x - top));
  return std::log(sum) + static_cast<double>(top - logits[static_cast<size_t>(token)]);
}

// Of the scored tokens of a snippet fed behind what the row holds, mean. Chunks end where pages do, so that what is stored and
// seen is what decoding would.
double quoted_loss(Contender& row, std::span<const Token> snippet, int64_t at, size_t vocab) {
  double nll = 0;
  for (size_t i = 0; i < snippet.size();) {
    const auto end = static_cast<size_t>(row.chunk_end(at + static_cast<int64_t>(i)) - at);
    const size_t n = std::min(snippet.size(), end) - i;
    const auto logits = row.feed(snippet.subspan(i, n), true);
    for (size_t t = i; t < i + n; ++t) {
      if (t + 1 < kRecallCue || t + 1 == snippet.size()) continue;
      nll += negative_log_likelihood(logits.subspan((t - i) * vocab, vocab), snippet[t + 1]);
    }
    i += n;
  }
  return nll / kRecallScored;
}

}  // namespace

std::vector<RecallRow> evaluate_recall(std::shared_ptr<const Model> model, const std::string& text,
                                       std::span<const EvalSubject> subjects, const RecallOptions& options,
                                       const Progress& progress) {
  const int64_t most = model->shape().context_tokens;
  if (options.context > most || options.context < 512 || options.snippets < 1) {
    throw Error(Status::kInvalidArgument, "quoting " + std::to_string(options.snippets) + " snippets in a context of " +
                                              std::to_string(options.context) + " tokens; this model takes 512 to " +
                                              std::to_string(most) + ", and at least 1 snippet");
  }
  const auto windows = text_windows(*model, text, options.context, options.windows);
  const auto vocab = static_cast<size_t>(model->vocab_size());
  const size_t body = static_cast<size_t>(options.context) - kLength;
  const auto farthest = static_cast<double>(body - 1);
  const std::vector<RecallBin> bins = make_bins(farthest);
  std::mt19937_64 random(options.seed * 1000003 + static_cast<uint64_t>(options.context));
  std::vector<std::vector<Quoted>> quoted(windows.size());
  for (auto& list : quoted) {
    for (int s = 0; s < options.snippets; ++s) {
      const double u = static_cast<double>(random() >> 11) * 0x1p-53;
      const double distance = kNearest * std::pow(farthest / kNearest, u);
      const auto bin = static_cast<size_t>(std::log2(distance / kNearest));
      list.push_back({body - static_cast<size_t>(distance), std::min(bin, bins.size() - 1)});
    }
  }
  std::vector<EvalSubject> all{{"f16", f16_plan(model->shape()), ""}};
  all.insert(all.end(), subjects.begin(), subjects.end());
  const double each = static_cast<double>(body) + static_cast<double>(kLength) * options.snippets;
  const double total = each * static_cast<double>(windows.size() * all.size());
  double done = 0;
  const auto report = [&](size_t n, const std::string& name) {
    done += static_cast<double>(n);
    if (progress && !progress(done, total, name + ", quoting back")) throw Error(Status::kCancelled, "stopped during recall");
  };
  std::vector<RecallRow> rows;
  for (const EvalSubject& subject : all) {
    RecallRow result;
    result.name = subject.name;
    result.bins = bins;
    std::vector<double> squares(bins.size());
    ContenderOptions contender;
    contender.context = options.context;
    contender.threads = options.threads;
    contender.device = options.device;
    contender.kernel = options.kernel;
    contender.exact = options.exact;
    contender.force_plan = options.force_plan;
    try {
      const auto row = make_contender(model, subject, contender);
      for (size_t w = 0; w < windows.size(); ++w) {
        const std::span<const Token> window(windows[w]);
        row->clear();
        row->set_prompt(static_cast<int64_t>(body));
        for (size_t i = 0; i < body; i += kChunk) {
          const size_t n = std::min(kChunk, body - i);
          row->feed(window.subspan(i, n), false);
          report(n, subject.name);
        }
        row->mark();
        for (const Quoted& q : quoted[w]) {
          row->rewind();
          const double nll = quoted_loss(*row, window.subspan(q.start, kLength), static_cast<int64_t>(body), vocab);
          if (!std::isfinite(nll))
            throw Error(Status::kInternal, subject.name + ": its logits behind window " + std::to_string(w) +
                                               " are not finite; leave this row out");
          ++result.bins[q.bin].snippets;
          result.bins[q.bin].nll += nll;
          squares[q.bin] += nll * nll;
          result.nll += nll / static_cast<double>(windows.size() * quoted[w].size());
          report(kLength, subject.name);
        }
      }
    } catch (const Error& e) {
      if (subject.plan || e.status() == Status::kCancelled) throw;
      result.lost = e.what();
    }
    for (size_t b = 0; b < bins.size(); ++b) {
      RecallBin& bin = result.bins[b];
      const double n = bin.snippets;
      if (n == 0) continue;
      bin.nll /= n;
      if (n > 1) bin.error = std::sqrt(std::max(0.0, squares[b] / n - bin.nll * bin.nll) / (n - 1));
    }
    std::erase_if(result.bins, [](const RecallBin& bin) { return bin.snippets == 0; });
    rows.push_back(std::move(result));
    if (options.on_row) options.on_row(rows.back());
  }
  return rows;
}

}  // namespace kvmix
