"""What `unicorn_x86.h` declares: the state of the library's processor and the functions of its C API."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "unicorn_x86.h" nogil:
    enum:
        RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R11, REGISTERS
        ES, CS, SS, FS, GS, SEGMENTS
        CC_OP_EFLAGS
        STATE_OFFSET, STATE_SIZE, SYSCALL_OFFSET, INTERCEPT_OFFSET
        HF_CPL_MASK, HF_INHIBIT_IRQ, HF_CS32, HF_SS32, HF_ADDSEG, HF_LMA, HF_CS64, HF_GUEST, HF_OSFXSR, HF2_NMI
        UC_CPU_OFFSET, UC_EXITS_OFFSET, UC_NO_EXIT_REQUEST_OFFSET, UC_SEARCH, CPU_SEARCH
        ACCESS_LOAD, ACCESS_STORE, ACCESS_FETCH, RIGHT_READ, RIGHT_WRITE, RIGHT_EXECUTE
        MMU_KERNEL_SMAP, MMU_USER, MMU_KERNEL
        INTERCEPT, SVM_EXIT_EXCEPTION, SVM_EXIT_FIRST, SVM_EXIT_HLT, SVM_EXIT_INVLPGA, SVM_EXIT_MSR
        SVM_EXIT_SHUTDOWN, SVM_EXIT_VMRUN, SVM_EXIT_VMMCALL, SVM_EXIT_VMLOAD, SVM_EXIT_SKINIT, SVM_EXIT_MONITOR, SVM_EXIT_MWAIT
        VMCB_IOPM, VMCB_MSRPM, VMCB_EXIT_INFO_2
        UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL
        UC_HOOK_INTR, UC_HOOK_INSN, UC_HOOK_BLOCK, UC_HOOK_MEM_FETCH_PROT, UC_HOOK_EDGE_GENERATED
        UC_HOOK_INSN_INVALID
        UC_X86_INS_IN, UC_X86_INS_OUT, UC_X86_INS_CPUID, UC_X86_INS_RDTSC, UC_X86_INS_SYSCALL
        UC_X86_REG_EFLAGS, UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RIP
        UC_X86_REG_RSP, UC_X86_REG_RSI, UC_X86_REG_CR0, UC_X86_REG_CR3, UC_X86_REG_CR4, UC_X86_REG_DR0
        UC_X86_REG_R15, UC_X86_REG_XMM0, UC_X86_REG_IDTR, UC_X86_REG_GDTR, UC_X86_REG_MSR, UC_X86_REG_FS_BASE
        UC_X86_REG_GS_BASE
        UC_CTL_USE_EXITS, UC_CTL_EXITS, UC_CTL_TB_REMOVE, UC_CTL_TB_FLUSH, UC_CTL_TLB_FLUSH, UC_CTL_TLB_TYPE
        UC_CTL_TCG_BUFFER_SIZE

    ctypedef struct x86_segment_t:
        uint32_t selector
        uint64_t base
        uint32_t limit
        uint32_t flags
    ctypedef struct x86_head_t:
        uint64_t regs[16]
        uint64_t rip
        uint64_t eflags
        uint64_t cc_dst
        uint64_t cc_src
        uint32_t cc_op
        int32_t df
        uint32_t hflags
        uint32_t hflags2
        x86_segment_t segs[6]
        x86_segment_t ldt
        x86_segment_t tr
        x86_segment_t gdt
        x86_segment_t idt
        uint64_t cr[9]
        uint64_t efer
    ctypedef struct x86_syscall_t:
        uint64_t star
        uint64_t lstar
        uint64_t cstar
        uint64_t fmask
    ctypedef struct x86_intercept_t:
        int32_t error_code
        int32_t exception_is_int
        uint64_t exception_next_rip
        uint64_t dr[8]
        int32_t old_exception
        uint64_t vmcb
        uint64_t intercept
        uint32_t intercept_exceptions
    ctypedef struct uc_block_t:
        uint64_t pc
        uint16_t instructions
        uint16_t size
    ctypedef struct uc_msr_t:
        uint32_t rid
        uint64_t value
    ctypedef struct uc_mmr_t:
        uint16_t selector
        uint64_t base
        uint32_t limit
        uint32_t flags
    ctypedef uint64_t (*uc_mmio_read_t)(void *uc, uint64_t offset, unsigned size, void *user) noexcept nogil
    ctypedef void (*uc_mmio_write_t)(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user) noexcept nogil
    ctypedef uint8_t (*uc_tlb_fill_t)(void *cpu, uint64_t address, int size, int access, int mmu_index, uint8_t probe,
                                      size_t origin) noexcept nogil
    ctypedef void *(*uc_memory_mapping_t)(void *uc, uint64_t address) noexcept nogil
    ctypedef int (*uc_compare_t)(const void *address, const void *key, void *user) noexcept nogil
    ctypedef struct uc_tree_t:
        uint64_t **root
        uc_compare_t compare
        void *user
        unsigned nodes
    ctypedef struct unicorn_t:
        unsigned (*version)(unsigned *major, unsigned *minor) noexcept nogil
        int (*open)(int arch, int mode, void **uc) noexcept nogil
        int (*close)(void *uc) noexcept nogil
        const char *(*strerror)(int code) noexcept nogil
        int (*reg_read)(void *uc, int id, void *value) noexcept nogil
        int (*reg_write)(void *uc, int id, const void *value) noexcept nogil
        int (*mem_map_ptr)(void *uc, uint64_t address, size_t size, uint32_t perms, void *pointer) noexcept nogil
        int (*mmio_map)(void *uc, uint64_t address, size_t size, uc_mmio_read_t read, void *read_user,
                        uc_mmio_write_t write, void *write_user) noexcept nogil
        int (*hook_del)(void *uc, size_t hook) noexcept nogil
        int (*hook_add)(void *uc, size_t *hook, int type, void *callback, void *user, uint64_t begin, uint64_t end,
                        ...) noexcept nogil
        int (*emu_start)(void *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count) noexcept nogil
        int (*emu_stop)(void *uc) noexcept nogil
        size_t (*context_size)(void *uc) noexcept nogil
        int (*context_alloc)(void *uc, void **context) noexcept nogil
        int (*context_save)(void *uc, void *context) noexcept nogil
        int (*context_restore)(void *uc, void *context) noexcept nogil
        int (*context_free)(void *context) noexcept nogil
        int (*ctl)(void *uc, int control, ...) noexcept nogil
        uc_tlb_fill_t tlb_fill
        uc_tlb_fill_t tlb_fill_virtual
        uc_memory_mapping_t memory_mapping
        void (*tlb_set_page)(void *cpu, uint64_t address, uint64_t physical, unsigned attributes, int rights,
                             int mmu_index, uint64_t size) noexcept nogil
        void (*tlb_set_dirty)(void *cpu, uint64_t address) noexcept nogil
        void (*loop_exit)(void *cpu) noexcept nogil
        uint32_t (*fetch_byte)(void *state, uint64_t address) noexcept nogil
        void (*raise_exception)(void *state, int vector) noexcept nogil
