// Memory that a thread keeps between calls, and pages for large results.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mixq {

// Grows and never shrinks: fresh memory would cost a page fault every 4 KiB in each call.
class Scratch {
  public:
    ~Scratch() { std::free(memory); }

    template <typename Element>
    Element* reserve(int64_t elements) {
        const size_t wanted = (elements * sizeof(Element) + 4095) / 4096 * 4096;
        if (wanted > size) {
            std::free(memory);
            memory = std::aligned_alloc(4096, wanted);
            if (!memory) std::abort();
            size = wanted;
        }
        return static_cast<Element*>(memory);
    }

  private:
    void* memory = nullptr;
    size_t size = 0;
};

// A large result is fresh memory: with 4 KiB pages, faulting it in takes longer than the product.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t HUGE_PAGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = ((uintptr_t)memory + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mixq
