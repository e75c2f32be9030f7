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

// What the process, or the device, has taken.
size_t taken_bytes(const std::string& device) {
  if (device == "cpu") return resident_bytes();
  const DeviceSpace space = cuda_space();
  return space.total_bytes - space.free_bytes;
}

// Sequences of up to `tokens` tokens that a row can have in so much device memory.
int sequences_in(size_t memory, const Model& model, const EvalSubject& subject, int64_t tokens) {
  constexpr double kGiB = 1 << 30;
  // The driver's, work space and the graph of a chunk; of a token policy what scores prompts and moves rows, and page tables of
  // the many sequences that fewer tokens leave room for.
  const double rest = subject.plan && subject.plan->tokens ? 2.5 * kGiB : 1.5 * kGiB;
  const double logits = 2.0 * sizeof(float) * model.vocab_size();
  const double room = static_cast<double>(memory) - static_cast<double>(model.weight_bytes()) - rest;
  int n = 0;
  if (subject.plan) {
    CacheConfig config = cache_config(*subject.plan, model.shape());
    config.device = "cuda";
    // Lengths differ by up to a page, so the last pages are filled by half on average; two in a hundred for what is sealed.
    constexpr int kSamples = 16, kPasses = 3;
    double cache = 0;
    for (int i = 0; i < kSamples; ++i) {
      const int64_t length = std::max<int64_t>(tokens - i * kPageTokens / kSamples, 1);
      cache += 1.02 * static_cast<double>(predict_bytes(config, length)) / kSamples;
    }
    // What the allocator rounds up, all sequences share.
    n = static_cast<int>(room / (cache + logits));
    for (int pass = 0; pass < kPasses && n > 0; ++pass) {
      const auto slack = static_cast<double>(predict_slack_bytes(config, tokens, n));
      n = static_cast<int>((room - slack) / (cache + logits));
    }
  } else {
    const auto cache = static_cast<double>(Peer::device_bytes(subject.peer_type, model.shape(), tokens));
    n = static_cast<int>(room / (cache + logits));
  }
  if (n < 1) {
    throw Error(Status::kOutOfMemory, subject.name + ": " + std::to_string(memory >> 20) + " MiB do not hold the model's " +
                                          std::to_string(model.weight_bytes() >> 20) + " MiB and a sequence of " +
                                          std::to_string(tokens) + " tokens; take a shallower depth or a smaller plan");
  }
  return n;
}

// Rows that take turns.
class Turns {
 public:
  Turns(const std::shared_ptr<const Model>& model, std::span<const EvalSubject> subjects, const BenchOptions& options,
        std::span<const Token> text, int64_t context, const std::function<void(double, const std::string&)>& report)
      : subjects_(subjects), options_(options), text_(text), report_(report), rows_(subjects.size()) {
    ContenderOptions contender;
    contender.context = (context + 255) / 256 * 256;
    contender.threads = options.threads;
    contender.device = options.device;
    contender.kernel = options.kernel;
    contender.force_plan = options.force_plan;
    for (size_t s = 0; s < subjects.size(); ++s) {
      Row& row = rows_[s];
      const size_t before = taken_bytes(options.device);
      or_lose(s, [&] {
        row.sequences = options.memory > 0
                            ? sequences_in(options.memory, *model, subjects[s], subjects[s].plan ? context : contender.context)
                            : options.sequences;
        contender.sequences = row.sequences;
        row.contender = make_contender(model, subjects[s], contender);
      });
      took(row, before, taken_bytes(options.device));
    }
  }

  // All rows at a depth.
  void at(int64_t depth, std::vector<BenchRow>& out) {
    for (size_t s = 0; s < rows_.size(); ++s) read(s, depth);
    depth_ = depth;
    // One unmeasured round lets every row build its graph and touch its memory.
    for (int repetition = -1; repetition < options_.repetitions; ++repetition) {
      for (size_t s = 0; s < rows_.size(); ++s) decode(s, repetition < 0);
    }
    for (size_t s = 0; s < rows_.size(); ++s) {
      out.push_back(result(s));
      if (options_.on_row) options_.on_row(out.back());
    }
  }

 private:
  struct Row {
    std::unique_ptr<Contender> contender;  // none once it is lost
    std::string lost;
    int sequences = 1;
    size_t bytes = 0;  // as in BenchRow::peak_bytes
    double prefill_seconds = 0;
    std::vector<double> rates, host_seconds;
  };

  template <class Work>
  void or_lose(size_t s, const Work& work) {
    try {
      work();
    } catch (const Error& e) {
      const bool too_many = options_.device != "cpu" && e.status() == Status::kOutOfMemory;
      if ((subjects_[s].plan && !too_many) || e.status() == Status::kCancelled || e.status() == Status::kInvalidArgument) throw;
      rows_[s].contender.reset();
      rows_[s].lost = e.what();
    }
  }

