/* How fast the kernel reads its own memory: work whose time goes, in part, to misses of the translation buffer (TLB).
 *
 * kernel_reads BYTES FILES FOLDER ROUNDS
 * BYTES of a memfd are filled, FILES files made in FOLDER (a tmpfs). A line for each round: nanoseconds for a pread(2) of
 * 64 bytes at random places of the memfd, for the same in its first 64 MiB, for a stat(2) of a random file, and
 * microseconds for a posix_spawn(3) of /bin/true. Exit code 1, with a message, if anything fails.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, READ = 64, SMALL = 64 << 20, FILL = 1 << 20 };
enum { READS = 300000, STATS = 100000, SPAWNS = 100 };

extern char **environ;

/* Marsaglia's xorshift: the same places in each run. */
static uint64_t random_number(void)
{
    static uint64_t state = 88172645463325252ull;

    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int filled_memfd(size_t size)
{
    static char block[FILL];
    int memory = memfd_create("kernel-reads", MFD_CLOEXEC);

    if (memory < 0 || ftruncate(memory, (off_t)size) < 0)
        err(1, "memfd");
    for (size_t index = 0; index < sizeof block; index++)
        block[index] = (char)(index * 7);
    for (size_t offset = 0; offset < size; offset += FILL)
        if (pwrite(memory, block, FILL, (off_t)offset) != FILL)
            err(1, "pwrite");
    return memory;
}

static double read_ns(int memory, size_t size)
{
    char buffer[READ];
    double start = seconds();

    for (int count = 0; count < READS; count++) {
        uint64_t page = random_number() % (size / PAGE);
        uint64_t line = random_number() % (PAGE / READ);

        if (pread(memory, buffer, READ, (off_t)(page * PAGE + line * READ)) != READ)
            err(1, "pread");
    }
    return (seconds() - start) / READS * 1e9;
}

static void name_of(char *path, size_t size, const char *folder, unsigned long number)
{
    snprintf(path, size, "%s/f%lu", folder, number);
}

static double stat_ns(const char *folder, unsigned long files)
{
    char path[4096];
    struct stat found;
    double start = seconds();

    for (int count = 0; count < STATS; count++) {
        name_of(path, sizeof path, folder, random_number() % files);
        if (stat(path, &found) < 0)
            err(1, "%s", path);
    }
    return (seconds() - start) / STATS * 1e9;
}

static double spawn_us(void)
{
    char *arguments[] = {"true", NULL};
    double start = seconds();

    for (int count = 0; count < SPAWNS; count++) {
        pid_t child;

        errno = posix_spawn(&child, "/bin/true", NULL, NULL, arguments, environ);
        if (errno || waitpid(child, NULL, 0) != child)
            err(1, "posix_spawn");
    }
    return (seconds() - start) / SPAWNS * 1e6;
}

int main(int count, char **arguments)
{
    if (count != 5)
        errx(1, "usage: kernel_reads BYTES FILES FOLDER ROUNDS");
    size_t size = strtoull(arguments[1], NULL, 10) / FILL * FILL;
    unsigned long files = strtoul(arguments[2], NULL, 10);
    const char *folder = arguments[3];
    if (size < SMALL || !files)
        errx(1, "at least 64 MiB and one file");
    int memory = filled_memfd(size);
    char path[4096];

    for (unsigned long number = 0; number < files; number++) {
        name_of(path, sizeof path, folder, number);
        int file = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        if (file < 0)
            err(1, "%s", path);
        close(file);
    }
    for (long round = strtol(arguments[4], NULL, 10); round > 0; round--) {
        double large = read_ns(memory, size), small = read_ns(memory, SMALL);
        double of_files = stat_ns(folder, files);

        printf("%.1f %.1f %.1f %.1f\n", large, small, of_files, spawn_us());
        fflush(stdout);
    }
    for (unsigned long number = 0; number < files; number++) {
        name_of(path, sizeof path, folder, number);
        unlink(path);
    }
    return 0;
}
