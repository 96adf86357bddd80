// Compiled by `vmmback libvirt install` into the hook and the emulator; docs/LIBVIRT.md.

#include "broker_call.h"

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char *START = "start it: systemctl start vmmback-broker.socket, or: vmmback broker FILE";
static const char *SEE_WHETHER_STOPPED = "look whether it is stopped";
enum { CONNECT_S = 10, CHUNK_BYTES = 65536 };

static bool fails_silently;

void fail_silently(void) { fails_silently = true; }

void failed(int exit_code, const char *hint, const char *format, ...) {
    if (fails_silently) exit(0);
    va_list arguments;
    va_start(arguments, format);
    char *message = NULL;
    if (vasprintf(&message, format, arguments) < 0) message = NULL;
    va_end(arguments);
    fprintf(stderr, "vmmback: error: %s\n", message ? message : "out of memory");
    if (hint && *hint) fprintf(stderr, "  %s\n", hint);
    exit(exit_code);
}

static _Noreturn void out_of_memory(void) { failed(HOST_UNFIT, NULL, "out of memory"); }

char *printed(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char *text = NULL;
    if (vasprintf(&text, format, arguments) < 0) out_of_memory();
    va_end(arguments);
    return text;
}

char *all_of(int descriptor) {
    size_t length = 0, size = 0;
    char *text = NULL;
    for (;;) {
        if (size - length < 2) {
            size += CHUNK_BYTES;
            if (!(text = realloc(text, size))) out_of_memory();
        }
        ssize_t more = read(descriptor, text + length, size - length - 1);
        if (more < 0 && errno == EINTR) continue;
        if (more < 0) failed(HOST_UNFIT, NULL, "its input cannot be read: %s", strerror(errno));
        if (more == 0) break;
        length += (size_t)more;
    }
    text[length] = 0;
    if (strlen(text) < length) failed(HOST_UNFIT, NULL, "its input is no text");
    return text;
}

void limit(int socket, long timeout_s) {
    struct timeval timeout = {.tv_sec = timeout_s};
    if (setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0
        || setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) < 0)
        failed(HOST_UNFIT, NULL, "a socket has no time limit: %s", strerror(errno));
}

int connected(long timeout_s) {
    int broker = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
    _Static_assert(sizeof SOCKET <= sizeof address.sun_path, "a socket's path is shorter (unix(7))");
    if (broker >= 0) limit(broker, CONNECT_S);
    if (broker < 0 || connect(broker, (struct sockaddr *)&address, sizeof address) < 0)
        // EAGAIN: its queue is full and stayed so (connect(2), unix(7)).
        failed(HOST_UNFIT, errno == EAGAIN ? SEE_WHETHER_STOPPED : START, "no broker can be reached at %s: %s", SOCKET,
               strerror(errno));
    limit(broker, timeout_s);
    return broker;
}

static _Noreturn void unheard(const char *method) {
    if (errno == EAGAIN) failed(HOST_UNFIT, SEE_WHETHER_STOPPED, "the broker did not answer %s in time", method);
    failed(HOST_UNFIT, START, "the broker ended meanwhile: %s", strerror(errno));
}

// A control message with one descriptor (cmsg(3), unix(7)).
union control {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
};

static void tell(int connection, const char *method, const char *text, size_t length, int passed) {
    union control control = {.header = {CMSG_LEN(sizeof passed), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.header), &passed, sizeof passed);
    bool passes = passed >= 0;
    while (length > 0) {
        struct iovec data = {(char *)text, length};
        struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
        if (passes) message.msg_control = &control, message.msg_controllen = sizeof control;
        ssize_t sent = sendmsg(connection, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) unheard(method);
        text += sent, length -= (size_t)sent, passes = false;
    }
}

static char *hear(int connection, const char *method, int *received) {
    size_t length = 0;
    char *text = NULL;
    *received = -1;
    do {
        if (!(text = realloc(text, length + CHUNK_BYTES))) out_of_memory();
        union control control = {0};
        struct iovec data = {text + length, CHUNK_BYTES};
        struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
        message.msg_control = &control, message.msg_controllen = sizeof control;
        ssize_t more = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
        if (more < 0 && errno == EINTR) continue;
        if (more < 0) unheard(method);
        if (more == 0) failed(HOST_UNFIT, "look at its messages", "the broker hung up");
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (message.msg_flags & MSG_CTRUNC)
            failed(HOST_UNFIT, NULL, "the broker's answer came with too many descriptors");
        if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
            memcpy(received, CMSG_DATA(header), sizeof *received);
        length += (size_t)more;
    } while (length == 0 || text[length - 1] != 0);
    return text;
}

