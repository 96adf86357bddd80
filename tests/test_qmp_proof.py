"""The QMP proof, on what QEMU 7.2 really printed: q35 with 256 MiB where nothing else is said, port ranges cut short.

PAUSED: no VGA, before its first instruction. BOOTED_VGA: `-vga std`, after SeaBIOS had run. SPLIT: 4 GiB, half of it
above 4 GiB. TWO: two backends of 128 MiB, a NUMA node each. TEN: QEMU 10.0, paused, with aux-ram-share=on and a
firmware of 64 KiB.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmmback.errors import HandoffFailed, QemuFailed
from vmmback.guest import confirm
from vmmback.isolation import qmp_proof
from vmmback.isolation.probe import Target
from vmmback.isolation.qmp_proof import Proof, Range, parse_addresses, parse_flat_views, parse_ram_blocks
from vmmback.linux import procfs
from vmmback.linux.procfs import Mapping
from vmmback.report import MapRange, RamBlock, Verdict

PAUSED = """\
FlatView #0
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #1
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #2
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000008-000000000000000f (prio 0, i/o): dma-cont
  0000000000000010-000000000000001f (prio 0, i/o): io @0000000000000010

FlatView #3
 AS "mch", root: bus master container
 AS "ICH9-LPC", root: bus master container
 AS "ich9-ahci", root: bus master container
 AS "ICH9-SMB", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""
PAUSED_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000
                  pc.rom    4 KiB  0x0000000010040000 0x0000000000020000 0x0000000000020000
   /rom@etc/table-loader    4 KiB  0x0000000010280000 0x0000000000001000 0x0000000000010000
      /rom@etc/acpi/rsdp    4 KiB  0x00000000102c0000 0x0000000000001000 0x0000000000001000
"""
PAUSED_ANSWERS = """\
Host virtual address for 0x0 (ram0) is 0x7f345fe00000
Host virtual address for 0xbffff (ram0) is 0x7f345febffff
Host virtual address for 0xc0000 (pc.rom) is 0x7f34b6600000
Host virtual address for 0xdffff (pc.rom) is 0x7f34b661ffff
Host virtual address for 0xe0000 (pc.bios) is 0x7f34b6820000
Host virtual address for 0xfffff (pc.bios) is 0x7f34b683ffff
Host virtual address for 0x100000 (ram0) is 0x7f345ff00000
Host virtual address for 0xfffffff (ram0) is 0x7f346fdfffff
Host virtual address for 0xfffc0000 (pc.bios) is 0x7f34b6800000
Host virtual address for 0xffffffff (pc.bios) is 0x7f34b683ffff
"""

BOOTED_VGA = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000008-000000000000000f (prio 0, i/o): dma-cont
  0000000000000010-000000000000001f (prio 0, i/o): io @0000000000000010

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 AS "ich9-ahci", root: bus master container
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram0
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000c9fff (prio 0, rom): ram0 @00000000000c0000
  00000000000ca000-00000000000ccfff (prio 0, ram): ram0 @00000000000ca000
  00000000000cd000-00000000000e7fff (prio 0, rom): ram0 @00000000000cd000
  00000000000e8000-00000000000effff (prio 0, ram): ram0 @00000000000e8000
  00000000000f0000-00000000000fffff (prio 0, rom): ram0 @00000000000f0000
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000febf0000-00000000febf017f (prio 0, i/o): edid
  00000000febf0180-00000000febf03ff (prio 1, i/o): vga.mmio @0000000000000180
  00000000febf0400-00000000febf041f (prio 0, i/o): vga ioports remapped
  00000000febf0420-00000000febf04ff (prio 1, i/o): vga.mmio @0000000000000420
  00000000febf0500-00000000febf0515 (prio 0, i/o): bochs dispi interface
  00000000febf0516-00000000febf05ff (prio 1, i/o): vga.mmio @0000000000000516
  00000000febf0600-00000000febf0607 (prio 0, i/o): qemu extended regs
  00000000febf0608-00000000febf0fff (prio 1, i/o): vga.mmio @0000000000000608
  00000000febf1000-00000000febf1fff (prio 1, i/o): ahci
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fed1c000-00000000fed1ffff (prio 1, i/o): lpc-rcrb-mmio
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000c9fff (prio 0, rom): ram0 @00000000000c0000
  00000000000ca000-00000000000ccfff (prio 0, ram): ram0 @00000000000ca000
  00000000000cd000-00000000000e7fff (prio 0, rom): ram0 @00000000000cd000
  00000000000e8000-00000000000effff (prio 0, ram): ram0 @00000000000e8000
  00000000000f0000-00000000000fffff (prio 0, rom): ram0 @00000000000f0000
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000febf0000-00000000febf017f (prio 0, i/o): edid
  00000000febf0180-00000000febf03ff (prio 1, i/o): vga.mmio @0000000000000180
  00000000febf0400-00000000febf041f (prio 0, i/o): vga ioports remapped
  00000000febf0420-00000000febf04ff (prio 1, i/o): vga.mmio @0000000000000420
  00000000febf0500-00000000febf0515 (prio 0, i/o): bochs dispi interface
  00000000febf0516-00000000febf05ff (prio 1, i/o): vga.mmio @0000000000000516
  00000000febf0600-00000000febf0607 (prio 0, i/o): qemu extended regs
  00000000febf0608-00000000febf0fff (prio 1, i/o): vga.mmio @0000000000000608
  00000000febf1000-00000000febf1fff (prio 1, i/o): ahci
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fed1c000-00000000fed1ffff (prio 1, i/o): lpc-rcrb-mmio
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #3
 AS "mch", root: bus master container
 AS "ICH9-LPC", root: bus master container
 AS "ICH9-SMB", root: bus master container
 AS "VGA", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""
BOOTED_VGA_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
   0000:00:01.0/vga.vram    4 KiB  0x0000000010080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x00000000110c0000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000
                  pc.rom    4 KiB  0x0000000010040000 0x0000000000020000 0x0000000000020000
    0000:00:01.0/vga.rom    4 KiB  0x0000000011080000 0x0000000000010000 0x0000000000010000
   /rom@etc/table-loader    4 KiB  0x00000000112c0000 0x0000000000001000 0x0000000000010000
      /rom@etc/acpi/rsdp    4 KiB  0x0000000011300000 0x0000000000001000 0x0000000000001000
"""
BOOTED_VGA_ANSWERS = """\
Host virtual address for 0x0 (ram0) is 0x7fa6a7e00000
Host virtual address for 0x9ffff (ram0) is 0x7fa6a7e9ffff
Host virtual address for 0xc0000 (ram0) is 0x7fa6a7ec0000
Host virtual address for 0xc9fff (ram0) is 0x7fa6a7ec9fff
Host virtual address for 0xca000 (ram0) is 0x7fa6a7eca000
Host virtual address for 0xccfff (ram0) is 0x7fa6a7eccfff
Host virtual address for 0xcd000 (ram0) is 0x7fa6a7ecd000
Host virtual address for 0xe7fff (ram0) is 0x7fa6a7ee7fff
Host virtual address for 0xe8000 (ram0) is 0x7fa6a7ee8000
Host virtual address for 0xeffff (ram0) is 0x7fa6a7eeffff
Host virtual address for 0xf0000 (ram0) is 0x7fa6a7ef0000
Host virtual address for 0xfffff (ram0) is 0x7fa6a7efffff
Host virtual address for 0x100000 (ram0) is 0x7fa6a7f00000
Host virtual address for 0xfffffff (ram0) is 0x7fa6b7dfffff
Host virtual address for 0xfd000000 (vga.vram) is 0x7fa6a6c00000
Host virtual address for 0xfdffffff (vga.vram) is 0x7fa6a7bfffff
Host virtual address for 0xfffc0000 (pc.bios) is 0x7fa6fcc00000
Host virtual address for 0xffffffff (pc.bios) is 0x7fa6fcc3ffff
"""

