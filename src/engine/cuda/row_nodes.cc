// Finds the nodes of a graph that row products take: a product, the norm that only products read, the sum, gate or rotation
// that alone reads a product. Memory of a graph is used again and again, so what is computed in another place than before is
// first looked at for what else stands there meanwhile.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "engine/cuda/layer_nodes.h"
#include "engine/cuda/row_products.h"

namespace kvmix::cuda {
namespace {

struct Memory {
  uintptr_t begin = 0, end = 0;
  bool meets(const Memory& other) const { return begin < other.end && other.begin < end; }
};
Memory memory_of(const ggml_tensor* t) {
  const auto begin = reinterpret_cast<uintptr_t>(t->data);
  return {begin, begin + ggml_nbytes(t)};
}

bool are_rows(const ggml_tensor* t, int64_t columns, int64_t rows) {
  return t->type == GGML_TYPE_F32 && t->ne[0] == columns && ggml_nrows(t) == rows && ggml_is_contiguous(t) &&
         reinterpret_cast<uintptr_t>(t->data) % 16 == 0;
}
bool are_alike(const ggml_tensor* t, const ggml_tensor* other) { return are_rows(t, other->ne[0], ggml_nrows(other)); }

bool is_row_product(const ggml_tensor* t) {
  if (t->op != GGML_OP_MUL_MAT) return false;
  const ggml_tensor *w = t->src[0], *x = t->src[1];
  const int64_t columns = w->ne[0], inputs = ggml_nrows(t);
  const bool half = w->type == GGML_TYPE_F16 || w->type == GGML_TYPE_BF16;
  return half && w->op == GGML_OP_NONE && ggml_n_dims(w) <= 2 && ggml_is_contiguous(w) &&
         reinterpret_cast<uintptr_t>(w->data) % 16 == 0 && columns % 8 == 0 && columns <= kRowProductColumns &&
         inputs <= kRowProductInputs && are_rows(x, columns, inputs) && are_rows(t, w->ne[1], inputs);
}

// The rotation of whole heads that a node does; none (half is 0) for another.
struct Rotation {
  Turns turns = {};
  bool far = false;
};
Rotation rotation_of(const ggml_tensor* t) {
  constexpr int kDims = 1, kMode = 2, kContext = 4, kNumbers = 5, kOffset = 15;  // ggml's own order
  const int32_t* const p = t->op_params;
  if (t->op != GGML_OP_ROPE || (p[kMode] != GGML_ROPE_TYPE_NORMAL && p[kMode] != GGML_ROPE_TYPE_NEOX) || p[kOffset] != 0 ||
      p[kDims] != t->ne[0] || t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || t->src[1]->op != GGML_OP_NONE) {
    return {};
  }
  struct {
    float base, scale, extrapolated, size, fast, slow;
  } numbers;
  std::memcpy(&numbers, p + kNumbers, sizeof numbers);
  float ends[2];
  ggml_rope_yarn_corr_dims(p[kDims], p[kContext], numbers.base, numbers.fast, numbers.slow, ends);
  return {{static_cast<const int*>(t->src[1]->data),
           t->src[2] == nullptr ? nullptr : static_cast<const float*>(t->src[2]->data), nullptr, static_cast<int>(t->ne[2]),
           p[kDims] / 2, numbers.base, numbers.scale, numbers.extrapolated, numbers.size, ends[0], ends[1]},
          p[kMode] == GGML_ROPE_TYPE_NEOX};
}

// A product and what becomes of it.
struct Product {
  std::vector<const ggml_tensor*> nodes;  // the product, then what follows it: sum, rotation
  const ggml_tensor* added = nullptr;
  bool turned = false;

  const ggml_tensor* node() const { return nodes.front(); }
  const ggml_tensor* last() const { return nodes.back(); }  // whose numbers it computes
  bool has(const ggml_tensor* node) const { return std::find(nodes.begin(), nodes.end(), node) != nodes.end(); }
};

class Finder {
 public:
  Finder(ggml_cgraph* graph, const std::vector<LayerNodes>& layers) : graph_(graph), layers_(layers) {
    const int nodes = ggml_graph_n_nodes(graph_);
    found_.taken.assign(static_cast<size_t>(nodes), 0);
    for (int i = 0; i < nodes; ++i) {
      const ggml_tensor* node = at(i);
      places_[node] = i;
      for (const ggml_tensor* source : node->src) {
        if (source != nullptr) readers_[source].push_back(node);
      }
    }
  }

  RowNodes find() {
    for (int i = 0; i < ggml_graph_n_nodes(graph_); ++i) {
      if (is_row_product(at(i)) && !is_taken(at(i))) take_readers_of(at(i)->src[1]);
    }
    return std::move(found_);
  }

