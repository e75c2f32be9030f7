#include "svg.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace kvmix::app {
namespace {

constexpr double kWidth = 640, kHeight = 380, kLeft = 78, kRight = 16, kTop = 34, kBottom = 48;

// One axis: value to pixel, with round ticks.
class Axis1D {
 public:
  Axis1D(bool log, double from_pixel, double to_pixel) : log_(log), from_(from_pixel), to_(to_pixel) {}

  void include(double v) {
    const double t = log_ ? std::log10(v) : v;
    low_ = std::min(low_, t);
    high_ = std::max(high_, t);
  }
  void finish(bool from_zero) {
    if (low_ > high_) low_ = 0, high_ = 1;
    if (!log_ && from_zero) low_ = std::min(low_, 0.0);
    const double least = 1e-9 * std::max(1.0, std::abs(low_));  // of large numbers, what ticks can tell apart
    if (high_ - low_ < least) high_ = low_ + std::max(1.0, 1e3 * least);
    const double pad = (high_ - low_) * 0.04;
    if (log_ || low_ != 0) low_ -= pad;
    high_ += pad;
  }
  double pixel(double v) const { return from_ + ((log_ ? std::log10(v) : v) - low_) / (high_ - low_) * (to_ - from_); }

  std::vector<double> ticks() const {
    std::vector<double> out;
    if (log_) {
      const double decades = high_ - low_;
      const std::vector<double> steps = decades < 1.2 ? std::vector<double>{1, 1.5, 2, 3, 4, 5, 6, 8}
                                        : decades < 2 ? std::vector<double>{1, 2, 5}
                                                      : std::vector<double>{1};
      for (int e = static_cast<int>(std::floor(low_)); e <= static_cast<int>(std::ceil(high_)); ++e) {
        for (const double m : steps) {
          const double t = e + std::log10(m);
          if (t >= low_ && t <= high_) out.push_back(std::pow(10.0, t));
        }
      }
      return out;
    }
    const double raw = (high_ - low_) / 6, power = std::pow(10.0, std::floor(std::log10(raw)));
    double step = power;
    for (const double m : {1.0, 2.0, 2.5, 5.0, 10.0}) {
      step = m * power;
      if (step >= raw) break;
    }
    const double first = std::ceil(low_ / step) * step;
    const int count = static_cast<int>((high_ - first) / step + 1e-9);
    for (int i = 0; i <= count; ++i) {
      const double v = first + i * step;
      out.push_back(std::abs(v) < step * 1e-6 ? 0 : v);
    }
    return out;
  }

 private:
  bool log_;
  double from_, to_, low_ = 1e300, high_ = -1e300;
};

constexpr const char* kChartStyle =
    "svg .grid{stroke:#e6e6e6}svg .line{fill:none;stroke-width:2}svg .tick{font-size:11px;fill:#555}svg "
    ".axis{font-size:12px;fill:#333}svg .title{font-size:14px;font-weight:600}";

// Names beside marks, where they cover no name that was placed before.
class Labels {
 public:
  std::string place(double x, double y, const std::string& text) {
    const double width = 6.2 * static_cast<double>(text.size());
    Box best{};
    bool left = false;
    for (const double dy : {-5.0, 12.0, -17.0, 24.0}) {
      for (const bool to_left : {false, true}) {
        const double start = to_left ? x - 6 - width : x + 6;
        const Box box{start, y + dy - 10, start + width, y + dy + 1};
        if (box.left < kLeft || box.right > kWidth - kRight || box.top < kTop || overlaps(box)) continue;
        best = box;
        left = to_left;
        break;
      }
      if (best.right > 0) break;
    }
    if (best.right == 0) return "";  // no room: the name is in the mark's tooltip
    placed_.push_back(best);
    return fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>",
                       left ? best.right : best.left, best.bottom - 1, left ? "end" : "start", text);
  }

 private:
  struct Box {
    double left, top, right, bottom;
  };
  bool overlaps(const Box& b) const {
    return std::any_of(placed_.begin(), placed_.end(), [&](const Box& p) {
      return b.left < p.right && p.left < b.right && b.top < p.bottom && p.top < b.bottom;
    });
  }
  std::vector<Box> placed_;
};

std::string tick_text(double v) {
  if (std::abs(v) >= 1000 && std::fmod(v, 1000) == 0) return fmt::format("{:g}k", v / 1000);
  return fmt::format("{:.4g}", v);
}

}  // namespace

