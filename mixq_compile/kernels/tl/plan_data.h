// A plan: what a call allocates, launches and returns, as plan_recording.py writes it in words.

#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda.h"

namespace {

enum Place : int64_t { OPERAND, BUFFER, FLAGS };
enum Kind : int64_t { POINTER, NUMBER, DESCRIPTOR };
constexpr int DESCRIPTOR_WORDS = sizeof(CUtensorMap) / sizeof(int64_t);
constexpr size_t MOST_DESCRIPTORS = 8;

// Small, because a call reads all of them: a number's value, or where the memory of a pointer lies.
struct Parameter {
  int16_t kind, place;
  int32_t index;
  int64_t value;  // of a number; else an offset
};

struct Descriptor {
  int64_t words[DESCRIPTOR_WORDS];
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
  std::vector<Descriptor> descriptors;
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
      parameter.kind = static_cast<int16_t>(words.one());
      if (parameter.kind != NUMBER) {
        parameter.place = static_cast<int16_t>(words.one());
        parameter.index = static_cast<int32_t>(words.one());
        plan->reads_flags |= parameter.place == FLAGS;
      }
      parameter.value = words.one();
      if (parameter.kind == DESCRIPTOR) {
        launch.descriptors.emplace_back();
        for (auto& word : launch.descriptors.back().words) word = words.one();
      }
    }
    TORCH_CHECK(launch.descriptors.size() <= MOST_DESCRIPTORS, "mixq: a launch has too many descriptors");
  }
  TORCH_CHECK(words.done(), "mixq: a launch plan goes on after its end");
  return plan;
}

}  // namespace
