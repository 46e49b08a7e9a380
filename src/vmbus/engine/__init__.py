"""What executes a guest: runs a virtual processor until it exits to the hypervisor."""
