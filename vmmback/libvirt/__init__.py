"""Domains of libvirt's on secret RAM."""
