"""What this host can give a guest: memory, a QEMU, an accelerator, descriptors."""
