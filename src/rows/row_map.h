// What a side of a layer does to a row before it is stored, and what undoes it on the other side of attention.
//
// One file per map + one line in registry.inc; tests/contract runs through all of them. A map reads its parameters from the
// fields that its RowMapInfo names in a TransformSpec; plan files read and write them by the same list. The maps that a
// TransformSpec asks for are composed in the registry's order.
//
// With row vectors: x is stored as y = x A + b, a query q meets stored keys as q' = q A^-T, so that q'.y equals q.x up to a
// constant, which softmax does not see; a stored value, or a softmax's sum of such values (whose weights sum to 1), goes
// back by x = (y - b) A^-1. All three work in place and allocate nothing.
//
// The stored width is a map's own: it may leave fewer (or more) channels than it is given. How maps to come fit in:
//   - keys that are stored before rotation in a latent space (Palu, arXiv 2407.21118; ReCalKV; LoRC): no q' exists that works
//     for every position, so the map would say `rebuilds` and give rebuild(tile, positions -> keys), which attention calls
//     between decoding a tile and the dot products; `query` is then the identity.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvmix/cache.h"

namespace kvmix {

class RowMap {
 public:
  virtual ~RowMap() = default;
  // Channels of a stored row.
  virtual int width() const = 0;
  // A row of the KV head to what is stored: [the shape's width] -> [width()]. The row has room for the larger of the two.
  virtual void store(int kv_head, float* row) const = 0;
  // A query to what meets stored keys, the same widths.
  virtual void query(int kv_head, float* row) const = 0;
  // A stored row, or a mean of such, back: [width()] -> [the shape's width].
  virtual void output(int kv_head, float* row) const = 0;
};

// What a map is made for.
struct RowShape {
  Side side = Side::kKey;
  int kv_heads = 1;
  int width = 0;      // channels of the rows that it is given: the head_dim, or what the map before it stores
  float softcap = 0;  // of the layer's scores
};
inline RowShape row_shape(const LayerConfig& layer, Side side) { return {side, layer.kv_heads, layer.head_dim, layer.softcap}; }

// How a field is written in JSON: true, base64 of fp16, or a list of numbers.
enum class FieldKind : uint8_t { kFlag, kHalfText, kNumbers };

// A parameter of a map. Where TransformSpec has no member for it, it is an entry of TransformSpec::more (a flag: of no
// numbers).
struct RowMapField {
  const char* name;
  FieldKind kind;
  float limit = 65504.0f;               // numbers in a plan are at most this large
  const char* beside = nullptr;         // kNumbers: read if and only if this field is there, with as many numbers
  bool TransformSpec::*flag = nullptr;  // the members
  std::vector<float> TransformSpec::*numbers = nullptr;

  bool present(const TransformSpec& spec) const;
  // None if absent, and of a flag.
  std::span<const float> numbers_of(const TransformSpec& spec) const;
  void set(TransformSpec& spec, std::vector<float> values) const;  // a flag: set to true
};

// Where a refused field is.
class RowMapErrors {
 public:
  explicit RowMapErrors(std::string where) : where_(std::move(where)) {}
  // Throws kInvalidArgument.
  [[noreturn]] void fail(const std::string& what) const;
  // Fails unless the field holds `count` finite numbers; `meaning` says what they are, e.g. "kv_heads x head_dim".
  void check_numbers(const char* field, std::span<const float> values, size_t count, const char* meaning) const;

 private:
  std::string where_;
};

// A line of the registry.
struct RowMapInfo {
  const char* name;
  const char* description;
  bool keys, values;  // sides that it can be used on
  bool exact;         // rows and scores come back up to rounding; false: it keeps a part of a row
  std::span<const RowMapField> fields;
  // Null if the spec does not ask for this map. What is wrong with its fields goes to `errors`, by their names. The map may
  // keep views of the spec's numbers.
  std::unique_ptr<const RowMap> (*make)(const TransformSpec& spec, const RowShape& shape, const RowMapErrors& errors);
  // Adds a use of this map with random parameters, for the contract tests.
  void (*example)(const RowShape& shape, unsigned seed, TransformSpec& spec);
};

// In the order in which maps are composed.
std::span<const RowMapInfo* const> row_map_registry();

// The maps of a layer's side, made and checked once. Keeps views of the spec's numbers: the spec must stay as it is.
class RowMapChain {
 public:
  // Throws kInvalidArgument naming `where` and the field unless sizes fit the layer and the maps can be combined.
  RowMapChain(const TransformSpec& spec, const RowShape& shape, const std::string& where);
  RowMapChain(TransformSpec&&, const RowShape&, const std::string&) = delete;

  bool identity() const { return maps_.empty(); }
  int width() const { return width_; }  // of stored rows
  // Floats that a row needs on its way: the most that any map is given or leaves.
  int room() const { return room_; }

  // In place on one row of one KV head, with room() floats. store and query: [head_dim] -> [width()]; output: back.
  void store(int kv_head, float* row) const;
  void query(int kv_head, float* row) const;
  void output(int kv_head, float* row) const;

  // One KV head's error feedback over the stored channels as Codec::encode takes it; null if there is none.
  const float* feedback(int kv_head) const;

 private:
  std::vector<std::unique_ptr<const RowMap>> maps_;
  std::span<const float> feedback_;
  int width_, room_;
};

}  // namespace kvmix
