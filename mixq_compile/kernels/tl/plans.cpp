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
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda.h"

namespace {

using Words = std::vector<int64_t>;
using Stack = torch::jit::Stack;

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

// Plans ------------------------------------------------------------------------------------------

enum Place : int64_t { OPERAND, BUFFER, FLAGS };
enum Kind : int64_t { POINTER, NUMBER, DESCRIPTOR };
constexpr int DESCRIPTOR_WORDS = sizeof(CUtensorMap) / sizeof(int64_t);

struct Source {
  Place place;
  int64_t index;
  int64_t offset;
};

struct Parameter {
  Kind kind;
  Source source;
  int64_t value;
  int64_t descriptor[DESCRIPTOR_WORDS];
};

struct Buffer {
  int64_t elements;
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
};

struct Launch {
  CUfunction function;
  unsigned grid[3];
  unsigned threads, shared_memory;
  bool overlaps, cooperative;
  std::vector<Parameter> parameters;
  size_t descriptors = 0;
};

struct Plan {
  std::vector<Buffer> buffers;
  std::vector<int64_t> results;
  std::vector<Launch> launches;
  bool reads_flags = false;
  bool ordered = false;
};

class Reader {
 public:
  Reader(const int64_t* words, int64_t count) : next_(words), end_(words + count) {}
  int64_t one() {
    TORCH_CHECK(next_ != end_, "mixq: a launch plan ends too early");
    return *next_++;
  }
  std::vector<int64_t> many() {
    std::vector<int64_t> found(one());
    for (auto& item : found) item = one();
    return found;
  }
  bool done() const { return next_ == end_; }

 private:
  const int64_t *next_, *end_;
};

std::shared_ptr<const Plan> read_plan(Reader words) {
  auto plan = std::make_shared<Plan>();
  plan->ordered = words.one();
  plan->buffers.resize(words.one());
  for (auto& buffer : plan->buffers) {
    buffer.elements = words.one();
    buffer.dtype = static_cast<at::ScalarType>(words.one());
    buffer.sizes = words.many();
    buffer.strides = words.many();
  }
  plan->results = words.many();
  plan->launches.resize(words.one());
  for (auto& launch : plan->launches) {
    launch.function = reinterpret_cast<CUfunction>(words.one());
    for (auto& size : launch.grid) size = static_cast<unsigned>(words.one());
    launch.threads = static_cast<unsigned>(words.one());
    launch.shared_memory = static_cast<unsigned>(words.one());
    launch.overlaps = words.one();
    launch.cooperative = words.one();
    launch.parameters.resize(words.one());
    for (auto& parameter : launch.parameters) {
      parameter.kind = static_cast<Kind>(words.one());
      if (parameter.kind == NUMBER) {
        parameter.value = words.one();
        continue;
      }
      parameter.source = {static_cast<Place>(words.one()), words.one(), words.one()};
      plan->reads_flags |= parameter.source.place == FLAGS;
      if (parameter.kind == DESCRIPTOR) {
        launch.descriptors++;
        for (auto& word : parameter.descriptor) word = words.one();
      }
    }
  }
  TORCH_CHECK(words.done(), "mixq: a launch plan goes on after its end");
  return plan;
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

// Keys -------------------------------------------------------------------------------------------

struct Operands {
  c10::SmallVector<void*, 32> addresses;
  c10::SmallVector<void*, 32> distinct;
  Words& key;
  c10::Device device{c10::DeviceType::CPU};
  bool plain = true;

  explicit Operands(Words& key) : key(key) {}

  void add(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      key.push_back(-1);
      addresses.push_back(nullptr);
      return;
    }
    auto* implementation = tensor.unsafeGetTensorImpl();
    if (!implementation->has_storage() || tensor.is_conj() || tensor.is_neg()) {
      plain = false;
      return;
    }
    auto sizes = tensor.sizes();
    auto strides = tensor.strides();
    void* address = tensor.numel() ? tensor.data_ptr() : nullptr;
    const auto place = tensor.device();
    if (place.is_cuda() || addresses.empty()) device = place;
    int64_t first = -1;
    if (address) {
      for (size_t at = 0; at < addresses.size() && first < 0; at++)
        if (addresses[at] == address) first = static_cast<int64_t>(at);
    }
    key.push_back(
        static_cast<int64_t>(tensor.scalar_type()) | static_cast<int64_t>(place.type()) << 8 |
        static_cast<int64_t>(static_cast<uint8_t>(place.index())) << 16 |
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % 16 == 0) << 24 |
        static_cast<int64_t>(sizes.size()) << 32);
    key.push_back(first);
    key.insert(key.end(), sizes.begin(), sizes.end());
    key.insert(key.end(), strides.begin(), strides.end());
    addresses.push_back(address);
  }

