# An ATA PIO driver for a guest without enlightenments: flat 64-bit long mode, ring 0.
#
# Assembled (GNU as) into the bytes of ata_pio.py; a test compares the two. The code is position-independent and is
# entered at `start` with RDI = first request, ESI = number of requests, RSP = a stack; it executes the requests in
# order, writes a result into each, and halts with interrupts disabled. `isr` belongs into the IDT entry of line 14.
#
# It does what a careful driver must and nothing more: one read of the alternate status as the 400 ns delay after a
# command or block, one read of the status register per poll (or per interrupt), one REP INSW or OUTSW per block.

        .intel_syntax noprefix
        .code64
        .text

# struct request (vmbus.emulated.guest.Request)
        .set    BUFFER, 0               # u64, guest physical
        .set    LBA, 8                  # u64
        .set    SECTORS, 16             # u32
        .set    OPERATION, 20           # u8
        .set    FLAGS, 21               # u8
        .set    BLOCK, 22               # u16: sectors per DRQ block
        .set    RESULT, 24              # u32: 0, or FAILED | status << 8 | error, or BAD_REQUEST
        .set    REQUEST, 32

        .set    IDENTIFY, 0
        .set    READ, 1
        .set    WRITE, 2
        .set    FLUSH, 3
        .set    SET_MULTIPLE, 4
        .set    RESET, 5

        .set    EXTENDED, 1             # flags: 48-bit commands
        .set    MULTIPLE, 2             # READ and WRITE MULTIPLE
        .set    INTERRUPT, 4            # wait for interrupts instead of polling
        .set    LOOP, 8                 # single IN and OUT instructions instead of REP

        .set    DATA_PORT, 0x1f0
        .set    ERROR_PORT, 0x1f1
        .set    COUNT_PORT, 0x1f2
        .set    DEVICE_PORT, 0x1f6
        .set    STATUS_PORT, 0x1f7
        .set    CONTROL_PORT, 0x3f6

        .set    BSY, 0x80
        .set    DF, 0x20
        .set    DRQ, 0x08
        .set    ERR, 0x01

        .set    POLLS, 1000000          # before a poll gives up
        .set    TIMEOUT, 0x10000
        .set    FAILED, 0x20000
        .set    BAD_REQUEST, 0x40000
        .set    APIC_EOI, 0xfee000b0

        .globl  start, isr, spurious
start:
        cld
        mov     r12, rdi
        mov     r13d, esi
next_request:
        test    r13d, r13d
        jz      finished
        movzx   ebx, byte ptr [r12 + FLAGS]
        movzx   r15d, word ptr [r12 + BLOCK]
        mov     r14d, [r12 + SECTORS]
        call    dispatch
        mov     [r12 + RESULT], eax
        add     r12, REQUEST
        dec     r13d
        jmp     next_request
finished:
        cli
        hlt
        jmp     finished

dispatch:
        movzx   eax, byte ptr [r12 + OPERATION]
        cmp     eax, READ
        je      read
        cmp     eax, WRITE
        je      write
        cmp     eax, FLUSH
        je      flush
        cmp     eax, IDENTIFY
        je      identify
        cmp     eax, SET_MULTIPLE
        je      set_multiple
        cmp     eax, RESET
        je      reset
        mov     eax, BAD_REQUEST
        ret

# Data in

identify:
        mov     ecx, 0xec
        mov     r14d, 1
        mov     r15d, 1
        jmp     data_in
read:
        lea     rdx, [rip + read_commands]
        mov     eax, ebx
        and     eax, EXTENDED | MULTIPLE
        movzx   ecx, byte ptr [rdx + rax]
data_in:
        call    issue
        mov     rdi, [r12 + BUFFER]
in_block:
        call    await_status
        test    al, ERR | DF
        jnz     failed
        test    al, DRQ
        jz      failed
        call    take_block
        mov     edx, DATA_PORT
        test    bl, LOOP
        jnz     in_word
        rep insw
        jmp     in_done
in_word:
        in      ax, dx
        stosw
        dec     ecx
        jnz     in_word
in_done:
        test    r14d, r14d
        jnz     in_block
        xor     eax, eax
        ret

# Data out: the device asks for the first block without an interrupt

write:
        lea     rdx, [rip + write_commands]
        mov     eax, ebx
        and     eax, EXTENDED | MULTIPLE
        movzx   ecx, byte ptr [rdx + rax]
        call    issue
        mov     rsi, [r12 + BUFFER]
        call    poll
out_block:
        test    al, ERR | DF
        jnz     failed
        test    al, DRQ
        jz      failed
        call    take_block
        mov     edx, DATA_PORT
        test    bl, LOOP
        jnz     out_word
        rep outsw
        jmp     out_done
