/* SPDX-License-Identifier: GPL-2.0-only */
/* The few kernel types the test programs name. */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_SOCKHASH = 18,
	BPF_MAP_TYPE_ARENA = 33,
	BPF_MAP_TYPE_HEAP = 34,
};

enum {
	BPF_F_MMAPABLE = 1024,
	BPF_F_HEAP_TRANS = 1 << 19,
};

struct __sk_buff {
	__u32 len;
};

#endif