// What follows a key of a JSON object, and its colon, or NULL.
static const char *value_of(const char *json, const char *key) {
    static const char *blank = " \t\r\n";
    const char *name = printed("\"%s\"", key);
    for (const char *found = json; (found = strstr(found, name));) {
        found += strlen(name);
        found += strspn(found, blank);
        if (*found == ':') return found + 1 + strspn(found + 1, blank);
    }
    return NULL;
}

char *call(int connection, const char *method, const char *parameters, int passed, int *received) {
    const char *text = printed("{\"method\": \"%s\", \"parameters\": %s}", method, parameters);
    tell(connection, method, text, strlen(text) + 1, passed);
    int descriptor;
    char *answer = hear(connection, method, received ? received : &descriptor);
    if (*answer == '{' && !value_of(answer, "error")) return answer;
    const char *error = text_of(answer, "error");
    if (!error) failed(HOST_UNFIT, "look at its messages", "the broker's answer to %s is none", method);
    if (strcmp(error, "org.vmmback.Broker.Refused") != 0)
        failed(HOST_UNFIT, "is it of the same version as what is installed?", "the broker knows no %s: %s", method,
               error);
    const char *code = value_of(answer, "exit_code"), *message = text_of(answer, "message");
    int exit_code = code ? atoi(code) : HOST_UNFIT;
    // No refusal may end as what went well.
    failed(exit_code > 0 && exit_code < 256 ? exit_code : HOST_UNFIT, text_of(answer, "hint"), "%s",
           message ? message : answer);
}

char *quoted(const char *text) {
    char *json = malloc(6 * strlen(text) + 3), *end = json;
    if (!json) out_of_memory();
    *end++ = '"';
    for (; *text; text++) {
        if ((unsigned char)*text < ' ') {
            end += sprintf(end, "\\u%04x", *text);
            continue;
        }
        if (*text == '"' || *text == '\\') *end++ = '\\';
        *end++ = *text;
    }
    memcpy(end, "\"", 2);
    return json;
}

// The four hexadecimal digits of an escape, whose first half was perhaps a surrogate (RFC 8259, 7).
static uint32_t code_unit(const char *digits) {
    char four[5] = "";
    return (uint32_t)strtoul(strncat(four, digits, 4), NULL, 16);
}

static char *utf8(char *end, uint32_t character) {
    if (character < 0x80) {
        *end++ = (char)character;
        return end;
    }
    int more = character < 0x800 ? 1 : character < 0x10000 ? 2 : 3;
    static const unsigned char first[] = {0, 0xc0, 0xe0, 0xf0};
    *end++ = (char)(first[more] | character >> 6 * more);
    while (more-- > 0) *end++ = (char)(0x80 | (character >> 6 * more & 0x3f));
    return end;
}

char *text_of(const char *json, const char *key) {
    const char *from = value_of(json, key);
    if (!from || *from++ != '"') return NULL;
    char *text = malloc(strlen(from) + 1), *end = text;
    if (!text) out_of_memory();
    for (; *from && *from != '"'; from++) {
        if (*from != '\\') {
            *end++ = *from;
            continue;
        }
        const char *meant = "n\nt\tr\rb\bf\f", *letter = strchr(meant, *++from);
        if (!*from) break;
        if (*from != 'u') {
            *end++ = letter ? letter[1] : *from;
            continue;
        }
        uint32_t character = code_unit(from + 1);
        from += strnlen(from + 1, 4);
        if (character >> 10 == 0xd800 >> 10 && from[1] == '\\' && from[2] == 'u') {
            character = 0x10000 + ((character & 0x3ff) << 10) + (code_unit(from + 3) & 0x3ff);
            from += 2 + strnlen(from + 3, 4);
        }
        end = utf8(end, character);
    }
    *end = 0;
    return text;
}
