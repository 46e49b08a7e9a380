"""Compiled modules: the ring, guest memory, dispatch and the instruction interpreter; built from `ext/`."""
