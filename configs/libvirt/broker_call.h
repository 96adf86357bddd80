// One call of the broker, for the programs that hold up a domain's start: libvirt's hook and its emulator. They are
// started anew each time, and so compiled: Python takes a tenth of a second to start, and a scripting language
// milliseconds. None of them frees memory, as they soon end, or become another program.
// Compiled by `vmmback libvirt install`, with the paths LIBEXEC, RUN, SECRET and SOCKET, and the words of the command
// that is vmmback as VMMBACK (vmmback/libvirt/installed_files.py, program); docs/LIBVIRT.md.
#ifndef BROKER_CALL_H
#define BROKER_CALL_H

#include <stdbool.h>
#include <stddef.h>

// Of vmmback's exit codes.
enum { USAGE = 2, HOST_UNFIT = 3 };

// Say what went wrong and end, with one of vmmback's exit codes. `hint` may be NULL.
_Noreturn void failed(int exit_code, const char *hint, const char *format, ...) __attribute__((format(printf, 3, 4)));

// From now on, end without a word and with 0 where something goes wrong.
void fail_silently(void);

// Connect to the broker, which must answer each time within so many seconds.
int connected(long timeout_s);

// Wait so long for the other end of a socket.
void limit(int socket, long timeout_s);

// Make one Varlink call, with its parameters as JSON, and send a descriptor along unless it is -1.
// Return the answer, and in `received` the descriptor that came with it, or -1.
char *call(int connection, const char *method, const char *parameters, int passed, int *received);

// Text as JSON has it, quotation marks included.
char *quoted(const char *text);

// A text of a JSON object, as it is meant, or NULL.
char *text_of(const char *json, const char *key);

// What printf(3) would print.
char *printed(const char *format, ...) __attribute__((format(printf, 1, 2)));

// All that can be read from a descriptor, as one text.
char *all_of(int descriptor);

#endif