SPLIT = """\
FlatView #0
 AS "mch", root: bus master container
 AS "ICH9-LPC", root: bus master container
 AS "ich9-ahci", root: bus master container
 AS "ICH9-SMB", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000008-000000000000000f (prio 0, i/o): dma-cont
  0000000000000010-000000000000001f (prio 0, i/o): io @0000000000000010

FlatView #2
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000007fffffff (prio 0, ram): ram0 @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000017fffffff (prio 0, ram): ram0 @0000000080000000

FlatView #3
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000007fffffff (prio 0, ram): ram0 @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000017fffffff (prio 0, ram): ram0 @0000000080000000
"""
SPLIT_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000100000000 0x0000000100000000
    /rom@etc/acpi/tables    4 KiB  0x0000000100080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000100000000 0x0000000000040000 0x0000000000040000
                  pc.rom    4 KiB  0x0000000100040000 0x0000000000020000 0x0000000000020000
   /rom@etc/table-loader    4 KiB  0x0000000100280000 0x0000000000001000 0x0000000000010000
      /rom@etc/acpi/rsdp    4 KiB  0x00000001002c0000 0x0000000000001000 0x0000000000001000
"""
SPLIT_ANSWERS = """\
Host virtual address for 0x0 (ram0) is 0x7f1f3be00000
Host virtual address for 0xbffff (ram0) is 0x7f1f3bebffff
Host virtual address for 0xc0000 (pc.rom) is 0x7f2082a00000
Host virtual address for 0xdffff (pc.rom) is 0x7f2082a1ffff
Host virtual address for 0xe0000 (pc.bios) is 0x7f2082c20000
Host virtual address for 0xfffff (pc.bios) is 0x7f2082c3ffff
Host virtual address for 0x100000 (ram0) is 0x7f1f3bf00000
Host virtual address for 0x7fffffff (ram0) is 0x7f1fbbdfffff
Host virtual address for 0xfffc0000 (pc.bios) is 0x7f2082c00000
Host virtual address for 0xffffffff (pc.bios) is 0x7f2082c3ffff
Host virtual address for 0x100000000 (ram0) is 0x7f1fbbe00000
Host virtual address for 0x17fffffff (ram0) is 0x7f203bdfffff
"""

TWO = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000008-000000000000000f (prio 0, i/o): dma-cont
  0000000000000010-000000000000001f (prio 0, i/o): io @0000000000000010

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 AS "cpu-memory-1", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-0000000007ffffff (prio 0, ram): ram0 @0000000000100000
  0000000008000000-000000000fffffff (prio 0, ram): ram1
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-0000000007ffffff (prio 0, ram): ram0 @0000000000100000
  0000000008000000-000000000fffffff (prio 0, ram): ram1
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #3
 AS "cpu-smm-1", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-0000000007ffffff (prio 0, ram): ram0 @0000000000100000
  0000000008000000-000000000fffffff (prio 0, ram): ram1
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #4
 AS "mch", root: bus master container
 AS "ICH9-LPC", root: bus master container
 AS "ich9-ahci", root: bus master container
 AS "ICH9-SMB", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""
TWO_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
                    ram1    4 KiB  0x0000000008000000 0x0000000008000000 0x0000000008000000
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000
                  pc.rom    4 KiB  0x0000000010040000 0x0000000000020000 0x0000000000020000
   /rom@etc/table-loader    4 KiB  0x0000000010280000 0x0000000000001000 0x0000000000010000
      /rom@etc/acpi/rsdp    4 KiB  0x00000000102c0000 0x0000000000001000 0x0000000000001000
"""

