"""Memory ordering for words shared with a peer: the C compiler's atomics under readable names."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #define vmbus_load_relaxed32(p) __atomic_load_n((const uint32_t *)(p), __ATOMIC_RELAXED)
    #define vmbus_load_acquire32(p) __atomic_load_n((const uint32_t *)(p), __ATOMIC_ACQUIRE)
    #define vmbus_store_relaxed32(p, v) __atomic_store_n((uint32_t *)(p), (uint32_t)(v), __ATOMIC_RELAXED)
    #define vmbus_store_release32(p, v) __atomic_store_n((uint32_t *)(p), (uint32_t)(v), __ATOMIC_RELEASE)
    #define vmbus_exchange32(p, v) __atomic_exchange_n((uint32_t *)(p), (uint32_t)(v), __ATOMIC_SEQ_CST)
    #define vmbus_load_relaxed64(p) __atomic_load_n((const uint64_t *)(p), __ATOMIC_RELAXED)
    #define vmbus_load_acquire64(p) __atomic_load_n((const uint64_t *)(p), __ATOMIC_ACQUIRE)
    #define vmbus_store_relaxed64(p, v) __atomic_store_n((uint64_t *)(p), (uint64_t)(v), __ATOMIC_RELAXED)
    #define vmbus_exchange64(p, v) __atomic_exchange_n((uint64_t *)(p), (uint64_t)(v), __ATOMIC_SEQ_CST)
    #define vmbus_fetch_or64(p, v) __atomic_fetch_or((uint64_t *)(p), (uint64_t)(v), __ATOMIC_SEQ_CST)
    #define vmbus_fetch_and64(p, v) __atomic_fetch_and((uint64_t *)(p), (uint64_t)(v), __ATOMIC_SEQ_CST)
    #define vmbus_fetch_or8(p, v) __atomic_fetch_or((uint8_t *)(p), (uint8_t)(v), __ATOMIC_SEQ_CST)
    #define vmbus_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #if defined(__x86_64__)
    #define vmbus_pause() __builtin_ia32_pause()
    #else
    #define vmbus_pause() __asm__ __volatile__("" ::: "memory")
    #endif
    #define vmbus_likely(x) __builtin_expect(!!(x), 1)
    #define vmbus_unlikely(x) __builtin_expect(!!(x), 0)
    """
    uint32_t load_relaxed32 "vmbus_load_relaxed32"(const void *p) noexcept nogil
    uint32_t load_acquire32 "vmbus_load_acquire32"(const void *p) noexcept nogil
    void store_relaxed32 "vmbus_store_relaxed32"(void *p, uint32_t value) noexcept nogil
    void store_release32 "vmbus_store_release32"(void *p, uint32_t value) noexcept nogil
    uint32_t exchange32 "vmbus_exchange32"(void *p, uint32_t value) noexcept nogil
    uint64_t load_relaxed64 "vmbus_load_relaxed64"(const void *p) noexcept nogil
    uint64_t load_acquire64 "vmbus_load_acquire64"(const void *p) noexcept nogil
    void store_relaxed64 "vmbus_store_relaxed64"(void *p, uint64_t value) noexcept nogil
    uint64_t exchange64 "vmbus_exchange64"(void *p, uint64_t value) noexcept nogil
    uint64_t fetch_or64 "vmbus_fetch_or64"(void *p, uint64_t value) noexcept nogil
    uint64_t fetch_and64 "vmbus_fetch_and64"(void *p, uint64_t value) noexcept nogil
    uint8_t fetch_or8 "vmbus_fetch_or8"(void *p, uint8_t value) noexcept nogil
    void fence "vmbus_fence"() noexcept nogil
    void cpu_pause "vmbus_pause"() noexcept nogil
    bint likely "vmbus_likely"(bint condition) noexcept nogil
    bint unlikely "vmbus_unlikely"(bint condition) noexcept nogil
