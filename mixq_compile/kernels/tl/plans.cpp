// Operators by launch plans: what a call of one key allocates and launches, kept and repeated without Python.
//
// A key is all that a provider may look at: shapes, strides, dtypes, devices and alignment of the operands,
// which of them begin at one address, and the other arguments. Addresses are read in the call that uses
// them and kept nowhere. `plan_recording.py` makes plans of what a provider does, `plan_library.py` compiles
// this file and hands it the functions of the driver.

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "plan_cache.h"
#include "plan_data.h"
#include "plan_driver.h"

namespace {

using Stack = torch::jit::Stack;

thread_local std::shared_ptr<const Plan> offered;

// Running ----------------------------------------------------------------------------------------

// Whether PyTorch's own allocator serves the GPUs, so that memory can be had from it directly.
std::atomic<bool> allocates_directly{false};

at::Tensor allocate(const Buffer& buffer, c10::Device device) {
  auto* direct = allocates_directly ? c10::GetAllocator(c10::DeviceType::CUDA) : nullptr;
  at::Tensor made;
  if (direct && device.is_cuda() && !at::globalContext().deterministicAlgorithms()) {
    made = at::detail::empty_generic(
        {buffer.elements}, direct, c10::DispatchKeySet(c10::DispatchKey::CUDA), buffer.dtype, std::nullopt);
  } else {
    made = at::empty({buffer.elements}, at::TensorOptions(device).dtype(buffer.dtype));
  }
  made.unsafeGetTensorImpl()->set_sizes_and_strides(buffer.sizes, buffer.strides);
  return made;
}

bool run_plan(const Plan& plan, const Operands& operands, Stack& stack, size_t arguments, const char* name) {
  const c10::DeviceGuard guard(operands.device);
  const int index = operands.device.has_index() ? operands.device.index() : 0;
  ensure_context(index);
  std::unique_lock<std::recursive_mutex> ordered;
  if (plan.ordered) {
    // Where another call is being launched, Python waits for it, and lets go of its own lock meanwhile.
    ordered = std::unique_lock<std::recursive_mutex>(orders[index & 63].launching, std::try_to_lock);
    if (!ordered) return false;
    orders[index & 63].follow(index);
  }
  void* stream = current_stream(index);
  void* flags = nullptr;
  // A captured launch needs flags of its own, which Python deals out.
  if (plan.reads_flags && (is_capturing(stream) || !(flags = flags_of(index, stream)))) return false;
  c10::SmallVector<at::Tensor, 8> buffers;
  for (const auto& buffer : plan.buffers) buffers.push_back(allocate(buffer, operands.device));
  auto address_of = [&](const Parameter& parameter) -> char* {
    void* base = parameter.place == BUFFER    ? buffers[parameter.index].data_ptr()
                 : parameter.place == OPERAND ? operands.addresses[parameter.index]
                                              : flags;
    return static_cast<char*>(base) + parameter.value;
  };
  for (const auto& launch : plan.launches) {
    c10::SmallVector<void*, 48> parameters;
    c10::SmallVector<void*, 48> pointers;
    // Their places must not move while parameters point at them.
    pointers.reserve(launch.parameters.size());
    alignas(64) CUtensorMap descriptors[MOST_DESCRIPTORS];
    size_t described = 0;
    for (const auto& parameter : launch.parameters) {
      if (parameter.kind == NUMBER) {
        parameters.push_back(const_cast<int64_t*>(&parameter.value));
      } else if (parameter.kind == POINTER) {
        pointers.push_back(address_of(parameter));
        parameters.push_back(&pointers.back());
      } else {
        auto& descriptor = descriptors[described];
        std::memcpy(&descriptor, launch.descriptors[described++].words, sizeof descriptor);
        check(driver.readdress(&descriptor, address_of(parameter)), name);
        parameters.push_back(&descriptor);
      }
    }
    CUlaunchAttribute attributes[2];
    std::memset(attributes, 0, sizeof attributes);
    CUlaunchConfig config;
    std::memset(&config, 0, sizeof config);
    config.gridDimX = launch.grid[0];
    config.gridDimY = launch.grid[1];
    config.gridDimZ = launch.grid[2];
    config.blockDimX = launch.threads;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = launch.shared_memory;
    config.hStream = static_cast<CUstream>(stream);
    config.attrs = attributes;
    if (launch.overlaps) {
      attributes[config.numAttrs].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      attributes[config.numAttrs++].value.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cooperative) {
      attributes[config.numAttrs].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
      attributes[config.numAttrs++].value.cooperative = 1;
    }
    check(driver.launch(&config, launch.function, parameters.data(), nullptr), name);
  }
  stack.erase(stack.end() - static_cast<ptrdiff_t>(arguments), stack.end());
  for (const auto place : plan.results) stack.emplace_back(std::move(buffers[place]));
  return true;
}

void count_write(const c10::IValue& value) {
  if (value.isTensor()) {
    const auto& tensor = value.toTensor();
    if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  } else if (value.isList()) {
    for (const auto& item : value.toListRef()) count_write(item);
  }
}

// Which operands an operator writes, as its schema says.
struct Written {
  size_t arguments = 0;
  std::vector<size_t> places;