  void add(const c10::IValue& value) {
    if (value.isTensor()) {
      add(value.toTensor());
    } else if (value.isNone()) {
      key.push_back(-1);
      addresses.push_back(nullptr);
    } else if (value.isInt()) {
      key.push_back(value.toInt());
    } else if (value.isBool()) {
      key.push_back(value.toBool());
    } else if (value.isDouble()) {
      const double number = value.toDouble();
      int64_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      key.push_back(bits);
    } else if (value.isString()) {
      const auto& text = value.toStringRef();
      key.push_back(static_cast<int64_t>(text.size()));
      for (size_t start = 0; start < text.size(); start += sizeof(int64_t)) {
        int64_t part = 0;
        std::memcpy(&part, text.data() + start, std::min(sizeof part, text.size() - start));
        key.push_back(part);
      }
    } else if (value.isList()) {
      const auto items = value.toListRef();
      key.push_back(static_cast<int64_t>(items.size()));
      for (const auto& item : items) add(item);
    } else {
      plain = false;
    }
  }
};

uint64_t hash_of(const Words& key) {
  uint64_t hash = key.size();
  for (const int64_t word : key) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 29;
  }
  return hash;
}

// A cache of plans: a key is met once, recorded when it is met again, then repeated ---------------

enum State { UNKNOWN, MET, REFUSED, READY };

struct Entry {
  Words key;
  State state;
  std::shared_ptr<const Plan> plan;
  uint64_t used;
};

class Cache {
 public:
  explicit Cache(size_t capacity) : capacity_(capacity) {}

  State find(uint64_t hash, const Words& key, std::shared_ptr<const Plan>& plan) {
    std::lock_guard<std::mutex> held(lock_);
    auto found = entries_.find(hash);
    if (found == entries_.end() || found->second.key != key) return UNKNOWN;
    found->second.used = ++clock_;
    plan = found->second.plan;
    return found->second.state;
  }

  void keep(uint64_t hash, const Words& key, State state, std::shared_ptr<const Plan> plan) {
    std::lock_guard<std::mutex> held(lock_);
    if (!entries_.count(hash) && entries_.size() >= capacity_) {
      auto oldest = entries_.begin();
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry)
        if (entry->second.used < oldest->second.used) oldest = entry;
      entries_.erase(oldest);
    }
    entries_[hash] = Entry{key, state, std::move(plan), ++clock_};
  }

  void clear() {
    std::lock_guard<std::mutex> held(lock_);
    entries_.clear();
  }

  int64_t count(bool ready) {
    std::lock_guard<std::mutex> held(lock_);
    int64_t counted = 0;
    for (const auto& entry : entries_) counted += !ready || entry.second.state == READY;
    return counted;
  }

 private:
  const size_t capacity_;
  std::mutex lock_;
  std::unordered_map<uint64_t, Entry> entries_;
  uint64_t clock_ = 0;
};

thread_local std::shared_ptr<const Plan> offered;

// Running ----------------------------------------------------------------------------------------

at::Tensor allocate(const Buffer& buffer, c10::Device device) {
  static c10::Allocator* const direct = c10::GetAllocator(c10::DeviceType::CUDA);
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
  auto address_of = [&](const Source& source) -> char* {
    char* base = source.place == BUFFER    ? static_cast<char*>(buffers[source.index].data_ptr())
                 : source.place == OPERAND ? static_cast<char*>(operands.addresses[source.index])
                                           : static_cast<char*>(flags);
    return base + source.offset;
  };
  for (const auto& launch : plan.launches) {
    c10::SmallVector<void*, 48> parameters;
    c10::SmallVector<void*, 48> pointers;
    // Their places must not move while parameters point at them.
    pointers.reserve(launch.parameters.size());
    alignas(64) CUtensorMap descriptors[8];
    TORCH_CHECK(launch.descriptors <= 8, "mixq: a launch has too many descriptors");
    size_t described = 0;
    for (const auto& parameter : launch.parameters) {
      if (parameter.kind == NUMBER) {
        parameters.push_back(const_cast<int64_t*>(&parameter.value));
      } else if (parameter.kind == POINTER) {
        pointers.push_back(address_of(parameter.source));
        parameters.push_back(&pointers.back());
      } else {
        auto& descriptor = descriptors[described++];
        std::memcpy(&descriptor, parameter.descriptor, sizeof descriptor);
        check(driver.readdress(&descriptor, address_of(parameter.source)), name);
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
