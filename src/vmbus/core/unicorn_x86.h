/*
 * The x86 processor state as Unicorn 2.1.4 keeps it in a saved context, and the functions of its C API
 * that ext/cpu_unicorn.pyx resolves at run time.
 *
 * This is the one place that knows offsets. Nothing here is taken on trust: cpu_unicorn.pyx writes sentinels through
 * the public register API, finds them again through these structures, and then lets a few instructions run into each
 * intercept, before a guest may use the library.
 */
#ifndef VMBUS_UNICORN_X86_H
#define VMBUS_UNICORN_X86_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t selector;
    uint32_t padding;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;             /* the second word of a descriptor: type, DPL, present, L, D/B, granularity */
} x86_segment_t;

enum { ES, CS, SS, DS, FS, GS, SEGMENTS };
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, REGISTERS };

/* The start of the state: what an exception or an interrupt reads and writes. */
typedef struct {
    uint64_t regs[REGISTERS];
    uint64_t rip;
    uint64_t eflags;            /* without the arithmetic flags and DF, which are kept below */
    uint64_t cc_dst;
    uint64_t cc_src;
    uint64_t cc_src2;
    uint32_t cc_op;             /* how the arithmetic flags follow from cc_dst and cc_src */
    int32_t df;                 /* +1 or -1 */
    uint32_t hflags;            /* what a translation depends on: privilege, code size, intercepts … */
    uint32_t hflags2;
    x86_segment_t segs[SEGMENTS];
    x86_segment_t ldt;
    x86_segment_t tr;
    x86_segment_t gdt;
    x86_segment_t idt;
    uint64_t cr[9];
    int32_t a20_mask;
    uint64_t bounds[11];        /* of MPX, which no guest has */
    uint64_t efer;
} x86_head_t;

enum { CC_OP_EFLAGS = 1 };      /* the arithmetic flags are in cc_src as they stand */

/* MSRs of the SYSCALL instruction, from STAR on. */
typedef struct {
    uint64_t star;
    uint64_t vm_hsave;
    uint64_t lstar;
    uint64_t cstar;
    uint64_t fmask;
} x86_syscall_t;

/* Exceptions, debug registers and the intercepts of a nested guest, from error_code on. */
typedef struct {
    int32_t error_code;
    int32_t exception_is_int;
    uint64_t exception_next_rip;
    uint64_t dr[8];
    void *breakpoints[4];
    int32_t old_exception;      /* an exception in delivery, for double faults; -1 for none */
    int32_t padding;
    uint64_t vmcb;              /* guest physical address of the control block */
    uint64_t tsc_offset;
    uint64_t intercept;         /* one bit per SVM exit code from 0x60 on */
    uint16_t intercept_cr_read;
    uint16_t intercept_cr_write;
    uint16_t intercept_dr_read;
    uint16_t intercept_dr_write;
    uint32_t intercept_exceptions;
} x86_intercept_t;

enum {
    STATE_OFFSET = 40,          /* of the state in a saved context */
    STATE_SIZE = 5568,
    SYSCALL_OFFSET = 4824,
    INTERCEPT_OFFSET = 5384,
};

_Static_assert(offsetof(x86_head_t, rip) == 128, "layout");
_Static_assert(offsetof(x86_head_t, cc_op) == 168, "layout");
_Static_assert(offsetof(x86_head_t, segs) == 184, "layout");
_Static_assert(offsetof(x86_head_t, cr) == 424, "layout");
_Static_assert(offsetof(x86_head_t, efer) == 592, "layout");
_Static_assert(offsetof(x86_intercept_t, dr) == 16, "layout");
_Static_assert(offsetof(x86_intercept_t, old_exception) == 112, "layout");
_Static_assert(offsetof(x86_intercept_t, intercept_exceptions) == 152, "layout");

enum {                          /* bits of hflags */
    HF_CPL_MASK = 3,
    HF_INHIBIT_IRQ = 1 << 3,    /* behind STI or MOV SS: no interrupt before the next instruction */
    HF_CS32 = 1 << 4,
    HF_SS32 = 1 << 5,
    HF_ADDSEG = 1 << 6,
    HF_LMA = 1 << 14,           /* long mode is active */
    HF_CS64 = 1 << 15,
    HF_GUEST = 1 << 21,         /* intercepts are active */
    HF_OSFXSR = 1 << 22,        /* SSE instructions are allowed (CR4.OSFXSR) */
};