 private:
  const ggml_tensor* at(int i) const { return ggml_graph_node(graph_, i); }
  int place(const ggml_tensor* node) const { return places_.at(node); }
  bool is_weight(const ggml_tensor* t) const { return t->op == GGML_OP_NONE; }
  bool is_taken(const ggml_tensor* node) const { return found_.taken[static_cast<size_t>(place(node))] != 0; }
  void take(const ggml_tensor* node) { found_.taken[static_cast<size_t>(place(node))] = 1; }
  const ggml_tensor* only_reader(const ggml_tensor* node) const {
    const auto found = readers_.find(node);
    const bool one = found != readers_.end() && found->second.size() == 1 && (node->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
    return one ? found->second.front() : nullptr;
  }

  // All products of the rows x.
  void take_readers_of(const ggml_tensor* x) {
    std::vector<Product> products;
    for (const ggml_tensor* reader : readers_.at(x)) {
      if (is_row_product(reader) && reader->src[1] == x) products.push_back(product_of(reader));
    }
    std::sort(products.begin(), products.end(),
              [&](const Product& a, const Product& b) { return place(a.last()) < place(b.last()); });
    const int first = place(products.front().node());
    const ggml_tensor* norm = products.size() == readers_.at(x).size() ? norm_of(x) : nullptr;
    std::vector<std::pair<int, RowProduct>> launches;
    std::vector<const ggml_tensor*> nodes;
    for (size_t i = 0; i < products.size();) i += add_launch(products, i, launches, nodes);
    int last = first;
    for (const auto& [launch, product] : launches) last = std::max(last, launch);
    const ggml_tensor* in = norm != nullptr && stands(norm->src[0], place(norm), last, {norm, x}) ? norm->src[0] : x;
    if (in == x && !stands(x, first, last, {})) return;
    for (auto& [launch, product] : launches) {
      product.in = static_cast<const float*>(in->data);
      if (in != x) {
        product.norm = static_cast<const float*>(x->src[1]->data);
        std::memcpy(&product.epsilon, norm->op_params, sizeof product.epsilon);
      }
      found_.launches.emplace(launch, product);
    }
    for (const ggml_tensor* node : nodes) take(node);
    if (in != x) take(norm), take(x);
  }

  // The norm that with its weights gives x and that nothing else reads.
  const ggml_tensor* norm_of(const ggml_tensor* x) const {
    if (x->op != GGML_OP_MUL || x->src[0]->op != GGML_OP_RMS_NORM || !is_weight(x->src[1])) return nullptr;
    const ggml_tensor* norm = x->src[0];
    return only_reader(norm) == x && are_rows(x->src[1], x->ne[0], 1) && are_alike(norm->src[0], x) ? norm : nullptr;
  }

  Product product_of(const ggml_tensor* node) const {
    Product p{{node}};
    add_sum(p);
    add_rotation(p);
    return p;
  }

  void add_sum(Product& p) const {
    const ggml_tensor *node = p.node(), *sum = only_reader(node);
    if (sum == nullptr || sum->op != GGML_OP_ADD || !are_alike(sum, node)) return;
    const ggml_tensor* other = sum->src[0] == node ? sum->src[1] : sum->src[0];
    const Memory out = memory_of(sum), read = memory_of(other);
    const bool apart = out.begin == read.begin || !out.meets(read);
    if (other == node || !apart || (!are_alike(other, node) && !are_rows(other, node->ne[0], 1))) return;
    p.nodes.push_back(sum), p.added = other;
  }

  void add_rotation(Product& p) const {
    const ggml_tensor* heads = only_reader(p.last());
    if (heads == nullptr || heads->op != GGML_OP_RESHAPE) return;
    const ggml_tensor* turned = only_reader(heads);
    if (turned == nullptr || rotation_of(turned).turns.half == 0 || turned->src[0] != heads) return;
    if (p.added != nullptr && memory_of(turned).meets(memory_of(p.added))) return;
    p.nodes.insert(p.nodes.end(), {heads, turned}), p.turned = true;
  }

  RowMatrix matrix(const Product& p, const ggml_tensor* out) {
    RowMatrix m{p.node()->src[0]->data, p.added == nullptr ? nullptr : static_cast<const float*>(p.added->data),
                static_cast<float*>(out->data), static_cast<int>(p.node()->ne[0]),
                p.added != nullptr && ggml_nrows(p.added) == 1};
    if (p.turned) m.table = table_of(rotation_of(p.last()).turns);
    return m;
  }
  // Its index, a new one where none is like it.
  int table_of(const Turns& turns) {
    auto& all = found_.turns;
    const auto same = std::find(all.begin(), all.end(), turns);
    if (same != all.end()) return static_cast<int>(same - all.begin());
    all.push_back(turns);
    return static_cast<int>(all.size()) - 1;
  }

  // One launch of the product `i` and, with a gate or where its place allows it, of the next. Returns how many.
  size_t add_launch(const std::vector<Product>& products, size_t i, std::vector<std::pair<int, RowProduct>>& launches,
                    std::vector<const ggml_tensor*>& nodes) {
    const Product& a = products[i];
    const Product* b = i + 1 < products.size() ? &products[i + 1] : nullptr;
    if (b != nullptr && b->node()->src[0]->type != a.node()->src[0]->type) b = nullptr;
    RowProduct product;
    product.columns = static_cast<int>(a.node()->src[0]->ne[0]);
    product.inputs = static_cast<int>(ggml_nrows(a.node()));
    product.bf16 = a.node()->src[0]->type == GGML_TYPE_BF16;
    int launch = place(a.last());
    const ggml_tensor* gate = b == nullptr ? nullptr : gate_of(a, *b);
    if (b != nullptr && gate == nullptr && !(turn_alike(a, *b) && comes_early(*b, launch))) b = nullptr;
    if (gate != nullptr) {
      const int first = gate->src[0] == a.node() ? 0 : 1;
      product.gate = ggml_get_glu_op(gate) == GGML_GLU_OP_SWIGLU ? Gate::kSilu : Gate::kGelu;
      product.matrices[first] = matrix(a, gate), product.matrices[1 - first] = matrix(*b, gate);
      launch = place(gate);
      nodes.push_back(gate);
    } else {
      product.matrices[0] = matrix(a, a.last());
      if (b != nullptr) product.matrices[1] = matrix(*b, b->last());
    }
    for (const Product* p : {&a, b}) {
      if (p == nullptr) continue;
      ++product.count;
      nodes.insert(nodes.end(), p->nodes.begin(), p->nodes.end());
      if (!p->turned) continue;
      const Rotation rotation = rotation_of(p->last());
      product.half = rotation.turns.half, product.far = rotation.far;
    }
    launches.emplace_back(launch, product);
    return static_cast<size_t>(product.count);
  }

  const ggml_tensor* gate_of(const Product& a, const Product& b) const {
    const ggml_tensor* gate = only_reader(a.node());
    if (gate == nullptr || gate != only_reader(b.node()) || gate->op != GGML_OP_GLU || !are_alike(gate, a.node()))
      return nullptr;
    const ggml_glu_op op = ggml_get_glu_op(gate);
    const bool known = op == GGML_GLU_OP_SWIGLU || op == GGML_GLU_OP_GEGLU;
    return known && gate->src[0] != gate->src[1] ? gate : nullptr;
  }

  // Whether one launch can turn both, or one of them beside rows that are not: these go in pairs then.
  static bool turn_alike(const Product& a, const Product& b) {
    if (!a.turned && !b.turned) return true;
    if (!a.turned || !b.turned) return (a.turned ? b : a).node()->ne[0] % 2 == 0;
    const Rotation one = rotation_of(a.last()), other = rotation_of(b.last());
    return one.turns.half == other.turns.half && one.far == other.far;
  }

  // Whether b may be computed at `launch`, before its place: no rows are stored between, nothing there has its memory, and what
  // it adds is known.
  bool comes_early(const Product& b, int launch) const {
    const int own = place(b.last());
    if (b.added != nullptr && !is_weight(b.added)) return false;
    for (const LayerNodes& layer : layers_) {
      if (launch <= layer.stored_at && layer.stored_at < own) return false;
    }
    const Memory out = memory_of(b.last());
    for (int i = launch; i < own; ++i) {
      const ggml_tensor* node = at(i);
      if (b.has(node)) continue;
      if (memory_of(node).meets(out)) return false;
      for (const ggml_tensor* source : node->src) {
        if (source != nullptr && memory_of(source).meets(out)) return false;
      }
    }
    return true;
  }

  // Whether nothing from `first` to `last` writes where x is, but for nodes that will not be computed.
  bool stands(const ggml_tensor* x, int first, int last, std::initializer_list<const ggml_tensor*> skipped) const {
    const Memory there = memory_of(x);
    for (int i = first; i <= last; ++i) {
      const ggml_tensor* node = at(i);
      const bool writes = node->view_src == nullptr || node->op == GGML_OP_CPY || node->op == GGML_OP_SET_ROWS;
      if (writes && std::find(skipped.begin(), skipped.end(), node) == skipped.end() && memory_of(node).meets(there))
        return false;
    }
    return true;
  }

  ggml_cgraph* graph_;
  const std::vector<LayerNodes>& layers_;
  std::unordered_map<const ggml_tensor*, int> places_;
  std::unordered_map<const ggml_tensor*, std::vector<const ggml_tensor*>> readers_;
  RowNodes found_;
};

}  // namespace

size_t RowNodes::table_bytes() const {
  size_t bytes = 0;
  for (const Turns& t : turns) bytes += sizeof(float2) * static_cast<size_t>(t.inputs * t.half);
  return bytes;
}

void RowNodes::place_tables(void* memory) {
  auto* table = static_cast<float2*>(memory);
  for (Turns& t : turns) {
    t.table = table;
    table += t.inputs * t.half;
  }
  for (auto& [at, product] : launches) {
    for (RowMatrix& m : product.matrices) {
      if (m.table >= 0) m.turns = turns[static_cast<size_t>(m.table)].table;
    }
  }
}

RowNodes find_row_products(ggml_cgraph* graph, const std::vector<LayerNodes>& layers) { return Finder(graph, layers).find(); }

}  // namespace kvmix::cuda