TEN = """\
FlatView #0
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): ram0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000effff (prio 0, ram): ram0 @00000000000e0000
  00000000000f0000-00000000000fffff (prio 0, rom): pc.bios
  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000ffff0000-00000000ffffffff (prio 0, rom): pc.bios
"""
TEN_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                    ram0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007fe3e7fff000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000 0x00007fe43d200000  ro
                  pc.rom    4 KiB  0x0000000010040000 0x0000000000020000 0x0000000000020000 0x00007fe43d600000  ro
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000010000 0x0000000000010000 0x00007fe43d800000  ro
   /rom@etc/table-loader    4 KiB  0x0000000010280000 0x0000000000001000 0x0000000000010000 0x00007fe43d000000  ro
      /rom@etc/acpi/rsdp    4 KiB  0x00000000102c0000 0x0000000000001000 0x0000000000001000 0x00007fe43ce00000  ro
"""
TEN_ANSWERS = """\
Host virtual address for 0x0 (ram0) is 0x7fe3e7fff000
Host virtual address for 0xbffff (ram0) is 0x7fe3e80befff
Host virtual address for 0xc0000 (pc.rom) is 0x7fe43d600000
Host virtual address for 0xdffff (pc.rom) is 0x7fe43d61ffff
Host virtual address for 0xe0000 (ram0) is 0x7fe3e80df000
Host virtual address for 0xeffff (ram0) is 0x7fe3e80eefff
Host virtual address for 0xf0000 (pc.bios) is 0x7fe43d800000
Host virtual address for 0xfffff (pc.bios) is 0x7fe43d80ffff
Host virtual address for 0x100000 (ram0) is 0x7fe3e80ff000
Host virtual address for 0xfffffff (ram0) is 0x7fe3f7ffefff
Host virtual address for 0xffff0000 (pc.bios) is 0x7fe43d800000
Host virtual address for 0xffffffff (pc.bios) is 0x7fe43d80ffff
"""

INODE, PID = 64210, 4321
MIB = 1 << 20
ALL_BLOCKS = {
    "ram0": 256 * MIB,
    "/rom@etc/acpi/tables": 2 * MIB,
    "pc.bios": 256 << 10,
    "pc.rom": 128 << 10,
    "/rom@etc/table-loader": 64 << 10,
    "/rom@etc/acpi/rsdp": 4 << 10,
}

Variant = Callable[[str], str]
VARIANTS: dict[str, Variant] = {
    "LF": str,
    "CRLF": lambda text: text.replace("\n", "\r\n"),  # as QEMU's human monitor ends its lines
    "blank lines": lambda text: f"\r\n{text}\r\n\r\n",
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


# ---- what QEMU prints ------------------------------------------------------------------------------------------------


def memory_of(text: str) -> list[Range]:
    """Return the ranges of the first flat view that have memory behind them."""
    return [one for one in parse_flat_views(text)[0] if one.is_memory]


@variants
def test_the_view_of_a_paused_guest(variant: Variant) -> None:
    assert memory_of(variant(PAUSED)) == [
        Range(0x0, 0xBFFFF, "ram", "ram0", 0),
        Range(0xC0000, 0xDFFFF, "rom", "pc.rom", 0),
        Range(0xE0000, 0xFFFFF, "rom", "pc.bios", 0x20000),
        Range(0x100000, 0xFFFFFFF, "ram", "ram0", 0x100000),
        Range(0xFFFC0000, 0xFFFFFFFF, "rom", "pc.bios", 0),
    ]


@variants
def test_the_view_after_firmware_has_run_with_its_shadows_and_the_video_ram(variant: Variant) -> None:
    assert [(hex(one.first), one.type, one.region) for one in memory_of(variant(BOOTED_VGA))] == [
        ("0x0", "ram", "ram0"),
        ("0xc0000", "rom", "ram0"),
        ("0xca000", "ram", "ram0"),
        ("0xcd000", "rom", "ram0"),
        ("0xe8000", "ram", "ram0"),
        ("0xf0000", "rom", "ram0"),
        ("0x100000", "ram", "ram0"),
        ("0xfd000000", "ram", "vga.vram"),
        ("0xfffc0000", "rom", "pc.bios"),
    ]


@variants
def test_ram_on_both_sides_of_the_hole_below_4_gib_is_one_block(variant: Variant) -> None:
    ram = [one for one in memory_of(variant(SPLIT)) if one.region == "ram0"]
    assert [(one.first, one.last, one.offset) for one in ram] == [
        (0, 0xBFFFF, 0),
        (0x100000, 0x7FFFFFFF, 0x100000),
        (0x1_0000_0000, 0x1_7FFF_FFFF, 0x8000_0000),
    ]


@variants
def test_two_backends_are_two_blocks(variant: Variant) -> None:
    assert {one.region for one in memory_of(variant(TWO)) if one.guest_writable} == {"ram0", "ram1"}


@pytest.mark.parametrize("text", [PAUSED, BOOTED_VGA, SPLIT, TWO], ids=["paused", "vga", "split", "two"])
def test_the_view_of_memory_comes_first_wherever_qemu_prints_it_and_none_is_lost(text: str) -> None:
    views = parse_flat_views(text)
    assert len(views) == text.count("FlatView #")
    assert views[0][0] == Range(0, views[0][0].last, "ram", "ram0", 0)
    assert sum(map(len, views)) == text.count("(prio ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("(prio 0, ram): ram0 KVM", Range(0, 0xFFF, "ram", "ram0", 0)),
        ("(prio 0, ram): ram0 @0000000000100000 KVM", Range(0, 0xFFF, "ram", "ram0", 0x100000)),
        ("(prio -1, i/o): vga ioports remapped", Range(0, 0xFFF, "i/o", "vga ioports remapped", 0)),
        ("(prio 0, nv-ram): nvdimm0", Range(0, 0xFFF, "nv-ram", "nvdimm0", 0)),
    ],
)
def test_a_line_of_a_flat_view(line: str, expected: Range) -> None:
    assert parse_flat_views(f'FlatView #0\n AS "memory", root: system\n  {0:016x}-{0xFFF:016x} {line}\n') == [
        [expected]
    ]


@pytest.mark.parametrize(
    ("kind", "is_memory", "guest_writable"),
    [
        ("ram", True, True),
        ("ramd", True, True),
        ("nv-ram", True, True),
        ("rom", True, False),
        ("romd", True, False),
        ("nv-rom", True, False),
        ("i/o", False, False),
    ],
)
def test_which_types_have_memory_and_which_of_it_the_guest_can_write(
    kind: str, is_memory: bool, guest_writable: bool
) -> None:
    one = Range(0, 0xFFF, kind, "x", 0)
    assert (one.is_memory, one.guest_writable) == (is_memory, guest_writable)


@pytest.mark.parametrize(
    "text",
    ["", "unknown command: 'info mtree'", PAUSED.replace('"memory"', '"memories"'), 'FlatView #0\n AS "memory"\n'],
    ids=["nothing", "an error", "no such space", "no ranges"],
)
def test_a_qemu_without_the_view_of_memory_has_failed(text: str) -> None:
    with pytest.raises(QemuFailed, match='no flat view of address space "memory"'):
        parse_flat_views(text)


@variants
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PAUSED_BLOCKS, ALL_BLOCKS),
        (SPLIT_BLOCKS, {**ALL_BLOCKS, "ram0": 4096 * MIB}),
        (TWO_BLOCKS, {**ALL_BLOCKS, "ram0": 128 * MIB, "ram1": 128 * MIB}),
        (
            BOOTED_VGA_BLOCKS,
            {**ALL_BLOCKS, "0000:00:01.0/vga.vram": 16 * MIB, "0000:00:01.0/vga.rom": 64 << 10},
        ),
    ],
    ids=["paused", "split", "two", "vga"],
)
def test_ram_blocks_have_the_size_to_which_they_may_grow(variant: Variant, text: str, expected: dict[str, int]) -> None:
    assert parse_ram_blocks(variant(text)) == expected


def test_ram_blocks_of_a_later_qemu_which_adds_columns() -> None:
    # system/physmem.c, ram_block_format, since QEMU 8.0: the host virtual address, and whether it is read-only.
    line = "ram0    2 MiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f345fe00000  rw"
    assert parse_ram_blocks(line) == {"ram0": 256 * MIB}
    assert parse_addresses(line) == {"ram0": 0x7F345FE00000}


def test_an_earlier_qemu_tells_no_addresses_of_its_blocks() -> None:
    assert parse_addresses(PAUSED_BLOCKS) == {}


# ---- the proof -------------------------------------------------------------------------------------------------------


def secret(start: int, size: int, inode: int = INODE, path: str = "/secretmem (deleted)") -> Mapping:
    return Mapping(start, start + size, "rw-s", 0, "00:0e", inode, path)


def ordinary(start: int, size: int) -> Mapping:
    return Mapping(start, start + size, "rw-p", 0, "00:00", 0, "")


# Where QEMU's answers say that its blocks lie.
PAUSED_RAM, PAUSED_ROM, PAUSED_BIOS = 0x7F345FE00000, 0x7F34B6600000, 0x7F34B6800000
VGA_RAM, VGA_VRAM, VGA_BIOS = 0x7FA6A7E00000, 0x7FA6A6C00000, 0x7FA6FCC00000
SPLIT_RAM, SPLIT_ROM, SPLIT_BIOS = 0x7F1F3BE00000, 0x7F2082A00000, 0x7F2082C00000


@dataclass(frozen=True)
class Machine:
    """What a QEMU answers and how its process is mapped; as it stands, a paused guest on secret RAM."""

    tree: str = PAUSED
    blocks: str = PAUSED_BLOCKS
    answers: str = PAUSED_ANSWERS
    size: int = 256 * MIB
    auxiliary: frozenset[int] = frozenset()
    ram: dict[int, int] | None = None
    line_end: str = "\n"
    mappings: tuple[Mapping, ...] = field(
        default=(
            secret(PAUSED_RAM, 256 * MIB),
            ordinary(PAUSED_ROM, 128 << 10),
            ordinary(PAUSED_BIOS, 256 << 10),
        )
    )

    def with_ram(self, *mappings: Mapping) -> Machine:
        return replace(self, mappings=(*mappings, *self.mappings[1:]))

    async def hmp(self, line: str) -> str:
        if line == "info mtree -f":
            return self.tree
        if line == "info ramblock":
            return self.blocks
        _, address = line.split("gpa2hva ")
        found = [answer for answer in self.answers.splitlines() if f" for {address} (" in answer]
        return (found or [f"No memory is mapped at address {address}"])[0] + self.line_end


def prove(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Proof:
    def maps(pid: int) -> list[Mapping]:
        assert pid == PID
        return list(machine.mappings)

    monkeypatch.setattr(procfs, "maps", maps)
    return asyncio.run(
        qmp_proof.observe(Target(PID, machine.ram or {INODE: machine.size}, auxiliary=machine.auxiliary), machine.hmp)
    )


@pytest.mark.parametrize("changes", [1, 3])
def test_a_map_that_changes_while_it_is_looked_at_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    """What firmware does as it boots. The answers are of the map as it stands in the end, and fit no earlier one."""
    earlier = [PAUSED.replace("0000000000100000-", f"0000000000{n}00000-", 1) for n in range(2, 2 + changes)]
    for tree in earlier:  # as it would be judged, did it stand still
        assert prove(monkeypatch, replace(Machine(), tree=tree)).observation.target is Verdict.READABLE
    trees = iter(earlier)
    machine = Machine()
    original = machine.hmp

    async def hmp(line: str) -> str:
        return next(trees, PAUSED) if line == "info mtree -f" else await original(line)

    monkeypatch.setattr(Machine, "hmp", staticmethod(hmp))
    assert prove(monkeypatch, machine).observation.target is Verdict.BLOCKED


def test_a_map_that_never_stands_still_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.count()
    machine = Machine()
    original = machine.hmp

    async def hmp(line: str) -> str:
        return f"{PAUSED}\n{next(turns)}" if line == "info mtree -f" else await original(line)

    monkeypatch.setattr(Machine, "hmp", staticmethod(hmp))
    with pytest.raises(QemuFailed, match="changed its memory map"):
        prove(monkeypatch, machine)


def block(proof: Proof, name: str) -> RamBlock:
    (found,) = [one for one in proof.ram_blocks if one.name == name]
    return found


VGA = Machine(
    BOOTED_VGA,
    BOOTED_VGA_BLOCKS,
    BOOTED_VGA_ANSWERS,
    mappings=(ordinary(VGA_VRAM, 16 * MIB), secret(VGA_RAM, 256 * MIB), ordinary(VGA_BIOS, 256 << 10)),
)
BOOTED = replace(
    VGA,
    tree="\n".join(line for line in BOOTED_VGA.splitlines() if "vga.vram" not in line),
    blocks="\n".join(line for line in BOOTED_VGA_BLOCKS.splitlines() if "vga.vram" not in line),
)
SPLIT_MACHINE = Machine(
    SPLIT,
    SPLIT_BLOCKS,
    SPLIT_ANSWERS,
    size=4096 * MIB,
    mappings=(secret(SPLIT_RAM, 4096 * MIB), ordinary(SPLIT_ROM, 128 << 10), ordinary(SPLIT_BIOS, 256 << 10)),
)
BLOCKED: dict[str, Machine] = {
    "paused": Machine(),
    "firmware has run": BOOTED,
    "4 GiB": SPLIT_MACHINE,
    "answers as a terminal gets them": Machine(line_end="\r\n"),
    "split VMAs": Machine().with_ram(  # as madvise(2) leaves them
        secret(PAUSED_RAM, 4096),
        secret(PAUSED_RAM + 4096, 8192),
        secret(PAUSED_RAM + 12288, 256 * MIB - 12288),
    ),
}


@variants
@pytest.mark.parametrize("machine", BLOCKED.values(), ids=BLOCKED.keys())
def test_blocked_when_all_ram_lies_in_our_secret_inode(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, variant: Variant
) -> None:
    printed = replace(machine, tree=variant(machine.tree), blocks=variant(machine.blocks))
    proof = prove(monkeypatch, printed)
    assert (proof.observation.target, proof.observation.control) == (Verdict.BLOCKED, Verdict.READABLE)
    assert proof.observation.probe == "qmp-proof"
    assert proof.secret == machine.size
    assert proof.ours == {INODE: {"ram0": machine.size}}
    assert block(proof, "ram0") == RamBlock(name="ram0", size=machine.size, backing="secretmem", guest_writable=True)
    assert block(proof, "pc.bios") == RamBlock(name="pc.bios", size=256 << 10, backing="ordinary", guest_writable=False)
    assert {one.name for one in proof.ram_blocks if one.guest_writable} == {"ram0"}
    assert len(proof.ram_blocks) == len(machine.blocks.splitlines()) - 1  # each block that QEMU has is told of


def answering(region: str, address: int, hva: int) -> Machine:
    """A QEMU that answers differently for one guest physical address."""
    return Machine(
        answers="\n".join(
            f"Host virtual address for {address:#x} ({region}) is {hva:#x}" if f" for {address:#x} (" in line else line
            for line in PAUSED_ANSWERS.splitlines()
        )
    )


EXPOSED: dict[str, Machine] = {
    "all ordinary": Machine().with_ram(ordinary(PAUSED_RAM, 256 * MIB)),
    "a memfd": Machine().with_ram(secret(PAUSED_RAM, 256 * MIB, path="/memfd:vmmback-ordinary (deleted)")),
    "secret RAM of another": Machine().with_ram(secret(PAUSED_RAM, 256 * MIB, inode=INODE + 1)),
    "not mapped": Machine().with_ram(),
    "the second half ordinary": Machine().with_ram(
        secret(PAUSED_RAM, 128 * MIB), ordinary(PAUSED_RAM + 128 * MIB, 128 * MIB)
    ),
    "the first half ordinary": Machine().with_ram(
        ordinary(PAUSED_RAM, 128 * MIB), secret(PAUSED_RAM + 128 * MIB, 128 * MIB)
    ),
    "the last page missing": Machine().with_ram(secret(PAUSED_RAM, 256 * MIB - 4096)),
    "a page in the middle ordinary": Machine().with_ram(
        secret(PAUSED_RAM, MIB), ordinary(PAUSED_RAM + MIB, 4096), secret(PAUSED_RAM + MIB + 4096, 255 * MIB - 4096)
    ),
    "the last byte elsewhere": answering("ram0", 0xFFFFFFF, PAUSED_RAM + 0xFFFFFFE),
    "another region at the last byte": answering("pc.rom", 0xFFFFFFF, PAUSED_RAM + 0xFFFFFFF),
    "one range at odds with the other": Machine(
        answers=PAUSED_ANSWERS.replace("0x7f345ff00000", "0x7f345ff01000").replace("0x7f346fdfffff", "0x7f346fe00fff")
    ),
    "no answer for the first byte": Machine(answers="\n".join(PAUSED_ANSWERS.splitlines()[1:])),
    "no answer at all": Machine(answers=""),
    "known to a device's address space alone": Machine(
        tree=PAUSED.replace("  No rendered FlatView", "  0000000000000000-000000000000ffff (prio 0, ram): stray")
    ),
}


@pytest.mark.parametrize("machine", EXPOSED.values(), ids=EXPOSED.keys())
def test_readable_when_the_guest_can_write_to_what_is_not_shown_to_be_ours(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    proof = prove(monkeypatch, machine)
    assert proof.observation.target is Verdict.READABLE
    exposed = [one for one in proof.ram_blocks if one.guest_writable and one.backing == "ordinary"]
    assert [one.name for one in exposed] == ["stray" if "stray" in machine.tree else "ram0"]
    assert f"the guest can write to ordinary memory: {exposed[0].name}" in proof.observation.detail


def test_the_memfd_of_a_control_is_ours_but_not_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = prove(monkeypatch, EXPOSED["a memfd"])
    assert proof.ours == {INODE: {"ram0": 256 * MIB}}
    assert proof.secret == 0


def test_video_ram_is_found_by_its_device_and_exposes_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = prove(monkeypatch, VGA)
    assert proof.observation.target is Verdict.READABLE
    assert block(proof, "0000:00:01.0/vga.vram") == RamBlock(
        name="0000:00:01.0/vga.vram", size=16 * MIB, backing="ordinary", guest_writable=True
    )
    assert block(proof, "ram0").backing == "secretmem"
    assert proof.ours == {INODE: {"ram0": 256 * MIB}}
    assert "vga.vram" not in {one.name for one in proof.ram_blocks}  # one block, not two


def test_video_ram_that_is_secret_is_no_exposure_but_more_than_the_guest_has(monkeypatch: pytest.MonkeyPatch) -> None:
    mappings = (secret(VGA_VRAM, 16 * MIB), *VGA.mappings[1:])
    proof = prove(monkeypatch, replace(VGA, mappings=mappings))
    assert block(proof, "0000:00:01.0/vga.vram").backing == "secretmem"
    assert proof.secret == 272 * MIB
    assert proof.observation.target is Verdict.INCONCLUSIVE


def without_address(blocks: str) -> str:
    return "\n".join(line.partition(" 0x00007f")[0] for line in blocks.splitlines())


def without(region: str, tree: str) -> str:
    return "\n".join(line for line in tree.splitlines() if not line.partition("): ")[2].startswith(region))


def test_a_block_that_no_view_shows_counts_as_writable_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = prove(monkeypatch, Machine(tree=without("ram0", PAUSED)))
    assert proof.observation.target is Verdict.READABLE
    assert block(proof, "ram0") == RamBlock(name="ram0", size=256 * MIB, backing="ordinary", guest_writable=True)


@pytest.mark.parametrize(
    ("name", "is_writable"),
    [
        ("0000:01:00.0/virtio-net-pci.rom", False),
        ("0000:00:01.0:00.0/e1000e.rom", False),
        ("isa-bios", False),
        ("/objects/x.rom", True),  # guest RAM of an early machine type
        ("x.rom", True),
        ("0000:01:00.0/x.rom/y", True),
        ("0000:01:00.0/xrom", True),
        ("0000:01:00.0/erst.exchange", True),
    ],
)
def test_of_the_blocks_that_no_view_shows_roms_alone_are_never_written_to(
    monkeypatch: pytest.MonkeyPatch, name: str, is_writable: bool
) -> None:
    line = f"{name}    4 KiB  0x0000000020000000 0x0000000000001000 0x0000000000001000\n"
    proof = prove(monkeypatch, Machine(blocks=PAUSED_BLOCKS + line))
    assert block(proof, name).guest_writable is is_writable
    assert proof.observation.target is (Verdict.READABLE if is_writable else Verdict.BLOCKED)


@pytest.mark.parametrize("size", [255 * MIB, 257 * MIB])
def test_inconclusive_when_the_block_has_not_the_size_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    assert prove(monkeypatch, replace(Machine(), size=size)).observation.target is Verdict.INCONCLUSIVE


def test_a_region_that_qemu_lists_no_block_for_counts_with_what_is_seen_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = "\n".join(line for line in PAUSED_BLOCKS.splitlines() if " ram0 " not in line)
    proof = prove(monkeypatch, Machine(blocks=blocks))
    assert block(proof, "ram0") == RamBlock(name="ram0", size=256 * MIB, backing="secretmem", guest_writable=True)
    assert proof.observation.target is Verdict.BLOCKED


CONTROLS_LOST: dict[str, Machine] = {
    "firmware not mapped": replace(Machine(), mappings=Machine().mappings[:1]),
    "firmware in secret RAM": replace(
        Machine(),
        mappings=(
            secret(PAUSED_RAM, 256 * MIB),
            secret(PAUSED_ROM, 128 << 10),
            secret(PAUSED_BIOS, 256 << 10),
        ),
    ),
    "no firmware in the view": Machine(tree=without("pc.", PAUSED)),
}


@pytest.mark.parametrize("machine", CONTROLS_LOST.values(), ids=CONTROLS_LOST.keys())
def test_without_firmware_in_ordinary_memory_there_is_no_control(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    observation = prove(monkeypatch, machine).observation
    assert observation.control is Verdict.INCONCLUSIVE
    assert "the control failed" in observation.detail


def test_the_control_names_what_was_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove(monkeypatch, Machine()).observation.detail == (
        "all 262144 KiB lie in secretmem inode 64210; pc.bios was told apart as ordinary"
    )


def test_a_silent_qemu_is_an_error_not_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QemuFailed):
        prove(monkeypatch, Machine(tree=""))


@pytest.mark.parametrize("how", ["no mappings", "no process"])
def test_a_qemu_that_ends_meanwhile_is_no_exposure(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It has dropped its memory, and was or was not reaped yet."""

    def maps(_: int) -> list[Mapping]:
        if how == "no process":
            raise FileNotFoundError
        return []

    monkeypatch.setattr(procfs, "maps", maps)
    with pytest.raises(QemuFailed, match="QEMU ended during the QMP proof"):
        asyncio.run(qmp_proof.observe(Target(PID, {INODE: 256 * MIB}), Machine().hmp))


