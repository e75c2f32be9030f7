// The ledger by itself: no memory, so handles are counted here.
#include "cache/ledger.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>

#include "kvmix/error.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

struct Books {
  explicit Books(std::vector<LayerConfig> configs) : layers(std::move(configs)), ledger(layers, ids, formats) {
    for (const LayerConfig& layer : layers) {
      const LayerLayout layout = layer_layout(layer);
      ids.push_back({formats.add(layout.sinks), formats.add(layout.recent), formats.add(layout.sealed), layout.seals});
    }
  }
  Books(const Books&) = delete;
  Books& operator=(const Books&) = delete;

  void free(const std::vector<FreedPage>& pages) {
    for (const FreedPage& freed : pages) {
      ASSERT_EQ(handed_out.erase(freed.page), 1u) << "page " << freed.page << " was freed twice, or never handed out";
    }
  }
  // Gives the first `most` new pages a handle.
  bool allocate(size_t most = SIZE_MAX) {
    size_t n = 0;
    for (const PageChange& change : ledger.changes()) {
      if (n++ == most) return false;
      change.entry().handle = ++last;
      handed_out[last] = static_cast<FormatId>(change.entry().format);
    }
    return true;
  }
  std::vector<PageEntry> entries() const {
    std::vector<PageEntry> all;
    for (const auto& [id, sequence] : ledger.sequences()) {
      for (const LayerPages& layer : sequence.layers) {
        for (const PageList& list : layer.heads) {
          all.insert(all.end(), list.pages.begin(), list.pages.end());
          // As it will be written down.
          if (sequence.late) all.back().live = static_cast<int32_t>(sequence.length) - all.back().first;
        }
      }
    }
    return all;
  }
  // Every page in a list was handed out in that format and none is forgotten; lists hold each token that they should, once.
  void check() const {
    std::set<PageHandle> seen;
    for (const PageEntry& entry : entries()) {
      seen.insert(entry.handle);
      const auto it = handed_out.find(entry.handle);
      ASSERT_NE(it, handed_out.end());
      ASSERT_EQ(it->second, static_cast<FormatId>(entry.format));
    }
    ASSERT_EQ(seen.size(), handed_out.size());
    for (const auto& [id, sequence] : ledger.sequences()) {
      for (size_t l = 0; l < layers.size(); ++l) {
        for (const PageList& list : sequence.layers[l].heads) {
          int64_t next = -1;
          for (const PageEntry& entry : list.pages) {
            if (next >= 0 && entry.format != ids[l].sinks) {
              ASSERT_GE(entry.first, next);
            }
            if (next >= 0 && layers[l].sliding_window == 0) {
              ASSERT_EQ(entry.first, next);
            }
            ASSERT_GT(entry.live, 0);
            ASSERT_LE(entry.live, formats[static_cast<FormatId>(entry.format)].slots);
            next = entry.first + entry.live;
          }
          ASSERT_EQ(std::max<int64_t>(next, 0), sequence.length);
        }
      }
    }
  }

  std::vector<LayerConfig> layers;
  FormatTable formats;
  std::vector<LayerFormats> ids;
  Ledger ledger;
  std::map<PageHandle, FormatId> handed_out;
  PageHandle last = 0;
};

// Page tables as a device keeps them: written again where the ledger says by SequencePages::revision that they must be, patched
// by StepPlan::changes otherwise.
struct Tables {
  struct Row {
    uint64_t revision = 0;
    std::map<std::array<int32_t, 3>, PageHandle> pages;  // by layer, KV head and first position
  };
  void step(const StepPlan& plan) {
    for (size_t e = 0; e < plan.entries.size(); ++e) {
      const StepEntry& entry = plan.entries[e];
      Row& row = rows[entry.id];
      const auto put = [&](int32_t layer, int32_t head, const PageEntry& page) {
        row.pages[{layer, head, page.first}] = page.handle;
      };
      const auto each = [&](const auto& visit) {
        for (size_t l = 0; l < entry.pages->layers.size(); ++l) {
          const std::vector<PageList>& heads = entry.pages->layers[l].heads;
          for (size_t h = 0; h < heads.size(); ++h) {
            for (const PageEntry& page : heads[h].pages) visit(static_cast<int32_t>(l), static_cast<int32_t>(h), page);
          }
        }
      };
      if (row.revision != entry.pages->revision && row.revision != entry.revision) {
        each(put);
      } else if (row.revision != entry.pages->revision) {
        for (const PageChange& change : plan.changes) {
          if (change.owner.entry == static_cast<int32_t>(e)) put(change.owner.layer, change.owner.kv_head, change.entry());
        }
      }
      row.revision = entry.pages->revision;
      each([&](int32_t layer, int32_t head, const PageEntry& page) {
        ASSERT_EQ((row.pages[{layer, head, page.first}]), page.handle);
      });
    }
  }
  std::map<SequenceId, Row> rows;
};

