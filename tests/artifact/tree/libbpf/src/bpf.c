// SPDX-License-Identifier: BSD-3-Clause
/* Map creation, as far as it has the shape of libbpf's. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bpf.h"
#include "libbpf.h"

/* The head of bpf(2)'s attributes for BPF_MAP_CREATE. */
union bpf_attr {
	struct {
		unsigned int map_type, key_size, value_size, max_entries, map_flags;
		unsigned int inner_map_fd, numa_node;
		char map_name[16];
		unsigned int map_ifindex, btf_fd, btf_key_type_id, btf_value_type_id, btf_vmlinux_value_type_id;
		unsigned long long map_extra;
	};
};

enum { BPF_MAP_CREATE };

static int sys_bpf_fd(int command, union bpf_attr *attr, unsigned int size)
{
	return syscall(SYS_bpf, command, attr, size);
}

int bpf_map_create(enum bpf_map_type map_type, const char *map_name, unsigned int key_size, unsigned int value_size,
		   unsigned int max_entries, const struct bpf_map_create_opts *opts)
{
	union bpf_attr attr;
	int fd;

	memset(&attr, 0, sizeof(attr));
	attr.map_type = map_type;
	if (map_name)
		strncpy(attr.map_name, map_name, sizeof(attr.map_name) - 1);
	attr.key_size = key_size;
	attr.value_size = value_size;
	attr.max_entries = max_entries;
	attr.map_flags = opts ? opts->map_flags : 0;

	fd = sys_bpf_fd(BPF_MAP_CREATE, &attr, sizeof(attr));
	return fd;
}