out_word:
        lodsw
        out     dx, ax
        dec     ecx
        jnz     out_word
out_done:
        call    await_status
        test    r14d, r14d
        jnz     out_block
        jmp     conclude

# Commands without data

flush:
        mov     ecx, 0xe7
        test    bl, EXTENDED
        jz      no_data
        mov     ecx, 0xea
        jmp     no_data
set_multiple:
        mov     ecx, 0xc6
no_data:
        call    issue
        call    await_status
conclude:
        test    eax, TIMEOUT | ERR | DF
        jnz     failed
        xor     eax, eax
        ret

reset:                                  # software reset; nIEN stays set unless interrupts are wanted
        mov     ecx, 2
        test    bl, INTERRUPT
        jz      pulse
        xor     ecx, ecx
pulse:
        mov     edx, CONTROL_PORT
        lea     eax, [rcx + 4]
        out     dx, al
        in      al, dx
        mov     eax, ecx
        out     dx, al
        call    poll
        mov     dword ptr [rip + interrupts], 0
        jmp     conclude

# EAX = the result of a command that ended with status AL

failed:
        mov     ecx, eax
        and     ecx, TIMEOUT
        mov     ah, al
        mov     edx, ERROR_PORT
        in      al, dx
        movzx   eax, ax
        or      eax, ecx
        or      eax, FAILED             # never 0, whatever the device says
        ret

# ECX = words of the next block; R14D = sectors that remain behind it

take_block:
        mov     ecx, r15d
        cmp     ecx, r14d
        cmova   ecx, r14d
        sub     r14d, ecx
        shl     ecx, 8
        ret

# Write the task file and the command CL for R14D sectors

issue:
        mov     rax, [r12 + LBA]
        mov     edx, DEVICE_PORT
        test    bl, EXTENDED
        jnz     issue_extended
        shr     rax, 24
        and     al, 0x0f
        or      al, 0xe0
        out     dx, al
        jmp     issue_low
issue_extended:
        mov     al, 0x40
        out     dx, al
        mov     eax, r14d               # the previous contents: the high bytes
        shr     eax, 8
        mov     edx, COUNT_PORT
        out     dx, al
        mov     rax, [r12 + LBA]
        shr     rax, 24
        inc     edx
        out     dx, al
        shr     rax, 8
        inc     edx
        out     dx, al
        shr     rax, 8
        inc     edx
        out     dx, al
issue_low:
        mov     eax, r14d
        mov     edx, COUNT_PORT
        out     dx, al
        mov     rax, [r12 + LBA]
        inc     edx
        out     dx, al
        shr     rax, 8
        inc     edx
        out     dx, al
        shr     rax, 8
        inc     edx
        out     dx, al
        mov     eax, ecx
        mov     edx, STATUS_PORT
        out     dx, al
        ret

# EAX = status of a device that is no longer busy, or status with TIMEOUT

await_status:
        test    bl, INTERRUPT
        jnz     wait_interrupt
poll:
        mov     edx, CONTROL_PORT
        in      al, dx                  # 400 ns
        mov     edx, STATUS_PORT
        mov     ecx, POLLS
poll_again:
        in      al, dx
        test    al, BSY
        jz      polled
        cmp     al, 0xff                # a floating bus: there is no drive
        je      gone
        pause
        dec     ecx
        jnz     poll_again
gone:
        movzx   eax, al
        or      eax, TIMEOUT | ERR
        ret
polled:
        movzx   eax, al
        ret
wait_interrupt:
        cli
        cmp     dword ptr [rip + interrupts], 0
        jne     interrupted
        sti                             # its shadow covers HLT: no wake-up is lost
        hlt
        jmp     wait_interrupt
interrupted:
        dec     dword ptr [rip + interrupts]
        movzx   eax, byte ptr [rip + status]
        sti
        ret

# Line 14: reading the status acknowledges the device; then the end of interrupt for the local APIC

isr:
        push    rax
        push    rdx
        mov     edx, STATUS_PORT
        in      al, dx
        mov     [rip + status], al
        inc     dword ptr [rip + interrupts]
        mov     eax, APIC_EOI
        mov     dword ptr [rax], 0
        pop     rdx
        pop     rax
        iretq

# Any other line: nobody here is interested

spurious:
        push    rax
        mov     eax, APIC_EOI
        mov     dword ptr [rax], 0
        pop     rax
        iretq

read_commands:                          # by EXTENDED | MULTIPLE
        .byte   0x20, 0x24, 0xc4, 0x29
write_commands:
        .byte   0x30, 0x34, 0xc5, 0x39
        .balign 4
interrupts:
        .long   0
status:
        .long   0
