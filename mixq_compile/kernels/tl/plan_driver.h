// The driver's functions, and what calls on one GPU share: flags of streams, and the order of those that learn.

#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "cuda.h"

namespace {

struct Driver {
  CUresult (*launch)(const CUlaunchConfig*, CUfunction, void**, void**);
  CUresult (*readdress)(CUtensorMap*, void*);
  CUresult (*is_capturing)(CUstream, CUstreamCaptureStatus*);
  CUresult (*error_text)(CUresult, const char**);
  CUresult (*create_event)(CUevent*, unsigned);
  CUresult (*record_event)(CUevent, CUstream);
  CUresult (*await_event)(CUstream, CUevent, unsigned);
  CUresult (*get_context)(CUcontext*);
  CUresult (*get_device)(CUdevice*, int);
  CUresult (*retain_context)(CUcontext*, CUdevice);
  CUresult (*set_context)(CUcontext);
  int32_t (*stream)(int32_t, void**);
};
Driver driver{};

void check(CUresult failed, const char* what) {
  if (!failed) return;
  const char* text = nullptr;
  driver.error_text(failed, &text);
  TORCH_CHECK(false, what, ": ", text ? text : "unknown CUDA error", ".");
}

void* current_stream(int device) {
  void* stream = nullptr;
  driver.stream(device, &stream);
  return stream;
}

// A thread in which nothing has used the runtime yet has no context, and the driver makes none.
void ensure_context(int device) {
  CUcontext context = nullptr;
  check(driver.get_context(&context), "the CUDA context cannot be read");
  if (context) return;
  CUdevice handle;
  check(driver.get_device(&handle, device), "a GPU cannot be found");
  check(driver.retain_context(&context, handle), "a GPU's context cannot be had");
  check(driver.set_context(context), "a GPU's context cannot be made current");
}

bool is_capturing(void* stream) {
  auto status = CU_STREAM_CAPTURE_STATUS_NONE;
  driver.is_capturing(static_cast<CUstream>(stream), &status);
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

// Flags of a stream, which `hopper_schedule` deals out ------------------------------------------

std::mutex flags_lock;
std::unordered_map<uint64_t, void*> flags_of_stream[64];

void* flags_of(int device, void* stream) {
  std::lock_guard<std::mutex> held(flags_lock);
  auto& known = flags_of_stream[device & 63];
  auto found = known.find(reinterpret_cast<uint64_t>(stream));
  return found == known.end() ? nullptr : found->second;
}

// The order of calls that learn, which those in Python enter by the functions at the end ----------

struct Order {
  std::recursive_mutex launching;
  void* last = nullptr;
  bool begun = false;
  CUevent event = nullptr;

  // Lets what this thread launches next on its stream wait for what the last call was given.
  void follow(int device) {
    ensure_context(device);
    void* stream = current_stream(device);
    if ((begun && stream == last) || is_capturing(stream)) return;
    if (begun) {
      const c10::DeviceGuard guard(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)));
      if (!event) check(driver.create_event(&event, CU_EVENT_DISABLE_TIMING), "an event cannot be made");
      check(driver.record_event(event, static_cast<CUstream>(last)), "an event cannot be recorded");
      check(driver.await_event(static_cast<CUstream>(stream), event, 0), "an event cannot be awaited");
    }
    begun = true;
    last = stream;
  }
};
Order orders[64];

}  // namespace