std::vector<LayerConfig> mixed_layers() {
  std::vector<LayerConfig> layers(3, testing::make_layer(4, 2, 64, testing::key_codec(3), testing::value_codec(2)));
  layers[1].sliding_window = 200;
  layers[2].key.codec = layers[2].value.codec = CodecSpec{};
  layers[2].sinks = 0;
  return layers;
}

TEST(Ledger, EqualFormatsAreOne) {
  Books books(mixed_layers());
  EXPECT_EQ(books.ids[0].sealed, books.ids[1].sealed);
  EXPECT_NE(books.ids[0].sealed, books.ids[2].sealed);
  EXPECT_LE(books.formats.size(), 6u);
}

// Runs what can happen in any order; what all lists are at times. `late`: lists are only looked at then.
void run(unsigned seed, bool late, std::vector<std::vector<PageEntry>>& seen) {
  std::mt19937 random(seed);
  Books books(mixed_layers());
  Ledger& ledger = books.ledger;
  Tables tables;
  if (late) ledger.write_late();
  std::vector<SequenceId> live{ledger.create()};
  for (int i = 0; i < 400; ++i) {
    const SequenceId id = live[random() % live.size()];
    switch (random() % 8) {
      case 0:
        live.push_back(random() % 2 == 0 ? ledger.create() : ledger.fork(id));
        break;
      case 1:
        if (live.size() < 2) break;
        books.free(ledger.remove(id));
        std::erase(live, id);
        break;
      case 2: {
        const int64_t length = ledger.length(id);
        const int64_t to = length - static_cast<int64_t>(random() % 300);
        if (to < 0) break;
        try {
          ledger.open_truncation(id, to);
        } catch (const Error& e) {
          ASSERT_EQ(e.status(), Status::kUnsupported);  // a sliding window has gone on
          break;
        }
        books.free(books.allocate() ? ledger.commit() : ledger.abort());
        ASSERT_EQ(ledger.length(id), to);
        break;
      }
      default: {
        std::vector<StepItem> items{{id, 1 + static_cast<int>(random() % (random() % 3 == 0 ? 400 : 3))}};
        if (live.size() > 1 && random() % 2 == 0) {
          const SequenceId other = live[random() % live.size()];
          if (other != id) items.push_back({other, 1});
        }
        const std::vector<PageEntry> before = books.entries();
        const size_t needed = ledger.bytes_needed(items);
        ASSERT_EQ(books.entries(), before);
        ledger.open(items);
        size_t bytes = 0;
        for (const PageChange& change : ledger.changes()) {
          bytes += books.formats[static_cast<FormatId>(change.entry().format)].bytes;
        }
        ASSERT_EQ(bytes, needed);
        // Memory may end anywhere in between.
        if (random() % 4 == 0) {
          if (books.allocate(random() % (ledger.changes().size() + 1))) tables.step(ledger.plan());
          books.free(ledger.abort());
          ASSERT_EQ(books.entries(), before);
        } else {
          books.allocate();
          tables.step(ledger.plan());
          books.free(ledger.commit());
        }
      }
    }
    if (late && i % 7 != 0) continue;
    for (const SequenceId one : live) ledger.find(one);
    books.check();
    if (i % 7 == 0) seen.push_back(books.entries());
    if (::testing::Test::HasFatalFailure()) FAIL() << "seed " << seed << ", operation " << i;
  }
  for (const SequenceId id : live) books.free(ledger.remove(id));
  EXPECT_TRUE(books.handed_out.empty());
}

