// A CPU build of torch has no guard for CUDA devices: register torch's own that does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;

const bool registered = [] {
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  if (!slot.load()) slot.store(&guard);
  return true;
}();
}  // namespace
