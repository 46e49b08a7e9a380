# What the library does when it gives up
#
# Where its authors saw no way on, the library calls abort() or exit(): for a far call through a gate while no task state
# segment is present, for example. That is a guest's doing and must not end the process with everything else in it. So
# these calls come here, and for a processor that runs on this thread they end its run with an error. The way out of the
# depths of a translation or an instruction is the long jump that the library itself takes for a page fault there. Anybody
# else's call ends the process as ever.

cdef extern from "<stdlib.h>" nogil:
    void abort()
    void exit(int status)

cdef extern from "imported_calls.h" nogil:
    int vmbus_replace_import(void *handle, const char *name, void *function)


cdef void _give_up() noexcept nogil:
    """End the run of the processor that runs on this thread, if there is one."""
    cdef cpu_t *m = <cpu_t *>vmbus_running
    if m != NULL and not m.given_up:
        m.given_up = True
        _halt_with(m, 0)
        m.lib.emu_stop(m.uc)
        m.lib.loop_exit(m.cpu)                      # a long jump


cdef void _on_abort() noexcept nogil:
    _give_up()
    abort()


cdef void _on_exit(int status) noexcept nogil:
    _give_up()
    exit(status)


cdef int _catch_giving_up(void *handle) except -1:
    if (vmbus_replace_import(handle, b"abort", <void *>_on_abort) < 1
            or vmbus_replace_import(handle, b"exit", <void *>_on_exit) < 1):
        raise EngineError("this build of the unicorn library cannot be kept from ending the process: "
                          "install unicorn==2.1.4 from PyPI")
    return 0
