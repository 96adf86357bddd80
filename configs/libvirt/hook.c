// libvirt calls this at each step of a domain's life: NAME OPERATION PHASE EXTRA, with the domain's XML on standard
// input (docs/hooks.rst of libvirt). What it says on standard error is part of libvirt's own error. It must not call
// libvirt. Compiled by `vmmback libvirt install`; docs/LIBVIRT.md.

#include "broker_call.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *NAMESPACE = "urn:vmmback:domain:1.0";
enum { ANNOUNCE_S = 10, WITHDRAW_S = 2, LOWEST_PRIORITY = 19, MOST_DECLARATIONS = 16 };

// A domain asks for secret RAM by an element of our namespace; which one, and where it is, the broker judges, and also
// whether it is one at all where there are many declarations, each of which takes a look at all of the XML.
static bool asks(const char *xml) {
    static const char *blank = " \t\r\n", *attribute = "xmlns";
    int declarations = 0;
    for (const char *found = xml; (found = strstr(found, NAMESPACE)); found++) {
        if (found - xml < 2 || !strchr("\"'", found[-1]) || found[-2] != '=') continue;
        if (found[strlen(NAMESPACE)] != found[-1]) continue;
        const char *end = found - 2, *start = end;
        while (start > xml && !strchr(blank, start[-1])) start--;
        if (start == xml || strncmp(start, attribute, strlen(attribute)) != 0) continue;
        start += strlen(attribute);
        if (start == end) return true;
        if (++declarations > MOST_DECLARATIONS) return true;
        if (*start++ == ':' && strstr(xml, printed("<%.*s:", (int)(end - start), start))) return true;
    }
    return false;
}

// libvirt writes the UUID before all else that could look like one.
static const char *uuid_of(const char *xml, const char *name) {
    const char *uuid = strstr(xml, "<uuid>");
    size_t length = uuid ? strspn(uuid += strlen("<uuid>"), "0123456789abcdef-") : 0;
    if (length == 0 || strncmp(uuid + length, "</uuid>", strlen("</uuid>")) != 0)
        failed(USAGE, NULL, "domain %s has no UUID", name);
    return printed("%.*s", (int)length, uuid);
}

static void make_file(const char *path) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0) failed(HOST_UNFIT, NULL, "%s cannot be made: %s", path, strerror(errno));
    close(file);
}

// libvirt keeps what it knows of an emulator until the file changes: a QEMU that was upgraded must show in its wrapper.
// A package brings its files' times along, so another time is told by, not a later one.
static void follow_upgrades(void) {
    DIR *folder = opendir(LIBEXEC);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        if (strncmp(entry->d_name, "qemu", strlen("qemu")) != 0) continue;
        const char *wrapper = printed(LIBEXEC "/%s", entry->d_name);
        char qemu[256] = "";  // a line that the kernel reads is no longer (fs/binfmt_script.c)
        FILE *text = fopen(wrapper, "re");
        bool is_ours = text && fscanf(text, "#!" LIBEXEC "/emulator %255[^\n]", qemu) == 1;
        if (text) fclose(text);
        struct stat now, shown;
        if (!is_ours || stat(qemu, &now) < 0 || stat(wrapper, &shown) < 0) continue;
        if (now.st_mtim.tv_sec != shown.st_mtim.tv_sec || now.st_mtim.tv_nsec != shown.st_mtim.tv_nsec)
            utimensat(AT_FDCWD, wrapper, (struct timespec[]){now.st_atim, now.st_mtim}, 0);
    }
}

// Start an audit in a process of its own, without this one's input and output: libvirt waits until the last one has
// closed that, and the audit asks libvirt.
static void audit(const char *name, const char *step, const char *of, unsigned int delay_s) {
    if (fork() != 0) return;
    int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (nothing < 0) failed(HOST_UNFIT, NULL, "/dev/null cannot be opened: %s", strerror(errno));
    int log = open(printed("/var/log/libvirt/qemu/%s.log", name), O_WRONLY | O_APPEND | O_CLOEXEC);
    dup2(nothing, STDIN_FILENO);
    dup2(nothing, STDOUT_FILENO);
    dup2(log < 0 ? nothing : log, STDERR_FILENO);
    sleep(delay_s);
    setsid();
    setpriority(PRIO_PROCESS, 0, LOWEST_PRIORITY);
    const char *program[] = {VMMBACK, "libvirt", "audit", step, "--", of, NULL};
    execvp(program[0], (char **)program);
    failed(HOST_UNFIT, NULL, "%s cannot be executed: %s", program[0], strerror(errno));
}

// What is by that name is a file of ours, no folder: a domain may be called ".".
static bool is_there(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISREG(status.st_mode);
}

int main(int count, char **argv) {
    if (count < 4) return 0;
    const char *name = argv[1], *step = printed("%s %s", argv[2], argv[3]);
    // Made when it is announced; it says that what runs by that name has secret RAM, also when its XML asks no longer.
    const char *mark = printed(RUN "/names/%s", name);
    if (strcmp(step, "started begin") == 0) {
        // What starts now has the processors first, and the guest's firmware changes its memory map: the audit comes a
        // second later.
        if (is_there(mark)) audit(name, "--started", name, 1);
        return 0;
    }
    bool prepares = strcmp(step, "prepare begin") == 0;
    if (!prepares && strcmp(step, "release end") != 0) return 0;
    const char *xml = all_of(STDIN_FILENO);
    if (!asks(xml) && !is_there(mark)) return 0;
    const char *uuid = uuid_of(xml, name);
    // polkit's rule denies to export the memory of domains that have a file here.
    const char *secret = printed(SECRET "/%s", uuid);
    if (prepares && asks(xml)) {
        int broker = connected(ANNOUNCE_S);  // it accepts while the files are made
        umask(022);
        mkdir(RUN, 0755);
        mkdir(SECRET, 0755);
        mkdir(RUN "/names", 0755);
        make_file(secret);
        make_file(mark);
        follow_upgrades();
        call(broker, "org.vmmback.Domains.Announce", printed("{\"xml\": %s}", quoted(xml)), -1, NULL);
        return 0;
    }
    unlink(secret);
    unlink(mark);
    if (prepares) return 0;  // of an earlier start, whose end nobody told us
    audit(name, "--ended", uuid, 0);
    fail_silently();  // without a broker there is nothing to give back
    call(connected(WITHDRAW_S), "org.vmmback.Domains.Withdraw", printed("{\"name\": %s}", quoted(name)), -1, NULL);
    return 0;
}
