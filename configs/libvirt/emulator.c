// What executes a QEMU's wrapper, which libvirt starts as a domain's <emulator>: EMULATOR QEMU WRAPPER ARGUMENTS. It
// becomes that QEMU, with the same pid and arguments: it claims the domain's RAM from the broker, puts itself under the
// filter whose listener it sends to who will answer QEMU's calls with that RAM, and executes QEMU. Whatever goes wrong,
// QEMU is not executed: there is no other memory to fall back to. What it says on standard error is in libvirt's error.
// Compiled by `vmmback libvirt install`; docs/LIBVIRT.md.

#include "broker_call.h"

#include <errno.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ANSWER_S = 15, MORE_FOR_EACH_GIB_S = 10 };

// Both words of each set (capget(2)).
struct capabilities {
    struct __user_cap_data_struct low, high;
};

static struct __user_cap_header_struct own_capabilities = {.version = _LINUX_CAPABILITY_VERSION_3};

static void tell_capabilities(void) {
    struct capabilities has;
    if (syscall(SYS_capget, &own_capabilities, &has) < 0) failed(HOST_UNFIT, NULL, "capget: %s", strerror(errno));
    printf("permitted %08x%08x\neffective %08x%08x\n", has.high.permitted, has.low.permitted, has.high.effective,
           has.low.effective);
}

// Who surely is no domain: libvirt asks what a QEMU can do by the machine "none", and root does by one word.
static bool is_probe(char **arguments) {
    bool found = !arguments[0] || !arguments[1];
    const char *option = "";
    for (; *arguments; option = *arguments++) {
        if (strcmp(option, "-machine") == 0 && strncmp(*arguments, "none", strlen("none")) == 0) found = true;
        if (strcmp(option, "-name") == 0) return false;
    }
    return found;
}

// What names the domain, and its objects, some of which are its RAM, as a list of JSON; and how much RAM that is.
static char *named(char **arguments, long *ram_mib) {
    char *list = NULL;
    size_t length;
    FILE *text = open_memstream(&list, &length);
    for (; text && arguments[0] && arguments[1]; arguments++) {
        if (strcmp(arguments[0], "-name") != 0 && strcmp(arguments[0], "-object") != 0) continue;
        fprintf(text, "%s%s, %s", ftell(text) > 0 ? ", " : "", quoted(arguments[0]), quoted(arguments[1]));
        const char *size = strstr(arguments[1], "\"size\":");
        if (size) *ram_mib += (long)(strtoull(size + strlen("\"size\":"), NULL, 10) >> 20);
    }
    if (!text || fclose(text) != 0) failed(HOST_UNFIT, NULL, "out of memory");
    return list;
}

// The program for seccomp(2), by its text in hexadecimal.
static struct sock_fprog program_of(const char *text) {
    size_t length = text ? strlen(text) / 2 : 0, count = length / sizeof(struct sock_filter);
    unsigned char *bytes = malloc(length);
    bool is_whole =
        bytes && count > 0 && count <= BPF_MAXINSNS && 2 * count * sizeof(struct sock_filter) == strlen(text);
    for (size_t at = 0; is_whole && at < length; at++) is_whole = sscanf(text + 2 * at, "%2hhx", bytes + at) == 1;
    if (!is_whole) failed(HOST_UNFIT, NULL, "the broker's answer came without a filter");
    return (struct sock_fprog){(unsigned short)count, (struct sock_filter *)bytes};
}

// With CAP_IPC_LOCK, which others of its user have not, it is out of their reach; it also goes beyond the limit on
// locked memory. This program has it as a capability of its file; what it executes has it as an ambient one, which has
// to be inheritable too (capabilities(7)).
static void hand_on_the_capability(void) {
    struct capabilities has;
    long done = syscall(SYS_capget, &own_capabilities, &has);
    has.low.inheritable |= 1u << CAP_IPC_LOCK;
    if (done < 0 || syscall(SYS_capset, &own_capabilities, &has) < 0
        || prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_IPC_LOCK, 0, 0) < 0)
        failed(HOST_UNFIT, "vmmback libvirt install", "QEMU cannot have CAP_IPC_LOCK: %s", strerror(errno));
}

int main(int count, char **argv) {
    if (count == 1) {
        tell_capabilities();
        return 0;
    }
    if (count < 3 || *argv[1] != '/') failed(USAGE, NULL, "usage: %s QEMU WRAPPER ARGUMENTS", argv[0]);
    const char *qemu = argv[1];
    char **arguments = argv + 3;
    argv[2] = argv[1];
    if (is_probe(arguments)) {
        execv(qemu, argv + 2);
        failed(HOST_UNFIT, NULL, "%s cannot be executed: %s", qemu, strerror(errno));
    }

    long ram_mib = 0;
    const char *list = named(arguments, &ram_mib);
    int broker = connected(ANSWER_S + MORE_FOR_EACH_GIB_S * ram_mib / 1024);  // which it may still have to touch
    int channel;
    char *told = call(broker, "org.vmmback.Domains.Claim", printed("{\"arguments\": [%s]}", list), -1, &channel);
    if (channel < 0) failed(HOST_UNFIT, NULL, "the broker's answer came without a channel");
    limit(channel, ANSWER_S);
    struct sock_fprog program = program_of(text_of(told, "filter"));

    hand_on_the_capability();
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    int listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    if (listener < 0) failed(HOST_UNFIT, NULL, "QEMU cannot be put under a filter: %s", strerror(errno));

    // From here on, this process must open nothing to read and write, nor make a memfd: nobody answers yet.
    call(channel, "org.vmmback.Handoff.Answer", "{\"listener\": 0, \"offers\": [], \"secret_memfds\": false}", listener,
         NULL);
    execv(qemu, argv + 2);
    failed(HOST_UNFIT, NULL, "%s cannot be executed: %s", qemu, strerror(errno));
}
