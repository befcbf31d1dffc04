// Keys of calls, and the plans that are kept for them.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "plan_data.h"

namespace {

using Words = std::vector<int64_t>;

struct Operands {
  c10::SmallVector<void*, 32> addresses;
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

}  // namespace