TEST(Ledger, AnythingInAnyOrderLosesNoPageAndFreesNoneTwice) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::vector<std::vector<PageEntry>> at_once, late;
    run(seed, false, at_once);
    run(seed, true, late);
    ASSERT_EQ(at_once, late) << "seed " << seed;
  }
}

TEST(Ledger, PagesThatAreSealedTogetherAreAllocatedTogether) {
  for (const bool late : {false, true}) {
    Books books(mixed_layers());
    Ledger& ledger = books.ledger;
    if (late) ledger.write_late();
    const SequenceId one = ledger.create(), other = ledger.create();
    // The last step seals pages, copies shared ones and begins some, of two sequences at different lengths.
    for (const StepItem& item : {StepItem{one, 300}, StepItem{other, 500}}) {
      ledger.open({&item, 1});
      books.allocate();
      books.free(ledger.commit());
    }
    ledger.fork(one);
    const std::array<StepItem, 2> items{StepItem{one, 400}, StepItem{other, 400}};
    const StepPlan& plan = ledger.open(items);
    using Place = std::array<int32_t, 4>;  // where a page begins, layer, entry and KV head
    std::vector<Place> begun;
    size_t replaced = 0, copied = 0;
    for (const PageChange& change : plan.changes) {
      const PageChange::Owner& owner = change.owner;
      if (change.before.handle != kNoPage) {
        EXPECT_TRUE(begun.empty()) << "a page in place of another after one that is new";
        ++(change.copies ? copied : replaced);
      } else {
        begun.push_back({change.entry().first, owner.layer, owner.entry, owner.kv_head});
      }
    }
    EXPECT_GT(replaced, 0u);
    EXPECT_GT(copied, 0u);
    EXPECT_GT(begun.size(), 8u);
    EXPECT_TRUE(std::is_sorted(begun.begin(), begun.end()));
    EXPECT_EQ(std::adjacent_find(begun.begin(), begun.end()), begun.end());
    books.allocate();
    books.free(ledger.commit());
    books.check();
  }
}

// Positions that lists hold, by sequence, layer and KV head, as operations should leave them.
using Positions = std::map<SequenceId, std::vector<std::vector<int64_t>>>;

// How far lists are behind their sequences, as a device keeps it: looked at again where Tables would be written.
struct Lengths {
  struct Row {
    uint64_t revision = 0;
    std::vector<int64_t> dropped;
  };
  void step(const StepPlan& plan, const Positions& before) {
    for (const StepEntry& entry : plan.entries) {
      Row& row = rows[entry.id];
      if (row.revision != entry.pages->revision && row.revision != entry.revision) {
        row.dropped.clear();
        for (const LayerPages& layer : entry.pages->layers) {
          for (const PageList& list : layer.heads) {
            int64_t tokens = 0;
            for (size_t i = 0; i + 1 < list.pages.size(); ++i) tokens += list.pages[i].live;
            row.dropped.push_back(list.pages.back().first - tokens);
          }
        }
      }
      row.revision = entry.pages->revision;
      for (size_t i = 0; i < row.dropped.size(); ++i) {
        ASSERT_EQ(entry.end() - row.dropped[i], static_cast<int64_t>(before.at(entry.id)[i].size()) + entry.n_tokens);
      }
    }
  }
  std::map<SequenceId, Row> rows;
};

