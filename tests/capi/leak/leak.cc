// For the test of the exported list: a symbol that nobody meant to show.
namespace kvmix {
int shown_by_mistake();
int shown_by_mistake() { return 1; }
}  // namespace kvmix