  void took(Row& row, size_t before, size_t peak) const {
    row.bytes = options_.device == "cpu" ? row.bytes + peak - std::min(before, peak) : std::max(row.bytes, peak);
  }

  // The text up to the depth, which every sequence then has.
  void read(size_t s, int64_t depth) {
    constexpr int64_t kChunk = 512;
    Row& row = rows_[s];
    if (depth == depth_ || !row.contender) return;
    const size_t before = taken_bytes(options_.device);
    size_t peak = before;
    or_lose(s, [&] {
      row.contender->set_prompt(depth);
      for (int64_t at = depth_; at < depth; at += kChunk) {
        const int64_t n = std::min(kChunk, depth - at);
        const double start = now();
        row.contender->feed(text_.subspan(static_cast<size_t>(at), static_cast<size_t>(n)), false);
        row.prefill_seconds += now() - start;
        peak = std::max(peak, taken_bytes(options_.device));
        report_(static_cast<double>(n), subjects_[s].name + " at " + std::to_string(depth));
      }
      row.contender->spread();
      peak = std::max(peak, taken_bytes(options_.device));
    });
    took(row, before, peak);
  }

  void decode(size_t s, bool warm_up) {
    Row& row = rows_[s];
    if (!row.contender) return;
    const int count = warm_up ? std::min(3, options_.decode_tokens) : options_.decode_tokens;
    std::vector<Token> step(static_cast<size_t>(row.sequences));
    const auto before = row.contender->host_seconds();
    const double start = now();
    or_lose(s, [&] {
      for (int t = 0; t < count; ++t) {
        std::fill(step.begin(), step.end(), text_[static_cast<size_t>(depth_ + t)]);
        row.contender->decode(step);
      }
    });
    if (!row.contender) return;
    const double seconds = now() - start;
    if (options_.device != "cpu") row.bytes = std::max(row.bytes, taken_bytes(options_.device));
    row.contender->truncate(depth_);
    if (warm_up) {
      row.rates.clear();
      row.host_seconds.clear();
      return;
    }
    row.rates.push_back(count * row.sequences / seconds);
    row.host_seconds.push_back((row.contender->host_seconds().second - before.second) / count);
    report_(count, subjects_[s].name + " at " + std::to_string(depth_));
  }

  BenchRow result(size_t s) const {
    const Row& row = rows_[s];
    BenchRow r;
    r.name = subjects_[s].name;
    r.depth = depth_;
    r.lost = row.lost;
    r.sequences = row.sequences;
    if (!row.contender) return r;
    r.decode_tokens_per_s = median(row.rates);
    r.decode_min = *std::min_element(row.rates.begin(), row.rates.end());
    r.decode_max = *std::max_element(row.rates.begin(), row.rates.end());
    if (depth_ > 0) r.prefill_tokens_per_s = static_cast<double>(depth_) / row.prefill_seconds;
    r.cache_bytes = row.contender->cache_bytes(depth_) * static_cast<size_t>(row.sequences);
    r.peak_bytes = row.bytes;
    r.kernel = row.contender->kernel();
    if (options_.device != "cpu") r.host_seconds = median(row.host_seconds);
    return r;
  }

  std::span<const EvalSubject> subjects_;
  const BenchOptions& options_;
  std::span<const Token> text_;
  const std::function<void(double, const std::string&)>& report_;
  std::vector<Row> rows_;
  int64_t depth_ = 0;
};

}  // namespace

std::vector<BenchRow> bench(std::shared_ptr<const Model> model, std::span<const EvalSubject> subjects,
                            const BenchOptions& options, const Progress& progress) {
  std::vector<int64_t> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  if (depths.empty() || options.repetitions < 1 || options.decode_tokens < 1 || options.sequences < 1) {
    throw Error(Status::kInvalidArgument, "a benchmark needs depths, repetitions, tokens and sequences of at least 1");
  }
  if (options.memory > 0 && options.device == "cpu")
    throw Error(Status::kInvalidArgument, "--memory is for --device cuda: name a number of --sequences");
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

  const double total =
      static_cast<double>(subjects.size()) *
      static_cast<double>(depths.back() + static_cast<int64_t>(depths.size()) * options.repetitions * options.decode_tokens);
  double done = 0;
  const std::function<void(double, const std::string&)> report = [&](double n, const std::string& what) {
    done += n;
    if (progress && !progress(done, total, what)) throw Error(Status::kCancelled, "stopped while benchmarking");
  };
  std::vector<BenchRow> out;
  // A device's memory is for one row at a time: how many sequences it holds is what is asked.
  const size_t at_once = options.device == "cpu" ? subjects.size() : 1;
  for (size_t first = 0; first < subjects.size(); first += at_once) {
    Turns turns(model, subjects.subspan(first, at_once), options, tokens, context, report);
    for (const int64_t depth : depths) turns.at(depth, out);
  }
  return out;
}

}  // namespace kvmix