void run_governed(unsigned seed, bool late) {
  std::mt19937 random(seed);
  std::vector<LayerConfig> layers = mixed_layers();
  layers.erase(layers.begin() + 1);
  Books books(layers);
  for (LayerFormats& ids : books.ids) ids.governed = true;
  Ledger& ledger = books.ledger;
  if (late) ledger.write_late();
  ledger.fill_pages();
  Positions expected;
  Lengths lengths;
  const auto lists_of = [&](SequenceId id, const auto& visit) {
    size_t i = 0;
    for (const LayerPages& layer : ledger.find(id).layers) {
      for (const PageList& list : layer.heads) visit(list, expected[id][i++]);
    }
  };
  expected[ledger.create()].resize(4);
  for (int i = 0; i < 400; ++i) {
    auto chosen = expected.begin();
    std::advance(chosen, random() % expected.size());
    const SequenceId id = chosen->first;
    switch (random() % 10) {
      case 0: {
        const bool fresh = random() % 2 == 0;
        const SequenceId made = fresh ? ledger.create() : ledger.fork(id);
        expected[made] = fresh ? std::vector<std::vector<int64_t>>(4) : expected[id];
        break;
      }
      case 1:
        if (expected.size() < 2) break;
        books.free(ledger.remove(id));
        expected.erase(id);
        break;
      case 2: {
        const int64_t to = std::max<int64_t>(0, ledger.length(id) - static_cast<int64_t>(random() % 300));
        ledger.open_truncation(id, to);
        books.free(books.allocate() ? ledger.commit() : ledger.abort());
        for (auto& list : expected[id]) std::erase_if(list, [&](int64_t p) { return p >= to; });
        break;
      }
      case 3: {
        const size_t layer = random() % 2, most = 1 + random() % 4;
        std::vector<Ledger::Regroup> heads(2);
        for (size_t h = 0; h < 2; ++h) {
          std::vector<int64_t>& list = expected[id][layer * 2 + h];
          std::vector<int64_t> left;
          for (size_t t = 0; t < list.size(); ++t) {
            if (t >= 16 && random() % 5 < most) {
              heads[h].drop.push_back(static_cast<int32_t>(t));
            } else {
              left.push_back(list[t]);
            }
          }
          list = left;
        }
        ledger.open_compaction(id, ledger.compacted(ledger.find(id), layer, heads));
        books.allocate();
        books.free(ledger.commit());
        break;
      }
      default: {
        std::vector<StepItem> items{{id, 1 + static_cast<int>(random() % (random() % 3 == 0 ? 400 : 3))}};
        ledger.open(items);
        if (random() % 4 == 0) {
          if (books.allocate(random() % (ledger.changes().size() + 1))) lengths.step(ledger.plan(), expected);
          books.free(ledger.abort());
          break;
        }
        books.allocate();
        lengths.step(ledger.plan(), expected);
        books.free(ledger.commit());
        for (auto& list : expected[id]) {
          for (int t = 0; t < items[0].n_tokens; ++t) list.push_back(ledger.length(id) - items[0].n_tokens + t);
        }
      }
    }
    if (late && i % 7 != 0) continue;
    for (const auto& [one, positions] : expected) {
      lists_of(one, [&](const PageList& list, const std::vector<int64_t>& wanted) {
        std::vector<int64_t> held;
        list.for_each_token([&](const PageEntry&, int, int32_t position) { held.push_back(position); });
        ASSERT_EQ(held, wanted);
        for (size_t p = 0; p + 1 < list.pages.size(); ++p) {
          ASSERT_EQ(list.pages[p].live, books.formats[static_cast<FormatId>(list.pages[p].format)].slots) << "page " << p;
        }
      });
    }
    if (::testing::Test::HasFatalFailure()) FAIL() << "seed " << seed << ", operation " << i;
  }
  while (!expected.empty()) {
    books.free(ledger.remove(expected.begin()->first));
    expected.erase(expected.begin());
  }
  EXPECT_TRUE(books.handed_out.empty());
}

TEST(Ledger, WhereTokensAreDroppedPagesAreFullForABackendThatWantsIt) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    run_governed(seed, false);
    run_governed(seed, true);
    if (HasFatalFailure()) return;
  }
}

TEST(Ledger, RefusesWhatCannotBe) {
  Books books(mixed_layers());
  const SequenceId id = books.ledger.create();
  const auto status = [&](std::vector<StepItem> items) {
    try {
      books.ledger.open(items);
    } catch (const Error& e) {
      EXPECT_FALSE(books.ledger.is_open());
      return e.status();
    }
    return Status::kOk;
  };
  EXPECT_EQ(status({}), Status::kInvalidArgument);
  EXPECT_EQ(status({{id, 0}}), Status::kInvalidArgument);
  EXPECT_EQ(status({{id, 1}, {id, 1}}), Status::kInvalidArgument);
  EXPECT_EQ(status({{id + 7, 1}}), Status::kNotFound);
  EXPECT_EQ(status({{id, INT32_MAX}, {id, 1}}), Status::kInvalidArgument);
  EXPECT_EQ(books.ledger.find(id).length, 0);
}

}  // namespace
}  // namespace kvmix