  explicit Written(const std::string& name) {
    const auto& schema = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").schema();
    arguments = schema.arguments().size();
    for (size_t at = 0; at < arguments; at++) {
      const auto* alias = schema.arguments()[at].alias_info();
      if (alias && alias->isWrite()) places.push_back(at);
    }
  }

  void count(const Stack& stack) const {
    for (const auto at : places) count_write(torch::jit::peek(stack, at, arguments));
  }
};

// The operator on a GPU: by its plan, or in Python, where the key is recorded when it comes again.
class Planned final : public c10::OperatorKernel {
 public:
  Planned(
      const std::string& name, const std::string& recorder, c10::DispatchKey key, std::shared_ptr<Cache> cache)
      : cache_(std::move(cache)),
        // The implementation for every device stands in the place of each that has none of its own.
        python_(key == c10::DispatchKey::CPU ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU),
        recorded_(c10::Dispatcher::singleton().findSchemaOrThrow(recorder.c_str(), "")),
        name_(name),
        written_(name) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    static thread_local Words reused;
    // A call within this one, of another operator, must not write over the key.
    Words key = std::move(reused);
    key.clear();
    Operands operands(key);
    for (const auto& argument : torch::jit::last(*stack, written_.arguments)) operands.add(argument);
    if (!operands.plain) return in_python(op, stack);
    const auto hash = hash_of(key);
    std::shared_ptr<const Plan> plan;
    const auto state = cache_->find(hash, key, plan);
    if (state == READY && run_plan(*plan, operands, *stack, written_.arguments, name_.c_str())) {
      reused = std::move(key);
      return;
    }
    if (state == MET) {
      offered.reset();
      recorded_.redispatchBoxed(python_, stack);
      auto found = std::move(offered);
      cache_->keep(hash, key, found ? READY : REFUSED, found);
      return;
    }
    in_python(op, stack);
    if (state == UNKNOWN) cache_->keep(hash, key, MET, nullptr);
  }

 private:
  void in_python(const c10::OperatorHandle& op, Stack* stack) const { op.redispatchBoxed(python_, stack); }

  std::shared_ptr<Cache> cache_;
  c10::DispatchKeySet python_;
  c10::OperatorHandle recorded_;
  std::string name_;
  Written written_;
};

// Counts the writes to operands in inference mode, where there is no autograd to do it.
class Counted final : public c10::OperatorKernel {
 public:
  explicit Counted(const std::string& name) : written_(name) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    written_.count(*stack);
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }

 private:
  Written written_;
};

bool wants_gradient(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() && value.toTensor().requires_grad();
  if (!value.isList()) return false;
  for (const auto& item : value.toListRef())
    if (wants_gradient(item)) return true;
  return false;
}

