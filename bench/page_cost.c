/* What the first touch of a secret page consists of, on one processor while a thread keeps the next one awake:
 *
 *     page_cost BYTES
 *
 * Prints microseconds: the first touch of a page of memfd_secret(2), of memfd_create(2), and one interrupt to the other
 * processor with the wait for its answer, which is what membarrier(2) does for a process that runs on both
 * (kernel/sched/membarrier.c), and what secretmem_fault does for each page to flush the translation of the direct map
 * (mm/secretmem.c; arch/x86/mm/tlb.c, flush_tlb_kernel_range).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define INTERRUPTS 20000

static int processors[2];
static atomic_int awake, finished;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now_us(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void run_on(int processor)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(processor, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("sched_setaffinity");
}

static void *keep_awake(void *unused)
{
	(void)unused;
	run_on(processors[1]);
	atomic_store(&awake, 1);
	while (!atomic_load_explicit(&finished, memory_order_relaxed))
		;
	return NULL;
}

static double touch_us(int descriptor, size_t size)
{
	double started;
	char *memory;

	if (descriptor < 0 || ftruncate(descriptor, size))
		fail("ftruncate");
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	started = now_us();
	for (size_t offset = 0; offset < size; offset += PAGE)
		((volatile char *)memory)[offset] = 1;
	started = now_us() - started;
	munmap(memory, size);
	close(descriptor);
	return started / (size / PAGE);
}

static double interrupt_us(void)
{
	double started = now_us();

	for (int i = 0; i < INTERRUPTS; i++)
		if (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0))
			fail("membarrier");
	return (now_us() - started) / INTERRUPTS;
}

int main(int argc, char **argv)
{
	size_t size = argc == 2 ? strtoull(argv[1], NULL, 10) : 0;
	int found = 0;
	pthread_t thread;
	cpu_set_t set;

	if (!size || size % PAGE) {
		fprintf(stderr, "usage: page_cost BYTES, a multiple of the page\n");
		return 2;
	}
	if (sched_getaffinity(0, sizeof(set), &set))
		fail("sched_getaffinity");
	for (int processor = 0; processor < CPU_SETSIZE && found < 2; processor++)
		if (CPU_ISSET(processor, &set))
			processors[found++] = processor;
	if (found < 2) {
		fprintf(stderr, "page_cost: needs two processors\n");
		return 1;
	}
	if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0))
		fail("membarrier");
	run_on(processors[0]);
	if (pthread_create(&thread, NULL, keep_awake, NULL))
		fail("pthread_create");
	while (!atomic_load(&awake))
		;
	printf("%.3f", touch_us(syscall(SYS_memfd_secret, O_CLOEXEC), size));
	printf(" %.3f", touch_us(memfd_create("page_cost", MFD_CLOEXEC), size));
	printf(" %.3f\n", interrupt_us());
	atomic_store(&finished, 1);
	pthread_join(thread, NULL);
	return 0;
}
