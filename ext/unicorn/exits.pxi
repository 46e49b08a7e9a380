# Exits that the hypervisor answers: the way from the library's hooks to Python and back.


cdef void _event(cpu_t *m) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.on_event(m.ticks)
    except BaseException as error:
        cpu._fail(error)


cdef void _look(cpu_t *m) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.on_look(m.ticks)
    except BaseException as error:
        cpu._fail(error)


cdef int _accept(cpu_t *m, bint nmi) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        if nmi:
            vector = 2 if cpu.take_nmi() else None
            if vector is not None:
                m.head.hflags2 |= HF2_NMI
        else:
            vector = cpu.pop_interrupt()
        cpu.after()
        return -1 if vector is None else vector
    except BaseException as error:
        cpu._fail(error)
        return -1


cdef void _exit_msr(cpu_t *m, bint write) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint32_t index = m.head.regs[RCX] & MASK32
    cdef uint64_t value = m.head.regs[RAX] & MASK32 | m.head.regs[RDX] << 32
    try:
        _look_soon(m)
        cpu.before(m.ticks)
        try:
            if write:
                cpu.wrmsr(index, value)
            else:
                value = cpu.rdmsr(index)
        except cpu.fault as fault:
            _deliver(m, fault.vector, _has_error(fault.vector), 0)
            return
        finally:
            cpu.after()
        if not write:
            m.head.regs[RAX] = value & MASK32
            m.head.regs[RDX] = value >> 32
        m.head.rip += 2
    except BaseException as error:
        cpu._fail(error)


cdef void _exit_hypercall(cpu_t *m) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint8_t xmm[96]
    cdef int index
    cdef uint64_t control = m.head.regs[RCX]
    cdef bytes registers = b""
    try:
        _look_soon(m)
        cpu.before(m.ticks)
        if control & 0x10000:                       # a fast call may have input in XMM0 to XMM5
            for index in range(6):
                m.lib.reg_read(m.uc, UC_X86_REG_XMM0 + index, xmm + 16 * index)
            registers = xmm[:96]
        try:
            m.head.regs[RAX] = cpu.hypercall(control, m.head.regs[RDX], m.head.regs[R8], registers)
        except cpu.fault as fault:
            _deliver(m, fault.vector, _has_error(fault.vector), 0)
            return
        finally:
            cpu.after()
        m.head.rip += 3
    except BaseException as error:
        cpu._fail(error)


cdef void _exit_halt(cpu_t *m, bint interruptible) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        cpu.on_halt(m.ticks, interruptible)
    except BaseException as error:
        cpu._fail(error)


# A stop takes effect at the end of the block. But what was to stop behind one port access must not do the next one. The
# state is that before the instruction (the translator sees to that inside of an SVM guest), so it is left right there.


cdef void _leave(cpu_t *m) noexcept nogil:
    _uncount(m)
    m.lib.emu_stop(m.uc)
    m.lib.loop_exit(m.cpu)                          # a long jump


cdef uint32_t _on_in(void *uc, uint32_t port, int size, void *user) noexcept nogil:
    cdef cpu_t *m = <cpu_t *>user
    if m.stopping:
        _leave(m)
    return _exit_in(m, port, size)


cdef void _on_out(void *uc, uint32_t port, int size, uint32_t value, void *user) noexcept nogil:
    cdef cpu_t *m = <cpu_t *>user
    if m.stopping:
        _leave(m)
    _exit_out(m, port, size, value)


cdef uint32_t _exit_in(cpu_t *m, uint32_t port, int size) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint32_t value = <uint32_t>MASK32
    try:
        _look_soon(m)
        cpu.before(m.ticks)
        value = cpu.io_read(port, size)
        cpu.after_port()
        if m.code[m.memory_size >> 12]:
            m.next_event = 0                        # the device wrote over translated code
    except BaseException as error:
        cpu._fail(error)
    return value


cdef void _exit_out(cpu_t *m, uint32_t port, int size, uint32_t value) noexcept with gil:
    cdef Cpu cpu = <Cpu>m.owner
    try:
        _look_soon(m)
        cpu.before(m.ticks)
        cpu.io_write(port, size, value)
        cpu.after_port()
        if m.code[m.memory_size >> 12]:
            m.next_event = 0                        # the device wrote over translated code
    except BaseException as error:
        cpu._fail(error)


cdef uint64_t _on_mmio_read(void *uc, uint64_t offset, unsigned size, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint64_t value = 0
    try:
        _look_soon(m)
        cpu.before(m.ticks)
        value = cpu.mmio_read(m.memory_size + offset, size)
        cpu.after()
    except BaseException as error:
        cpu._fail(error)
    return value


cdef void _on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    try:
        _look_soon(m)
        cpu.before(m.ticks)
        cpu.mmio_write(m.memory_size + offset, size, value)
        cpu.after()
    except BaseException as error:
        cpu._fail(error)


cdef int _on_cpuid(void *uc, void *user) noexcept with gil:
    cdef cpu_t *m = <cpu_t *>user
    cdef Cpu cpu = <Cpu>m.owner
    cdef uint64_t rax = 0, rbx = 0, rcx = 0, rdx = 0
    m.lib.reg_read(uc, UC_X86_REG_RAX, &rax)
    m.lib.reg_read(uc, UC_X86_REG_RCX, &rcx)
    _look_soon(m)
    try:
        rax, rbx, rcx, rdx = cpu.cpuid(rax & MASK32, rcx & MASK32)
    except BaseException as error:
        cpu._fail(error)
    m.lib.reg_write(uc, UC_X86_REG_RAX, &rax)
    m.lib.reg_write(uc, UC_X86_REG_RBX, &rbx)
    m.lib.reg_write(uc, UC_X86_REG_RCX, &rcx)
    m.lib.reg_write(uc, UC_X86_REG_RDX, &rdx)
    return 1