// Without gradients straight to the GPU's kernel, past two layers in Python.
class WithoutGradient final : public c10::OperatorKernel {
 public:
  WithoutGradient(const std::string& name, c10::DispatchKey key)
      : written_(name),
        own_(c10::toBackendComponent(key)),
        others_(key == c10::DispatchKey::AutogradCPU ? c10::DispatchKey::AutogradCUDA
                                                     : c10::DispatchKey::AutogradCPU) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    bool ordinary = keys.has(c10::DispatchKey::Python);
    if (c10::GradMode::is_enabled()) {
      for (const auto& argument : torch::jit::last(*stack, written_.arguments))
        ordinary = ordinary || wants_gradient(argument);
    }
    if (ordinary) {
      // As on a device that has only what is registered for all of them.
      const auto after = (keys & c10::after_autograd_keyset).remove_backend(own_);
      return op.redispatchBoxed(after | c10::DispatchKeySet(others_), stack);
    }
    written_.count(*stack);
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }

 private:
  Written written_;
  c10::BackendComponent own_;
  c10::DispatchKey others_;
};

std::mutex registration;
std::vector<std::unique_ptr<torch::Library>> libraries;
std::unordered_map<std::string, std::shared_ptr<Cache>> caches;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Addresses of the functions in Driver, in that order.
void mixq_use_driver(const void* const* functions) { std::memcpy(&driver, functions, sizeof driver); }

void mixq_allocate_directly(int32_t whether) { allocates_directly = whether; }

// Implements an operator by plans, of which it keeps so many, for one dispatch key, such as CUDA. `recorder`
// is an operator of the same schema that offers a plan of its call.
const char* mixq_implement(
    const char* name, const char* recorder, const char* key, const char* gradient_key, int64_t capacity) {
  static thread_local std::string problem;
  try {
    std::lock_guard<std::mutex> held(registration);
    auto cache = std::make_shared<Cache>(static_cast<size_t>(capacity));
    const std::string qualified(name);
    const auto split = qualified.find("::");
    auto add = [&](c10::DispatchKey place, auto kernel) {
      libraries.push_back(std::make_unique<torch::Library>(
          torch::Library::IMPL, qualified.substr(0, split), place, __FILE__, static_cast<uint32_t>(__LINE__)));
      libraries.back()->impl(
          qualified.substr(split + 2).c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(kernel)));
    };
    const auto planned = c10::parseDispatchKey(key);
    add(planned, std::make_unique<Planned>(qualified, recorder, planned, cache));
    if (*gradient_key) {
      const auto gradient = c10::parseDispatchKey(gradient_key);
      add(gradient, std::make_unique<WithoutGradient>(qualified, gradient));
      if (!Written(qualified).places.empty()) {
        add(c10::DispatchKey::ADInplaceOrView, std::make_unique<Counted>(qualified));
      }
    }
    caches[name] = std::move(cache);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

// The plan of the call that this thread records.
const char* mixq_offer(const int64_t* words, int64_t count) {
  static thread_local std::string problem;
  try {
    offered = read_plan(Reader(words, count));
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

void mixq_set_flags(int32_t device, void* stream, void* flags) {
  std::lock_guard<std::mutex> held(flags_lock);
  flags_of_stream[device & 63][reinterpret_cast<uint64_t>(stream)] = flags;
}

// Begins a call that learns on a device: waits for those of other threads, and on its stream for the last.
const char* mixq_enter(int32_t device) {
  static thread_local std::string problem;
  auto& order = orders[device & 63];
  order.launching.lock();
  try {
    order.follow(device);
    return nullptr;
  } catch (const std::exception& error) {
    order.launching.unlock();
    problem = error.what();
    return problem.c_str();
  }
}

void mixq_leave(int32_t device) { orders[device & 63].launching.unlock(); }

// Keys that an operator knows, or only those it has a plan for.
int64_t mixq_count(const char* name, int32_t ready) {
  std::lock_guard<std::mutex> held(registration);
  auto found = caches.find(name);
  return found == caches.end() ? 0 : found->second->count(ready);
}

void mixq_forget() {
  std::lock_guard<std::mutex> held(registration);
  for (auto& cache : caches) cache.second->clear();
}
}
#pragma GCC visibility pop
