# The data path of a DEC 21140 driver for a guest without enlightenments: flat 64-bit long mode, ring 0.
#
# Assembled (GNU as) into the bytes of tulip_io.py; a test compares the two. Position-independent. Two entries, both
# with RDI = struct nic, RSI = array of struct frame, EDX = how many, RSP = a stack; both store how many frames they
# handled and halt with interrupts disabled. `isr` belongs into the IDT entry of the adapter's line.
#
# Like Linux's tulip driver it writes one poll demand for each frame sent, asks for an interrupt twice a transmit
# ring, lets the adapter fetch frames where they are, and copies received ones out of the ring.

        .intel_syntax noprefix
        .code64
        .text

# struct nic (vmbus.emulated.guest.Nic)
        .set    REGISTERS, 0            # u64: address of CSR0 in memory, or its port
        .set    PORTS, 8                # u32: registers are ports
        .set    ENTRIES, 12             # u32: descriptors of each ring, a power of two
        .set    TX_RING, 16             # u64
        .set    RX_RING, 24             # u64
        .set    TX_HEAD, 32             # u32: frames ever queued
        .set    RX_HEAD, 36             # u32: frames ever taken
        .set    STATUS, 40              # u32: CSR5 bits that interrupts have shown
        .set    INTERRUPTS, 44          # u32
        .set    RESULT, 48              # u32: frames handled
        .set    DROPPED, 52             # u32: received frames with errors, or in more than one buffer

# struct frame (vmbus.emulated.guest.FrameBuffer)
        .set    BUFFER, 0               # u64
        .set    LENGTH, 8               # u32
        .set    FRAME, 16

        .set    OWN, 0x80000000
        .set    RX_ERROR, 0x8000
        .set    RX_WHOLE, 0x300         # first and last
        .set    CHECK_SEQUENCE, 4
        .set    TX_INTERRUPT, 0x80000000
        .set    TX_WHOLE, 0x60000000    # first and last
        .set    TX_END_OF_RING, 0x02000000
        .set    RECEIVE_NO_BUFFER, 0x80
        .set    ACKNOWLEDGE, 0x1ffff
        .set    CSR1, 1
        .set    CSR2, 2
        .set    CSR5, 5
        .set    APIC_EOI, 0xfee000b0

        .globl  send, receive, isr, spurious

send:
        call    enter
send_frame:
        cmp     r15d, r14d
        jae     finish
        mov     r8d, [r12 + ENTRIES]
        dec     r8d
        mov     r9d, [r12 + TX_HEAD]
        mov     eax, r9d
        and     eax, r8d
        shl     eax, 4
        mov     rbx, [r12 + TX_RING]
        add     rbx, rax
        cmp     dword ptr [rbx], 0
        js      finish                  # the ring is full
        mov     rax, [r13 + BUFFER]
        mov     [rbx + 8], eax
        mov     ecx, [r13 + LENGTH]
        or      ecx, TX_WHOLE
        inc     r9d
        mov     eax, r9d
        shl     eax, 1                  # an interrupt when half a ring has been sent
        and     eax, r8d
        jnz     no_interrupt
        or      ecx, TX_INTERRUPT
no_interrupt:
        test    r9d, r8d
        jnz     not_last
        or      ecx, TX_END_OF_RING
not_last:
        mov     [rbx + 4], ecx
        mov     dword ptr [rbx], OWN
        mov     [r12 + TX_HEAD], r9d
        mov     ecx, CSR1
        mov     eax, 1
        call    csr_write
        add     r13, FRAME
        inc     r15d
        jmp     send_frame

receive:
        call    enter
        sti                             # take what is pending
        nop
        nop
        cli
receive_frame:
        cmp     r15d, r14d
        jae     refill
        mov     r8d, [r12 + ENTRIES]
        dec     r8d
        mov     eax, [r12 + RX_HEAD]
        and     eax, r8d
        shl     eax, 4
        mov     rbx, [r12 + RX_RING]
        add     rbx, rax
        mov     eax, [rbx]
        test    eax, eax
        js      refill                  # the adapter's
        test    eax, RX_ERROR
        jnz     drop
        mov     ecx, eax
        and     ecx, RX_WHOLE
        cmp     ecx, RX_WHOLE
        jne     drop
        shr     eax, 16
        and     eax, 0x3fff
        sub     eax, CHECK_SEQUENCE
        jbe     drop
        mov     [r13 + LENGTH], eax
        mov     ecx, eax
        mov     esi, [rbx + 8]
        mov     rdi, [r13 + BUFFER]
        rep movsb
        add     r13, FRAME
        inc     r15d
        jmp     give_back
drop:
        inc     dword ptr [r12 + DROPPED]
give_back:
        mov     dword ptr [rbx], OWN
        inc     dword ptr [r12 + RX_HEAD]
        jmp     receive_frame
refill:
        test    dword ptr [r12 + STATUS], RECEIVE_NO_BUFFER
        jz      finish
        and     dword ptr [r12 + STATUS], ~RECEIVE_NO_BUFFER
        mov     ecx, CSR2
        mov     eax, 1
        call    csr_write
finish:
        mov     [r12 + RESULT], r15d
stop:
        cli
        hlt
        jmp     stop

enter:
        cld
        mov     [rip + nic], rdi
        mov     r12, rdi
        mov     r13, rsi
        mov     r14d, edx
        xor     r15d, r15d
        ret

# Register ECX = EAX; clobbers RDX

csr_write:
        mov     rdx, [rip + nic]
        cmp     dword ptr [rdx + PORTS], 0
        mov     rdx, [rdx + REGISTERS]
        lea     rdx, [rdx + 8 * rcx]
        jne     csr_out
        mov     [rdx], eax
        ret
csr_out:
        out     dx, eax
        ret

# EAX = register ECX; clobbers RDX

csr_read:
        mov     rdx, [rip + nic]
        cmp     dword ptr [rdx + PORTS], 0
        mov     rdx, [rdx + REGISTERS]
        lea     rdx, [rdx + 8 * rcx]
        jne     csr_in
        mov     eax, [rdx]
        ret
csr_in:
        in      eax, dx
        ret

isr:
        push    rax
        push    rcx
        push    rdx
        mov     ecx, CSR5
        call    csr_read
        mov     rdx, [rip + nic]
        or      [rdx + STATUS], eax
        inc     dword ptr [rdx + INTERRUPTS]
        and     eax, ACKNOWLEDGE
        call    csr_write
        mov     eax, APIC_EOI
        mov     dword ptr [rax], 0
        pop     rdx
        pop     rcx
        pop     rax
        iretq

# Any other line: nobody here is interested

spurious:
        push    rax
        mov     eax, APIC_EOI
        mov     dword ptr [rax], 0
        pop     rax
        iretq

        .balign 8
nic:
        .quad   0