def test_a_range_that_cannot_be_read_is_an_error_and_not_left_out() -> None:
    with pytest.raises(QemuFailed, match="in a way not known here"):
        parse_flat_views(PAUSED.replace("(prio 0, ram): ram0", "[prio 0] ram: ram0", 1))


# ---- a QEMU whose other blocks are secret too ------------------------------------------------------------------------

TEN_RAM, TEN_TABLES, TEN_BIOS = 0x7FE3E7FFF000, 0x7FE43D200000, 0x7FE43D800000
TEN_OTHERS = {
    0x7FE43CE00000: 4 << 10,
    0x7FE43D000000: 64 << 10,
    TEN_TABLES: 2 * MIB,
    0x7FE43D600000: 128 << 10,
    TEN_BIOS: 64 << 10,
}
HEAP = Mapping(0x55DF516C7000, 0x55DF52570000, "rw-p", 0, "00:00", 0, "[heap]")
TEN_MACHINE = Machine(
    TEN,
    TEN_BLOCKS,
    TEN_ANSWERS,
    auxiliary=frozenset(range(1, 6)),
    mappings=(
        HEAP,
        secret(TEN_RAM, 256 * MIB),
        *(secret(start, size, inode) for inode, (start, size) in enumerate(TEN_OTHERS.items(), start=1)),
    ),
)