enum { HF2_NMI = 1 << 2 };      /* of hflags2: an NMI is being handled; IRET ends that */

/*
 * The live processor inside the library, for what its API has no words for: filling its TLB, and leaving out a check
 * behind every memory access. Everything else about it (where the state is, and the pointer to the filling function)
 * is found by searching it for what must be there; see ext/unicorn/library.pxi.
 */
enum {
    UC_CPU_OFFSET = 0x1b8,              /* of the pointer to the processor in the engine */
    UC_EXITS_OFFSET = 0x798,            /* of the pointer to the addresses at which translation ends, a uc_tree_t */
    UC_NO_EXIT_REQUEST_OFFSET = 0x7f2,  /* of a flag: translate without the check behind every memory access */
    UC_SEARCH = 0x400,                  /* bytes of the engine in which its function pointers lie */
    CPU_SEARCH = 0x20000,               /* the same of the processor */
};

/*
 * The sorted tree of addresses that the API sets with UC_CTL_EXITS. The translator looks up every instruction in it before
 * it fetches the first byte; `compare` is called with (&address, &key of the node, user) and orders them as memcmp does.
 */
typedef int (*uc_compare_t)(const void *address, const void *key, void *user);
typedef struct {
    uint64_t **root;            /* the first node, which starts with the pointer to its key */
    uc_compare_t compare;
    void *free_key;
    void *free_value;
    void *user;
    unsigned nodes;
} uc_tree_t;

/* How the library's TLB is filled: kinds of access, rights, and the three indexes that x86 has. */
enum { ACCESS_LOAD, ACCESS_STORE, ACCESS_FETCH };
enum { RIGHT_READ = 1, RIGHT_WRITE = 2, RIGHT_EXECUTE = 4 };
enum { MMU_KERNEL_SMAP, MMU_USER, MMU_KERNEL };

/* (booleans are bytes) */
typedef uint8_t (*uc_tlb_fill_t)(void *cpu, uint64_t address, int size, int access, int mmu_index, uint8_t probe,
                                 size_t origin);
typedef void *(*uc_memory_mapping_t)(void *uc, uint64_t address);

/* SVM exit codes (AMD64 APM volume 2, appendix C). An intercept reaches the interrupt hook as INTERCEPT + code. */
enum {
    INTERCEPT = 0x100,
    SVM_EXIT_EXCEPTION = 0x40,
    SVM_EXIT_FIRST = 0x60,      /* bit 0 of x86_intercept_t.intercept */
    SVM_EXIT_HLT = 0x78,
    SVM_EXIT_INVLPGA = 0x7a,
    SVM_EXIT_MSR = 0x7c,
    SVM_EXIT_SHUTDOWN = 0x7f,
    SVM_EXIT_VMRUN = 0x80,
    SVM_EXIT_VMMCALL = 0x81,
    SVM_EXIT_VMLOAD = 0x82,
    SVM_EXIT_SKINIT = 0x86,
    SVM_EXIT_MONITOR = 0x8a,
    SVM_EXIT_MWAIT = 0x8b,
};
/* Fields of the control block that the library reads or writes (APM volume 2, appendix B). */
enum {
    VMCB_IOPM = 0x40,
    VMCB_MSRPM = 0x48,
    VMCB_EXIT_INFO_2 = 0x80,    /* the address of a page fault */
};

