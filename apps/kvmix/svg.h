// Small charts as inline SVG, for self-contained pages.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace kvmix::app {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x, y; non-positive values are dropped on a logarithmic axis
  bool line = true;                               // otherwise marks with their labels
  std::vector<std::string> labels;                // one per point, shown as tooltip (and beside the mark without a line)
};

struct Chart {
  std::string title, x_label, y_label;
  bool log_x = false, log_y = false;
  std::vector<Series> series;
};

// Text with &, <, > and quotes made safe for HTML and SVG.
std::string html_escape(const std::string& text);
// Colour of series i as #rrggbb; distinguishable to colour-blind readers.
const char* series_color(size_t i);
// What a page needs in its style sheet for charts.
std::string chart_style();
std::string line_chart(const Chart& chart);
// The same as a file of its own.
std::string svg_file(const Chart& chart);

}  // namespace kvmix::app