def with_mapping(start: int, mapping: Mapping) -> Machine:
    """TEN_MACHINE with another mapping at an address."""
    mappings = tuple(mapping if one.start == start else one for one in TEN_MACHINE.mappings)
    return replace(TEN_MACHINE, mappings=mappings)


def test_all_blocks_are_secret_and_the_ram_is_counted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = prove(monkeypatch, TEN_MACHINE)
    assert (proof.observation.target, proof.observation.control) == (Verdict.BLOCKED, Verdict.READABLE)
    assert proof.observation.detail == (
        "all 262144 KiB lie in secretmem inode 64210; QEMU's heap was told apart as ordinary"
    )
    assert {one.backing for one in proof.ram_blocks} == {"secretmem"}
    assert proof.secret == 256 * MIB
    assert proof.ours == {INODE: {"ram0": 256 * MIB}}
    assert proof.auxiliary == {name: size for name, size in TEN_SIZES.items() if name != "ram0"}
    assert {one.name for one in proof.ram_blocks if one.guest_writable} == {"ram0"}


TEN_SIZES = {**ALL_BLOCKS, "pc.bios": 64 << 10}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (with_mapping(TEN_TABLES, ordinary(TEN_TABLES, 2 * MIB)), "/rom@etc/acpi/tables"),
        (with_mapping(TEN_TABLES, secret(TEN_TABLES, 2 * MIB - 4096, 3)), "/rom@etc/acpi/tables"),
        (with_mapping(TEN_TABLES, secret(TEN_TABLES, 2 * MIB, 6)), "/rom@etc/acpi/tables"),
        (with_mapping(TEN_TABLES, secret(TEN_TABLES, 2 * MIB, 3, "/memfd:x (deleted)")), "/rom@etc/acpi/tables"),
        (with_mapping(TEN_BIOS, ordinary(TEN_BIOS, 64 << 10)), "pc.bios"),
        (replace(TEN_MACHINE, blocks=TEN_BLOCKS.replace("3d800000  ro", "3d200000  ro")), "pc.bios"),
        (replace(TEN_MACHINE, blocks=TEN_BLOCKS.replace("0x00007fe43d200000  ro", "")), "/rom@etc/acpi/tables"),
    ],
    ids=[
        "ordinary",
        "one page short",
        "secret but of another",
        "a memfd with such an inode",
        "ordinary and in the view",
        "the list at odds with the view",
        "QEMU does not tell where",
    ],
)
def test_a_block_that_is_not_shown_to_be_secret_is_ordinary(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, name: str
) -> None:
    proof = prove(monkeypatch, machine)
    assert [one.name for one in proof.ram_blocks if one.backing == "ordinary"] == [name]
    assert name not in proof.auxiliary
    assert proof.observation.target is Verdict.BLOCKED  # the guest cannot write to it
    assert proof.observation.control is Verdict.READABLE


