/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef LIBBPF_LIBBPF_H
#define LIBBPF_LIBBPF_H

#ifdef __cplusplus
extern "C" {
#endif

enum bpf_map_type { BPF_MAP_TYPE_ARENA = 33, BPF_MAP_TYPE_HEAP = 34 };

struct bpf_map {
	const char *name;
	unsigned int type;
	unsigned int max_entries;
	int fd;
	void *mmaped;
	void *heap_addr;
};

struct bpf_object {
	struct bpf_map *maps;
	unsigned int nr_maps;
};

int bpf_object__load(struct bpf_object *obj);
void *bpf_map__heap_address(const struct bpf_map *map);
const char *libbpf_bpf_map_type_str(enum bpf_map_type type);

#ifdef __cplusplus
}
#endif

#endif