/* From unicorn.h and x86.h of Unicorn 2: values of its stable ABI. */
enum {
    UC_ARCH_X86 = 4,
    UC_MODE_64 = 8,
    UC_PROT_ALL = 7,
    UC_HOOK_INTR = 1,
    UC_HOOK_INSN = 2,
    UC_HOOK_BLOCK = 8,
    UC_HOOK_MEM_FETCH_PROT = 512,
    UC_HOOK_INSN_INVALID = 16384,
    UC_HOOK_EDGE_GENERATED = 32768,
    UC_X86_INS_IN = 218,
    UC_X86_INS_OUT = 500,
    UC_X86_INS_CPUID = 113,
    UC_X86_INS_RDTSC = 608,
    UC_X86_INS_SYSCALL = 699,
    UC_X86_REG_EFLAGS = 25,
    UC_X86_REG_RAX = 35,
    UC_X86_REG_RBX = 37,
    UC_X86_REG_RCX = 38,
    UC_X86_REG_RDX = 40,
    UC_X86_REG_RIP = 41,
    UC_X86_REG_RSP = 44,
    UC_X86_REG_RSI = 43,
    UC_X86_REG_CR0 = 50,
    UC_X86_REG_CR3 = 53,
    UC_X86_REG_CR4 = 54,
    UC_X86_REG_DR0 = 66,
    UC_X86_REG_R15 = 113,
    UC_X86_REG_XMM0 = 122,
    UC_X86_REG_IDTR = 242,
    UC_X86_REG_GDTR = 243,
    UC_X86_REG_MSR = 248,
    UC_X86_REG_FS_BASE = 250,
    UC_X86_REG_GS_BASE = 251,
    /* uc_ctl requests that write, with their number of arguments in bits 29:26 */
    UC_CTL_USE_EXITS = 4 | 1 << 26 | 1 << 30,
    UC_CTL_EXITS = 6 | 2 << 26 | 1 << 30,
    UC_CTL_TB_REMOVE = 9 | 2 << 26 | 1 << 30,
    UC_CTL_TB_FLUSH = 10 | 0 << 26 | 1 << 30,
    UC_CTL_TLB_FLUSH = 11 | 0 << 26 | 1 << 30,
    UC_CTL_TLB_TYPE = 12 | 1 << 26 | 1 << 30,
    UC_CTL_TCG_BUFFER_SIZE = 13 | 1 << 26 | 1 << 30,
};

typedef struct {
    uint64_t pc;
    uint16_t instructions;
    uint16_t size;
} uc_block_t;

typedef struct {
    uint32_t rid;
    uint64_t value;
} uc_msr_t;

typedef struct {
    uint16_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
} uc_mmr_t;

typedef uint64_t (*uc_mmio_read_t)(void *uc, uint64_t offset, unsigned size, void *user);
typedef void (*uc_mmio_write_t)(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user);

typedef struct {
    unsigned (*version)(unsigned *major, unsigned *minor);
    int (*open)(int arch, int mode, void **uc);
    int (*close)(void *uc);
    const char *(*strerror)(int code);
    int (*reg_read)(void *uc, int id, void *value);
    int (*reg_write)(void *uc, int id, const void *value);
    int (*mem_map_ptr)(void *uc, uint64_t address, size_t size, uint32_t perms, void *pointer);
    int (*mmio_map)(void *uc, uint64_t address, size_t size, uc_mmio_read_t read, void *read_user,
                    uc_mmio_write_t write, void *write_user);
    int (*hook_del)(void *uc, size_t hook);
    int (*hook_add)(void *uc, size_t *hook, int type, void *callback, void *user, uint64_t begin, uint64_t end, ...);
    int (*emu_start)(void *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count);
    int (*emu_stop)(void *uc);
    size_t (*context_size)(void *uc);
    int (*context_alloc)(void *uc, void **context);
    int (*context_save)(void *uc, void *context);
    int (*context_restore)(void *uc, void *context);
    int (*context_free)(void *context);
    int (*ctl)(void *uc, int control, ...);
    /* Not of the API, but exported as well. */
    uc_tlb_fill_t tlb_fill;
    uc_tlb_fill_t tlb_fill_virtual;
    uc_memory_mapping_t memory_mapping;
    void (*tlb_set_page)(void *cpu, uint64_t address, uint64_t physical, unsigned attributes, int rights, int mmu_index,
                         uint64_t size);
    void (*tlb_set_dirty)(void *cpu, uint64_t address);
    void (*loop_exit)(void *cpu);
    uint32_t (*fetch_byte)(void *state, uint64_t address);  /* as the translator does: may raise a page fault */
    void (*raise_exception)(void *state, int vector);       /* a long jump */
} unicorn_t;

#endif