def test_the_guests_ram_in_an_auxiliary_descriptor_is_not_its_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secret, but not the memory that was prefaulted, counted and will be checked."""
    proof = prove(monkeypatch, with_mapping(TEN_RAM, secret(TEN_RAM, 256 * MIB, 1)))
    assert (proof.secret, proof.ours) == (0, {INODE: {}})
    assert proof.auxiliary["ram0"] == 256 * MIB
    assert proof.observation.target is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    "machine",
    [
        replace(TEN_MACHINE, mappings=TEN_MACHINE.mappings[1:]),
        replace(TEN_MACHINE, tree=without("pc.", TEN), blocks=without_address(TEN_BLOCKS)),
    ],
    ids=["no heap", "no firmware"],
)
def test_where_all_is_secret_the_control_needs_the_heap_and_firmware_elsewhere(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    assert prove(monkeypatch, machine).observation.control is Verdict.INCONCLUSIVE


# ---- RAM in several descriptors -----------------------------------------------------------------------------------


TWO_STARTS = {"ram0": PAUSED_RAM, "ram1": PAUSED_RAM + 256 * MIB, "pc.rom": PAUSED_ROM, "pc.bios": PAUSED_BIOS}
TWO_RAM = {INODE: 128 * MIB, INODE + 1: 128 * MIB}


def two_descriptors(*mappings: Mapping) -> Machine:
    """The guest of two backends, mapped so; QEMU's answers follow from where its blocks lie."""
    answers = [
        f"Host virtual address for {address:#x} ({one.region}) is "
        f"{TWO_STARTS[one.region] + one.offset + address - one.first:#x}"
        for one in parse_flat_views(TWO)[0]
        if one.is_memory
        for address in (one.first, one.last)
    ]
    machine = replace(Machine(), tree=TWO, blocks=TWO_BLOCKS, answers="\n".join(answers), ram=TWO_RAM)
    return replace(machine, mappings=(*mappings, *machine.mappings[1:]))


