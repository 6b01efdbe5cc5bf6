/* Loaded before libc: the n-th call of one kind on a file below one folder fails, or kills the process.

   What every library of a process does to its files goes through here, Rust and C++ included. Armed after a fork by
   `arm`; calls that touch other files are passed on and not counted. The environment variable FAULT_FOLDER names the
   folder at start, so that descriptors opened before are known by their path in /proc. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, SYNC, RENAME, OPEN, UNLINK, MKDIR, KINDS };
enum { FAIL, SHORT, DIE_BEFORE, DIE_AFTER };

static char folder[PATH_MAX];
static int armed_call = -1, armed_way, armed_errno;
static long armed_number, seen[KINDS];

void arm(const char *below, int call, int way, int error, long number) {
    snprintf(folder, sizeof folder, "%s", below);
    memset(seen, 0, sizeof seen);
    armed_call = call, armed_way = way, armed_errno = error, armed_number = number;
}

long count(int call) { return seen[call]; }

static int below(const char *path) { return *folder && path && strncmp(path, folder, strlen(folder)) == 0; }

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!*folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Whether this call is the one; after a failed write the disk stays full, as disks do. */
static int hit(int call) {
    long number = __sync_add_and_fetch(&seen[call], 1);
    if (call != armed_call || number < armed_number) return 0;
    int stays = armed_way <= SHORT && (armed_errno == ENOSPC || armed_errno == EDQUOT);
    return number == armed_number || stays;
}

static void die(int when) { if (armed_way == when) kill(getpid(), SIGKILL); }

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

#define FAULTY(result, name, call, is_ours, parameters, arguments)  \
    result name parameters {                                        \
        if (!(is_ours) || !hit(call)) return REAL(name) arguments;  \
        die(DIE_BEFORE);                                            \
        if (armed_way == DIE_AFTER) { REAL(name) arguments; die(DIE_AFTER); } \
        errno = armed_errno;                                        \
        return -1;                                                  \
    }

ssize_t write(int fd, const void *data, size_t size) {
    if (!below_fd(fd) || !hit(WRITE)) return REAL(write)(fd, data, size);
    die(DIE_BEFORE);
    if (armed_way >= SHORT && size > 1) REAL(write)(fd, data, size / 2);
    die(DIE_AFTER);
    if (armed_way == SHORT && size > 1 && seen[WRITE] == armed_number) return (ssize_t)(size / 2);
    errno = armed_errno;
    return -1;
}

FAULTY(ssize_t, pwrite64, WRITE, below_fd(fd), (int fd, const void *d, size_t s, off64_t o), (fd, d, s, o))
FAULTY(ssize_t, pwrite, WRITE, below_fd(fd), (int fd, const void *d, size_t s, off_t o), (fd, d, s, o))
FAULTY(ssize_t, writev, WRITE, below_fd(fd), (int fd, const struct iovec *v, int n), (fd, v, n))
FAULTY(int, ftruncate64, WRITE, below_fd(fd), (int fd, off64_t size), (fd, size))
FAULTY(int, fsync, SYNC, below_fd(fd), (int fd), (fd))
FAULTY(int, fdatasync, SYNC, below_fd(fd), (int fd), (fd))
FAULTY(int, rename, RENAME, below(to), (const char *from, const char *to), (from, to))
FAULTY(int, unlink, UNLINK, below(path), (const char *path), (path))
FAULTY(int, rmdir, UNLINK, below(path), (const char *path), (path))
FAULTY(int, mkdir, MKDIR, below(path), (const char *path, mode_t mode), (path, mode))

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    if (!below_fd(out) || !hit(WRITE)) return REAL(copy_file_range)(in, from, out, to, size, flags);
    die(DIE_BEFORE);
    die(DIE_AFTER);
    errno = armed_errno;
    return -1;
}

ssize_t sendfile64(int out, int in, off64_t *from, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = (ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
    if (!below_fd(out) || !hit(WRITE)) return real(out, in, from, size);
    die(DIE_BEFORE);
    die(DIE_AFTER);
    errno = armed_errno;
    return -1;
}

static int faulty_open(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
    if (!(flags & (O_WRONLY | O_RDWR)) || !below(path) || !hit(OPEN)) return real(path, flags, mode);
    die(DIE_BEFORE);
    if (armed_way == DIE_AFTER) { real(path, flags, mode); die(DIE_AFTER); }
    errno = armed_errno;
    return -1;
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return faulty_open("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return faulty_open("open64", path, flags, mode);
}
