/*
 * Fills a heap as KFlex's user-space program does, to measure what it takes: a bump pointer over the heap is the
 * only extent hook of a jemalloc arena (no split, no merge), and each allocation is made twice, from the arena and
 * from the bump pointer. The heap is address space; nothing of it is touched.
 *
 *	fill BYTES OBJECTS CPUS BUCKET_BYTES BUFFER_BYTES
 *
 * prints one line of JSON: whether all of it fitted, and how many bytes of the heap were taken.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* jemalloc's public interface (jemalloc(3)); its header is not installed everywhere, the library is. */
typedef struct extent_hooks_s extent_hooks_t;
struct extent_hooks_s {
	void *(*alloc)(extent_hooks_t *, void *, size_t, size_t, bool *, bool *, unsigned int);
	void *others[8];
};
int mallctl(const char *name, void *old, size_t *old_size, void *new, size_t new_size);
void *mallocx(size_t size, int flags);
#define MALLOCX_ARENA_(index) ((int)((index) + 1) << 20)
#define MALLOCX_TCACHE_NONE_  (1 << 8)

static const uint64_t classes[] = {16, 32, 64, 96, 128, 192};
#define CLASSES (sizeof(classes) / sizeof(classes[0]))
#define HEADER	16
#define PER_CPU 512
#define CACHE	352

static char *heap;
static uint64_t heap_size, taken;
static unsigned int arena;

static void *bump(uint64_t size)
{
	char *at = heap + taken;

	size = (size + 7) & ~7ULL;
	if (size > heap_size - taken)
		return NULL;
	taken += size;
	return at;
}

static void *extent(extent_hooks_t *hooks, void *wanted, size_t size, size_t alignment, bool *zero, bool *commit,
		    unsigned int index)
{
	void *at = bump(size);

	(void)hooks, (void)wanted, (void)alignment, (void)commit, (void)index;
	if (at && *zero)
		memset(at, 0, size);
	return at;
}

static bool allocate(uint64_t size)
{
	(void)mallocx(size, MALLOCX_ARENA_(arena) | MALLOCX_TCACHE_NONE_);
	return bump(size) != NULL;
}

static bool fill(uint64_t objects)
{
	for (unsigned int class = 0; class < CLASSES; class ++)
		for (uint64_t n = 0; n < objects; n++)
			if (!allocate(classes[class] + HEADER))
				return false;
	return true;
}

static bool fill_all(uint64_t objects, uint64_t cpus, uint64_t bucket_bytes, uint64_t buffer_bytes)
{
	if (!allocate(4096) || !allocate(CACHE * cpus))
		return false;
	for (uint64_t cpu = 0; cpu < cpus; cpu++)
		if (!fill(PER_CPU))
			return false;
	return allocate(CACHE) && fill(objects) && allocate(32 + 8 * cpus) && allocate(bucket_bytes) && allocate(256) &&
	       allocate(buffer_bytes * cpus) && allocate(buffer_bytes * cpus);
}

int main(int argc, char **argv)
{
	static extent_hooks_t hooks = {.alloc = extent};
	extent_hooks_t *given = &hooks;
	size_t size = sizeof(arena);
	bool ok;

	if (argc != 6)
		return 2;
	heap_size = strtoull(argv[1], NULL, 10);
	heap = mmap(NULL, heap_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (heap == MAP_FAILED || mallctl("arenas.create", &arena, &size, &given, sizeof(given)))
		return 1;
	ok = fill_all(strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10),
		      strtoull(argv[5], NULL, 10));
	printf("{\"fits\": %s, \"taken\": %llu}\n", ok ? "true" : "false", (unsigned long long)taken);
	return 0;
}