def test_ram_in_two_descriptors_is_the_sum_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = secret(TWO_STARTS["ram0"], 128 * MIB), secret(TWO_STARTS["ram1"], 128 * MIB, INODE + 1)
    proof = prove(monkeypatch, two_descriptors(first, second))
    assert proof.observation.target is Verdict.BLOCKED, proof.observation
    assert (proof.secret, proof.ours) == (256 * MIB, {INODE: {"ram0": 128 * MIB}, INODE + 1: {"ram1": 128 * MIB}})
    assert f"inode {INODE}, {INODE + 1}" in proof.observation.detail


@pytest.mark.parametrize(
    ("second", "verdict", "secret_bytes"),
    [
        (ordinary(TWO_STARTS["ram1"], 128 * MIB), Verdict.READABLE, 128 * MIB),
        (secret(TWO_STARTS["ram1"], 128 * MIB, INODE + 2), Verdict.READABLE, 128 * MIB),
        (secret(TWO_STARTS["ram1"], 128 * MIB - 4096, INODE + 1), Verdict.READABLE, 128 * MIB),
        (secret(TWO_STARTS["ram1"], 128 * MIB, INODE), Verdict.INCONCLUSIVE, 256 * MIB),
    ],
    ids=["ordinary", "secret of another", "one page short", "twice in the first"],
)
def test_one_of_two_descriptors_does_not_answer_for_the_other(
    monkeypatch: pytest.MonkeyPatch, second: Mapping, verdict: Verdict, secret_bytes: int
) -> None:
    proof = prove(monkeypatch, two_descriptors(secret(TWO_STARTS["ram0"], 128 * MIB), second))
    assert (proof.observation.target, proof.secret) == (verdict, secret_bytes)
    rams = [SimpleNamespace(inode=inode, size=size, backing="secret") for inode, size in TWO_RAM.items()]
    with pytest.raises(HandoffFailed, match="not where it must be"):
        confirm(cast("Any", rams), proof)