std::string html_escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

const char* series_color(size_t i) {
  // Okabe and Ito's palette.
  static constexpr std::array<const char*, 7> kColors = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                         "#56b4e9", "#e69f00", "#000000"};
  return kColors[i % kColors.size()];
}

namespace {

// `attributes` of the svg element, `head` right inside it.
std::string drawing(const Chart& chart, const std::string& attributes, const std::string& head) {
  Axis1D x(chart.log_x, kLeft, kWidth - kRight), y(chart.log_y, kHeight - kBottom, kTop);
  const auto drawable = [&](const std::pair<double, double>& p) {
    return std::isfinite(p.first) && std::isfinite(p.second) && (!chart.log_x || p.first > 0) && (!chart.log_y || p.second > 0);
  };
  for (const Series& s : chart.series) {
    for (const auto& p : s.points) {
      if (drawable(p)) x.include(p.first), y.include(p.second);
    }
  }
  x.finish(false);
  y.finish(true);

  std::string out = fmt::format("<svg{} viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">{}", attributes, kWidth, kHeight,
                                html_escape(chart.title), head);
  out += fmt::format("<text x=\"{}\" y=\"20\" class=\"title\">{}</text>", kLeft, html_escape(chart.title));
  for (const double t : x.ticks()) {
    out += fmt::format(
        "<path class=\"grid\" d=\"M{0:.1f} {1}V{2}\"/><text class=\"tick\" x=\"{0:.1f}\" y=\"{3}\" "
        "text-anchor=\"middle\">{4}</text>",
        x.pixel(t), kTop, kHeight - kBottom, kHeight - kBottom + 16, tick_text(t));
  }
  for (const double t : y.ticks()) {
    out += fmt::format(
        "<path class=\"grid\" d=\"M{0} {1:.1f}H{2}\"/><text class=\"tick\" x=\"{3}\" y=\"{4:.1f}\" "
        "text-anchor=\"end\">{5}</text>",
        kLeft, y.pixel(t), kWidth - kRight, kLeft - 6, y.pixel(t) + 4, tick_text(t));
  }
  out += fmt::format("<text class=\"axis\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>", (kLeft + kWidth - kRight) / 2,
                     kHeight - 10, html_escape(chart.x_label));
  out += fmt::format("<text class=\"axis\" transform=\"translate(16 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
                     (kTop + kHeight - kBottom) / 2, html_escape(chart.y_label));

  Labels labels;
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const Series& s = chart.series[i];
    std::string path;
    for (const auto& p : s.points) {
      if (drawable(p)) path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x.pixel(p.first), y.pixel(p.second));
    }
    if (s.line && !path.empty()) out += fmt::format("<path class=\"line\" stroke=\"{}\" d=\"{}\"/>", series_color(i), path);
    if (s.line && s.points.size() > 32) continue;  // a dense curve needs no marks
    for (size_t k = 0; k < s.points.size(); ++k) {
      const auto& p = s.points[k];
      if (!drawable(p)) continue;
      const std::string label = html_escape(k < s.labels.size() ? s.labels[k] : s.name);
      out += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\" fill=\"{}\"><title>{}: {:.4g}, {:.4g}</title></circle>",
                         x.pixel(p.first), y.pixel(p.second), series_color(i), label, p.first, p.second);
      if (!s.line) out += labels.place(x.pixel(p.first), y.pixel(p.second), label);
    }
  }
  return out + "</svg>";
}

}  // namespace

std::string chart_style() { return kChartStyle; }

std::string line_chart(const Chart& chart) {
  std::string out = drawing(chart, "", "") + "<p class=\"legend\">";
  for (size_t i = 0; i < chart.series.size(); ++i) {
    out += fmt::format("<span><i style=\"background:{}\"></i>{}</span>", series_color(i), html_escape(chart.series[i].name));
  }
  return out + "</p>";
}

std::string svg_file(const Chart& chart) {
  std::string head = fmt::format("<style>{}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>", kChartStyle);
  // A file has no page around it that names its lines.
  for (size_t i = 0; i < chart.series.size() && chart.series.size() > 1; ++i) {
    head +=
        fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\" font-size=\"12\" fill=\"{}\">{}</text>", kWidth - kRight - 6,
                    kTop + 14 + 15 * static_cast<double>(i), series_color(i), html_escape(chart.series[i].name));
  }
  return drawing(chart, " xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\"", head) + "\n";
}

}  // namespace kvmix::app
