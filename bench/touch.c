/* The rival of the prefault: map a new memfd_secret descriptor, store one byte to each page, in so many threads, and drop
 * the page tables again: what is left is a descriptor whose pages are present, as after vmmback's own prefault.
 *
 *     touch BYTES THREADS
 *
 * Prints the seconds from the descriptor's making to the end of that, as vmmback's own figure counts them.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define MAX_THREADS 256

struct part {
	char *start;
	size_t size;
};

static void *touch(void *argument)
{
	const struct part *part = argument;

	for (size_t offset = 0; offset < part->size; offset += PAGE)
		((volatile char *)part->start)[offset] = 1;
	return NULL;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	pthread_t threads[MAX_THREADS];
	struct part parts[MAX_THREADS];
	size_t size = argc == 3 ? strtoull(argv[1], NULL, 10) : 0;
	size_t count = argc == 3 ? strtoull(argv[2], NULL, 10) : 0;
	double started = now();
	int descriptor;
	char *memory;

	if (!size || !count || count > MAX_THREADS || size % (count * PAGE)) {
		fprintf(stderr, "usage: touch BYTES THREADS, where BYTES is a multiple of THREADS pages\n");
		return 2;
	}
	descriptor = syscall(SYS_memfd_secret, O_CLOEXEC);
	if (descriptor < 0 || ftruncate(descriptor, size)) {
		perror("memfd_secret");
		return 1;
	}
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	for (size_t i = 0; i < count; i++) {
		parts[i] = (struct part){ memory + i * (size / count), size / count };
		if (pthread_create(&threads[i], NULL, touch, &parts[i])) {
			perror("pthread_create");
			return 1;
		}
	}
	for (size_t i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	munmap(memory, size);
	printf("%.6f\n", now() - started);
	return 0;
}