# ---- the memory map --------------------------------------------------------------------------------------------------


def test_the_memory_map_is_what_the_guest_sees_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prove(monkeypatch, Machine()).memory_map
    assert [(one.first, one.last, one.kind, one.region, one.backing, one.guest_writable) for one in found] == [
        (0x0, 0xBFFFF, "ram", "ram0", "secretmem", True),
        (0xC0000, 0xDFFFF, "rom", "pc.rom", "ordinary", False),
        (0xE0000, 0xFFFFF, "rom", "pc.bios", "ordinary", False),
        (0x100000, 0xFFFFFFF, "ram", "ram0", "secretmem", True),
        (0xFEC00000, 0xFEC00FFF, "device", "ioapic", "none", False),
        (0xFED00000, 0xFED003FF, "device", "hpet", "none", False),
        (0xFEE00000, 0xFEEFFFFF, "device", "apic-msi", "none", False),
        (0xFFFC0000, 0xFFFFFFFF, "rom", "pc.bios", "ordinary", False),
    ]


def test_the_memory_map_of_a_qemu_whose_other_blocks_are_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prove(monkeypatch, TEN_MACHINE).memory_map
    assert {one.backing for one in found if one.block} == {"secretmem"}
    assert [one.block for one in found] == [
        "ram0", "pc.rom", "ram0", "pc.bios", "ram0", "", "", "", "pc.bios",
    ]  # fmt: skip


def test_the_memory_map_tells_a_block_by_its_device_and_the_part_that_is_ordinary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vga = prove(monkeypatch, VGA).memory_map
    assert [one for one in vga if one.region == "vga.vram"] == [
        MapRange(
            first=0xFD000000,
            last=0xFDFFFFFF,
            kind="ram",
            region="vga.vram",
            block="0000:00:01.0/vga.vram",
            backing="ordinary",
            guest_writable=True,
        )
    ]
    half = prove(monkeypatch, EXPOSED["the second half ordinary"]).memory_map
    ram = [one.backing for one in half if one.region == "ram0"]
    assert ram == ["secretmem", "ordinary"]  # below 640 KiB, and the rest, half of which is not
