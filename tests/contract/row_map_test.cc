// What every registered row map must do, whichever it is.
#include "rows/row_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kvmix/error.h"
#include "kvmix/plan.h"

namespace kvmix {
namespace {

constexpr int kHeads = 2;

// Calls visit(map, spec, shape) for examples of every map on each side that it is for.
template <class Visit>
void for_every_use(const Visit& visit) {
  for (const RowMapInfo* map : row_map_registry()) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      if (!(side == Side::kKey ? map->keys : map->values)) continue;
      for (const int width : {32, 80, 96, 128}) {
        for (const unsigned seed : {1u, 2u}) {
          const RowShape shape{.side = side, .kv_heads = kHeads, .width = width};
          TransformSpec spec;
          map->example(shape, seed, spec);
          SCOPED_TRACE(std::string(map->name) + (side == Side::kKey ? " keys " : " values ") + std::to_string(width));
          visit(*map, spec, shape);
        }
      }
    }
  }
}

std::vector<float> random_row(const RowMapChain& maps, int width, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> row(static_cast<size_t>(maps.room()), std::numeric_limits<float>::quiet_NaN());
  for (int i = 0; i < width; ++i) row[static_cast<size_t>(i)] = normal(random);
  return row;
}

double dot(const std::vector<float>& a, const std::vector<float>& b, int n) {
  double sum = 0;
  for (size_t i = 0; i < static_cast<size_t>(n); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

double size_of(const std::vector<float>& a, int n) { return std::sqrt(dot(a, a, n)); }

void expect_close(const std::vector<float>& a, const std::vector<float>& b, int n) {
  double worst = 0;
  for (size_t i = 0; i < static_cast<size_t>(n); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  EXPECT_LT(worst, 2e-4 * (1 + size_of(b, n)));
}

TEST(RowMapContract, NamesAndFieldsAreTheirOwn) {
  std::set<std::string> names, fields = {"bits", "axis", "group", "fit", "zero_point", "codec", "feedback"};
  for (const RowMapInfo* map : row_map_registry()) {
    std::printf("[ REGISTRY ] row map %s\n", map->name);  // read by scripts/extend
    EXPECT_TRUE(names.insert(map->name).second) << map->name;
    EXPECT_NE(std::string(map->description), "") << map->name;
    EXPECT_TRUE(map->keys || map->values) << map->name;
    EXPECT_FALSE(map->fields.empty()) << map->name;
    for (const RowMapField& field : map->fields) EXPECT_TRUE(fields.insert(field.name).second) << field.name;
  }
}

TEST(RowMapContract, ExamplesAskForTheMap) {
  for_every_use([](const RowMapInfo&, const TransformSpec& spec, const RowShape& shape) {
    EXPECT_FALSE(spec.identity());
    const RowMapChain maps(spec, shape, "test");
    EXPECT_FALSE(maps.identity());
    EXPECT_GT(maps.width(), 0);
    EXPECT_LE(maps.width(), kMostWidth);
    EXPECT_GE(maps.room(), std::max(maps.width(), shape.width));
    EXPECT_EQ(maps.feedback(0), nullptr);
  });
  const TransformSpec none;
  EXPECT_TRUE(RowMapChain(none, {.kv_heads = 1, .width = 64}, "test").identity());
}

// Differences of scores are those of the rows that come back, so softmax is; of an exact map, those of the rows themselves.
TEST(RowMapContract, QueriesMeetStoredKeysAsTheyMetKeys) {
  for_every_use([](const RowMapInfo& map, const TransformSpec& spec, const RowShape& shape) {
    if (shape.side != Side::kKey) return;
    const RowMapChain maps(spec, shape, "test");
    std::mt19937 random(3);
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<float> q = random_row(maps, shape.width, random), x1 = random_row(maps, shape.width, random),
                               x2 = random_row(maps, shape.width, random);
      std::vector<float> stored_q = q, y1 = x1, y2 = x2;
      maps.query(head, stored_q.data());
      maps.store(head, y1.data());
      maps.store(head, y2.data());
      const double got = dot(stored_q, y1, maps.width()) - dot(stored_q, y2, maps.width());
      std::vector<float> back1 = y1, back2 = y2;
      maps.output(head, back1.data());
      maps.output(head, back2.data());
      const double want = map.exact ? dot(q, x1, shape.width) - dot(q, x2, shape.width)
                                    : dot(q, back1, shape.width) - dot(q, back2, shape.width);
      EXPECT_NEAR(got, want, 1e-5 * size_of(q, shape.width) * (1 + size_of(x1, shape.width) + size_of(x2, shape.width)) * 10);
    }
  });
}

// Rows, and means of rows, come back: as they were from an exact map; from one that keeps a part, so that storing what came
// back is what was stored.
TEST(RowMapContract, OutputUndoesStore) {
  for_every_use([](const RowMapInfo& map, const TransformSpec& spec, const RowShape& shape) {
    const RowMapChain maps(spec, shape, "test");
    std::mt19937 random(4);
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<float> x1 = random_row(maps, shape.width, random), x2 = random_row(maps, shape.width, random);
      std::vector<float> y1 = x1, y2 = x2, mean_x(x1.size()), mean_y(x1.size());
      maps.store(head, y1.data());
      maps.store(head, y2.data());
      for (size_t i = 0; i < x1.size(); ++i) {
        mean_x[i] = 0.25f * x1[i] + 0.75f * x2[i];
        mean_y[i] = 0.25f * y1[i] + 0.75f * y2[i];
      }
      std::vector<float> back = y1, back_mean = mean_y;
      maps.output(head, back.data());
      maps.output(head, back_mean.data());
      if (map.exact) {
        expect_close(back, x1, shape.width);
        expect_close(back_mean, mean_x, shape.width);
      } else {
        maps.store(head, back.data());
        maps.store(head, back_mean.data());
        expect_close(back, y1, maps.width());
        expect_close(back_mean, mean_y, maps.width());
      }
    }
  });
}

TEST(RowMapContract, HeadsHaveTheirOwnNumbers) {
  for_every_use([](const RowMapInfo& map, const TransformSpec& spec, const RowShape& shape) {
    bool numbers = false;
    for (const RowMapField& field : map.fields) numbers = numbers || !field.numbers_of(spec).empty();
    if (!numbers) return;
    const RowMapChain maps(spec, shape, "test");
    std::mt19937 random(5);
    std::vector<float> a = random_row(maps, shape.width, random), b = a;
    maps.store(0, a.data());
    maps.store(1, b.data());
    a.resize(static_cast<size_t>(maps.width())), b.resize(a.size());
    EXPECT_NE(a, b);
  });
}

void expect_refused(const TransformSpec& spec, const RowShape& shape, const std::string& name) {
  try {
    const RowMapChain maps(spec, shape, "layer 7 keys");
    ADD_FAILURE() << name << " was taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.status(), Status::kInvalidArgument);
    EXPECT_NE(std::string(e.what()).find("layer 7 keys: "), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("\"" + name + "\""), std::string::npos) << e.what();
  }
}

TEST(RowMapContract, WrongNumbersAreRefusedByTheirField) {
  for_every_use([](const RowMapInfo& map, const TransformSpec& spec, const RowShape& shape) {
    for (const RowMapField& field : map.fields) {
      const std::span<const float> span = field.numbers_of(spec);
      if (span.empty()) continue;
      const std::vector<float> good(span.begin(), span.end());
      TransformSpec bad = spec;
      std::vector<float> values = good;
      values.push_back(1);
      field.set(bad, values);
      expect_refused(bad, shape, field.name);
      values.assign(good.begin(), good.end() - 1);
      field.set(bad, values);
      expect_refused(bad, shape, field.name);
      for (const float v : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        values = good;
        values.back() = v;
        field.set(bad, values);
        expect_refused(bad, shape, field.name);
      }
    }
  });
}

TEST(RowMapContract, TheOtherSideIsRefused) {
  for (const RowMapInfo* map : row_map_registry()) {
    if (map->keys && map->values) continue;
    const Side side = map->keys ? Side::kValue : Side::kKey;
    const RowShape shape{.side = side, .kv_heads = kHeads, .width = 64};
    TransformSpec spec;
    map->example(shape, 1, spec);
    EXPECT_THROW(RowMapChain(spec, shape, "test"), Error) << map->name;
  }
}

TEST(RowMapContract, FieldsOfNoMapAreRefused) {
  TransformSpec spec;
  spec.more.push_back({"no_such_field", {1.0f}});
  expect_refused(spec, {.kv_heads = kHeads, .width = 64}, "no_such_field");
}

TEST(RowMapContract, FeedbackFollowsTheStoredWidth) {
  for_every_use([](const RowMapInfo&, const TransformSpec& spec, const RowShape& shape) {
    TransformSpec fed = spec;
    const int width = RowMapChain(spec, shape, "test").width();
    fed.feedback.assign(static_cast<size_t>(kHeads * width * (width - 1) / 2), 0.5f);
    const RowMapChain maps(fed, shape, "test");
    EXPECT_EQ(maps.feedback(1), fed.feedback.data() + width * (width - 1) / 2);
    fed.feedback.pop_back();
    expect_refused(fed, shape, "feedback");
  });
}

// Plans say every map, and say the same when they are read and written again.
TEST(RowMapContract, PlansKeepEveryField) {
  for_every_use([](const RowMapInfo& map, const TransformSpec& spec, const RowShape& shape) {
    if (shape.width > 32) return;
    Plan plan;
    plan.model = "model", plan.fingerprint = "print", plan.planner = "hand";
    plan.layers.resize(1);
    (shape.side == Side::kKey ? plan.layers[0].key : plan.layers[0].value).transform = spec;
    const std::string text = to_json(plan);
    for (const RowMapField& field : map.fields) {
      EXPECT_EQ(text.find("\"" + std::string(field.name) + "\"") != std::string::npos, field.present(spec)) << field.name;
    }
    const Plan again = parse_plan(text, "plan.json");
    EXPECT_EQ(to_json(again), text);
    const TransformSpec& read = (shape.side == Side::kKey ? again.layers[0].key : again.layers[0].value).transform;
    for (const RowMapField& field : map.fields) {
      EXPECT_EQ(field.present(read), field.present(spec)) << field.name;
      if (field.kind != FieldKind::kHalfText) {  // which rounds to fp16
        const std::span<const float> a = field.numbers_of(read), b = field.numbers_of(spec);
        EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end())) << field.name;
      }
    }
    RowMapChain(read, shape, "read");
  });
}

// The order of the registry, and back in the other: two maps that may be used together.
TEST(RowMapContract, PairsOfMapsUndoEachOther) {
  std::mt19937 random(6);
  int pairs = 0;
  for (const RowMapInfo* first : row_map_registry()) {
    for (const RowMapInfo* second : row_map_registry()) {
      if (first == second || !first->keys || !second->keys || !first->exact || !second->exact) continue;
      const RowShape shape{.side = Side::kKey, .kv_heads = kHeads, .width = 64};
      TransformSpec spec;
      first->example(shape, 1, spec);
      second->example(shape, 3, spec);
      try {
        const RowMapChain maps(spec, shape, "test");
        const std::vector<float> x = random_row(maps, 64, random);
        std::vector<float> y = x;
        maps.store(1, y.data());
        maps.output(1, y.data());
        expect_close(y, x, 64);
        ++pairs;
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find("exclude"), std::string::npos) << first->name << " " << second->name << e.what();
      }
    }
  }
  EXPECT_GE(pairs, 4);
}

}  // namespace
}  // namespace kvmix
