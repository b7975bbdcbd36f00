/* What the mock upstream and the load generator share: the clock, waiting with nanosecond timeouts, chunked bodies. */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

static void *grow(void *memory, size_t size) {
    void *bigger = realloc(memory, size);
    if (!bigger) die("out of memory");
    return bigger;
}

static void no_delay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* Timers as fine as the kernel can: by default it may fire them 50 us late. */
static void sharpen_timers(void) { prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL); }

/* epoll_wait with a timeout in ns; UINT64_MAX waits for ever. epoll_wait alone rounds to milliseconds, which would bunch
 * paced chunks together. */
static int wait_events(int epoll, struct epoll_event *events, int size, uint64_t timeout_ns) {
    if (timeout_ns == UINT64_MAX) return epoll_wait(epoll, events, size, -1);
#ifdef SYS_epoll_pwait2
    static int is_missing;
    if (!is_missing) {
        struct timespec t = {(time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u)};
        int n = (int)syscall(SYS_epoll_pwait2, epoll, events, size, &t, NULL, 0);
        if (n >= 0 || errno != ENOSYS) return n;
        is_missing = 1;
    }
#endif
    return epoll_wait(epoll, events, size, (int)((timeout_ns + 999999) / 1000000));
}

/* The value of a header in a head that ends with an empty line, or NULL. `name` is given as "\r\nname:" in lower case. */
static const char *header_value(const char *head, size_t size, const char *name) {
    size_t length = strlen(name);
    const char *end = head + size;
    for (const char *at = head; (at = memchr(at, '\r', (size_t)(end - at))) && (size_t)(end - at) > length; at++) {
        if (strncasecmp(at, name, length)) continue;
        at += length;
        while (*at == ' ') at++;
        return at;
    }
    return NULL;
}

/* Chunked transfer coding, incremental. */
enum chunk_state { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_DATA_END, CHUNK_TRAILER, CHUNK_DONE, CHUNK_BAD };
struct chunked {
    enum chunk_state state;
    uint64_t left;
    unsigned line; /* bytes of the trailer line seen so far */
};

/* Decodes in place: body bytes move to the front of `data`, their number goes to *body. Returns the bytes consumed, which is less than
 * `size` only once the state is CHUNK_DONE or CHUNK_BAD. */
static size_t chunked_feed(struct chunked *c, char *data, size_t size, size_t *body) {
    size_t in = 0, out = 0;
    while (in < size && c->state < CHUNK_DONE) {
        char byte = data[in];
        switch (c->state) {
        case CHUNK_SIZE:
            in++;
            if (byte >= '0' && byte <= '9') c->left = c->left * 16 + (uint64_t)(byte - '0');
            else if ((byte | 32) >= 'a' && (byte | 32) <= 'f') c->left = c->left * 16 + (uint64_t)((byte | 32) - 'a' + 10);
            else if (byte == ';' || byte == '\r') c->state = CHUNK_EXTENSION;
            else c->state = CHUNK_BAD;
            break;
        case CHUNK_EXTENSION:
            in++;
            if (byte == '\n') c->state = c->left ? CHUNK_DATA : CHUNK_TRAILER, c->line = 0;
            break;
        case CHUNK_DATA: {
            size_t n = size - in < c->left ? size - in : (size_t)c->left;
            if (in != out) memmove(data + out, data + in, n);
            in += n, out += n, c->left -= n;
            if (!c->left) c->state = CHUNK_DATA_END;
            break;
        }
        case CHUNK_DATA_END:
            in++;
            if (byte == '\n') c->state = CHUNK_SIZE;
            else if (byte != '\r') c->state = CHUNK_BAD;
            break;
        default: /* CHUNK_TRAILER */
            in++;
            if (byte == '\n') {
                if (!c->line) c->state = CHUNK_DONE;
                c->line = 0;
            } else if (byte != '\r') c->line++;
        }
    }
    *body = out;
    return in;
}

#endif
