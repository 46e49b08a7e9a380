/*
 * Replaces a function that a loaded shared library imports, in this process and for this library only.
 *
 * A library calls what it imports through pointers that the dynamic linker filled in (System V ABI, "Global Offset
 * Table"). They are found by the library's relocation table; their pages may have been made read-only (RELRO).
 */
#ifndef VMBUS_IMPORTED_CALLS_H
#define VMBUS_IMPORTED_CALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <link.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int vmbus_write_pointer(void **where, void *value)
{
    uintptr_t page = (uintptr_t)where & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1);
    size_t size = (uintptr_t)(where + 1) - page;

    if (*where == value)
        return 0;
    if (mprotect((void *)page, size, PROT_READ | PROT_WRITE))
        return -1;
    *where = value;
    return 0;       /* the page stays writable: whether it was before is not known, and it holds data in any case */
}

/* Returns how many pointers to `name` now point to `function`, -1 if the library's tables are not understood. */
static int vmbus_replace_import(void *handle, const char *name, void *function)
{
    struct link_map *map;
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    const ElfW(Rela) *tables[2] = {NULL, NULL};
    size_t sizes[2] = {0, 0};
    int found = 0;

    if (dlinfo(handle, RTLD_DI_LINKMAP, &map))
        return -1;
    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++) {
        switch (entry->d_tag) {     /* addresses that glibc has relocated already */
        case DT_SYMTAB: symbols = (const void *)entry->d_un.d_ptr; break;
        case DT_STRTAB: names = (const void *)entry->d_un.d_ptr; break;
        case DT_JMPREL: tables[0] = (const void *)entry->d_un.d_ptr; break;
        case DT_PLTRELSZ: sizes[0] = entry->d_un.d_val; break;
        case DT_RELA: tables[1] = (const void *)entry->d_un.d_ptr; break;
        case DT_RELASZ: sizes[1] = entry->d_un.d_val; break;
        }
    }
    if (!symbols || !names || (const char *)symbols < (const char *)map->l_addr)
        return -1;
    for (int table = 0; table < 2; table++) {
        for (size_t n = 0; tables[table] && n < sizes[table] / sizeof(ElfW(Rela)); n++) {
            const ElfW(Rela) *rela = &tables[table][n];
            unsigned type = ELF64_R_TYPE(rela->r_info);
            const ElfW(Sym) *symbol = &symbols[ELF64_R_SYM(rela->r_info)];

            if ((type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT) || symbol->st_shndx != SHN_UNDEF
                    || strcmp(names + symbol->st_name, name))
                continue;
            if (vmbus_write_pointer((void **)(map->l_addr + rela->r_offset), function))
                return -1;
            found++;
        }
    }
    return found;
}

#endif
