/* An instant OpenAI-compatible upstream: what it says is fixed, so what is measured is the gateway.
 *
 *   mock_upstream [--port N]        prints "ready PORT" when it listens on 127.0.0.1
 *
 * POST <any path>  The model's name sets the answer's pace, parts may be combined ("delay-20.burst-16"):
 *                    delay-MS     the answer starts MS milliseconds after the request is complete
 *                    burst-N      N content chunks at once      paced-N-MS   one content chunk per MS
 *                  "stream":true gives SSE: role chunk, the content chunks (~220 bytes, each in its own write and its own HTTP chunk),
 *                  finish chunk, a usage chunk when include_usage is asked, [DONE]. The content of a chunk begins with
 *                  "~T<CLOCK_MONOTONIC ns of its sending>#<index>~", so a client on the same machine can measure the relay's delay.
 *                  Without it: one JSON completion of about 630 bytes with usage and cached tokens.
 *                  Routed fields are looked for in the first and the last 4 KB of the body only.
 * GET /stats       {"requests", "body_bytes", "chunks", "cut_streams"} since the start: posts answered and what they carried.
 * GET /health, /metrics, anything else: what engine pollers expect to find.
 *
 * One thread, epoll, keep-alive, about 6 us of CPU a request. */
#define _GNU_SOURCE
#include "wire.h"
#include <arpa/inet.h>
#include <signal.h>
#include <sys/socket.h>

enum { READ_ROOM = 65536, SCAN_BYTES = 4096, EVENTS = 512, MAX_BODY_BYTES = 256 << 20 };

struct answer {
    int is_stream, has_usage, chunks, next;
    uint64_t pace_ns;
    int is_started;
};

struct connection {
    int fd, is_answering, waits_to_write;
    char *in, *out;
    size_t in_size, in_room, out_size, out_sent, out_room;
    size_t head, need, body, raw; /* head bytes; bytes needed in all (0: unknown); decoded body bytes; raw bytes not yet de-chunked */
    int is_chunked;
    struct chunked chunked;
    struct answer answer;
    uint64_t due_ns;
    int slot; /* place in the timer heap, -1 = none */
};

static int epoll_fd;
static struct connection **heap;
static int heap_size, heap_room;
static struct { uint64_t requests, body_bytes, chunks, cut_streams; } stats;

/* -- timers: a binary heap of connections by due time ------------------------------------------------------------------------- */

static void heap_put(int at, struct connection *c) { heap[at] = c, c->slot = at; }

static void heap_sift(int at, struct connection *c) {
    while (at && heap[(at - 1) / 2]->due_ns > c->due_ns) heap_put(at, heap[(at - 1) / 2]), at = (at - 1) / 2;
    for (;;) {
        int child = 2 * at + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && heap[child + 1]->due_ns < heap[child]->due_ns) child++;
        if (heap[child]->due_ns >= c->due_ns) break;
        heap_put(at, heap[child]), at = child;
    }
    heap_put(at, c);
}

static void timer_set(struct connection *c, uint64_t due_ns) {
    c->due_ns = due_ns;
    if (c->slot < 0) {
        if (heap_size == heap_room) heap = grow(heap, (size_t)(heap_room = heap_room ? heap_room * 2 : 256) * sizeof *heap);
        c->slot = heap_size++;
    }
    heap_sift(c->slot, c);
}

static void timer_clear(struct connection *c) {
    if (c->slot < 0) return;
    struct connection *last = heap[--heap_size];
    if (last != c) heap_sift(c->slot, last);
    c->slot = -1;
}

/* -- connections --------------------------------------------------------------------------------------------------------------- */

static void drop(struct connection *c) {
    if (c->is_answering && c->answer.is_stream) stats.cut_streams++;
    timer_clear(c);
    close(c->fd);
    free(c->in), free(c->out), free(c);
}

static void watch(struct connection *c, int waits_to_write) {
    if (c->waits_to_write == waits_to_write) return;
    struct epoll_event event = {EPOLLIN | (waits_to_write ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    c->waits_to_write = waits_to_write;
}

/* 0 = sent or kept for later, -1 = the connection is broken. */
static int send_bytes(struct connection *c, const char *data, size_t size) {
    ssize_t sent = 0;
    if (!c->out_size) {
        sent = send(c->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return -1;
        if (sent < 0) sent = 0;
    }
    if ((size_t)sent == size) return 0;
    size -= (size_t)sent;
    if (c->out_size + size > c->out_room) c->out = grow(c->out, c->out_room = 2 * (c->out_size + size));
    memcpy(c->out + c->out_size, data + sent, size);
    c->out_size += size;
    watch(c, 1);
    return 0;
}

/* -- answers ------------------------------------------------------------------------------------------------------------------- */

#define ID "chatcmpl-7a1d9f60c4b84e0d9a4c2f6e"
#define STARTS "{\"id\":\"" ID "\",\"object\":\"chat.completion.chunk\",\"created\":1763600000,\"model\":\"bench\",\"choices\":["
#define USAGE                                                                                                                     \
    "{\"prompt_tokens\":1200,\"total_tokens\":1264,\"completion_tokens\":64,\"prompt_tokens_details\":{\"cached_tokens\":1024}}"

static const char stream_head[] =
    "HTTP/1.1 200 OK\r\ndate: Thu, 20 Nov 2025 10:00:00 GMT\r\nserver: mock\r\nkeep-alive: timeout=75\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    "transfer-encoding: chunked\r\n\r\n";
static const char filler[] = "The quick brown fox jumps over the";

static size_t frame(char *out, const char *event, size_t size) {
    size_t n = (size_t)sprintf(out, "%zx\r\n", size);
    memcpy(out + n, event, size);
    memcpy(out + n + size, "\r\n", 2);
    return n + size + 2;
}

static int send_json(struct connection *c) {
    static char answer[2048];
    static size_t size;
    if (!size) {
        char text[1024];
        int n = sprintf(text,
            "{\"id\":\"" ID "\",\"object\":\"chat.completion\",\"created\":1763600000,\"model\":\"bench\",\"choices\":[{\"index\":0,"
            "\"message\":{\"role\":\"assistant\",\"content\":\"%s lazy dog. %s lazy dog. %s lazy dog. %s lazy dog again.\",\"refusal\":null,"
            "\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],\"usage\":" USAGE
            ",\"service_tier\":null,\"system_fingerprint\":null}", filler, filler, filler, filler);
        size = (size_t)sprintf(answer,
            "HTTP/1.1 200 OK\r\ndate: Thu, 20 Nov 2025 10:00:00 GMT\r\nserver: mock\r\nkeep-alive: timeout=75\r\ncontent-type: application/json\r\n"
            "content-length: %d\r\n\r\n%s", n, text);
    }
    return send_bytes(c, answer, size);
}

static int send_stream_start(struct connection *c) {
    static const char role[] = "data: " STARTS "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
    char out[1024];
    size_t n = sizeof stream_head - 1;
    memcpy(out, stream_head, n);
    n += frame(out + n, role, sizeof role - 1);
    return send_bytes(c, out, n);
}

static int send_stream_end(struct connection *c) {
    static const char finish[] = "data: " STARTS "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    static const char usage[] = "data: " STARTS "],\"usage\":" USAGE "}\n\n";
    static const char done[] = "data: [DONE]\n\n";
    char out[2048];
    size_t n = frame(out, finish, sizeof finish - 1);
    if (c->answer.has_usage) n += frame(out + n, usage, sizeof usage - 1);
    n += frame(out + n, done, sizeof done - 1);
    memcpy(out + n, "0\r\n\r\n", 5);
    return send_bytes(c, out, n + 5);
}

static int send_chunk(struct connection *c) {
    char event[512], out[600];
    int n = sprintf(event,
        "data: " STARTS "{\"index\":0,\"delta\":{\"content\":\"~T%019llu#%05d~ lazy dog\"},\"finish_reason\":null}]}\n\n",
        (unsigned long long)now_ns(), c->answer.next++);
    stats.chunks++;
    return send_bytes(c, out, frame(out, event, (size_t)n));
}

static int take_requests(struct connection *c);

static int finish_answer(struct connection *c) {
    c->is_answering = 0;
    return take_requests(c);
}

/* Sends what is due now and sets the timer for the rest. -1 = broken. */
static int go_on(struct connection *c) {
    struct answer *a = &c->answer;
    if (!a->is_stream) return send_json(c) ? -1 : finish_answer(c);
    if (!a->is_started) {
        a->is_started = 1;
        if (send_stream_start(c)) return -1;
        if (a->pace_ns && a->chunks) return timer_set(c, c->due_ns + a->pace_ns), 0;
    }
    while (a->next < a->chunks) {
        if (send_chunk(c)) return -1;
        if (a->pace_ns && a->next < a->chunks) return timer_set(c, c->due_ns + a->pace_ns), 0;
    }
    return send_stream_end(c) ? -1 : finish_answer(c);
}

/* -- requests ------------------------------------------------------------------------------------------------------------------ */

/* The first byte of the value of a top-level key, looked for at both ends of the body; NULL if not there. */
static const char *field(const char *body, size_t size, const char *quoted_key) {
    size_t length = strlen(quoted_key);
    for (int is_tail = 0; is_tail < 2; is_tail++) {
        size_t span = size < SCAN_BYTES ? size : SCAN_BYTES;
        const char *from = is_tail ? body + size - span : body, *end = from + span;
        const char *at = from;
        while ((at = memmem(at, (size_t)(end - at), quoted_key, length))) {
            at += length;
            while (at < end && *at == ' ') at++;
            if (at >= end || *at != ':') continue; /* the word was a value or part of a text */
            at++;
            while (at < end && *at == ' ') at++;
            return at < end ? at : NULL;
        }
        if (span == size) break;
    }
    return NULL;
}

static int model_number(const char *model, size_t size, const char *word, int *second) {
    const char *at = memmem(model, size, word, strlen(word));
    if (!at) return 0;
    char *after;
    int n = (int)strtol(at + strlen(word), &after, 10);
    if (second) *second = *after == '-' ? (int)strtol(after + 1, NULL, 10) : 0;
    return n;
}

static int answer_post(struct connection *c, const char *body, size_t size) {
    struct answer *a = &c->answer;
    const char *model = field(body, size, "\"model\""), *stream = field(body, size, "\"stream\"");
    const char *usage = field(body, size, "\"include_usage\"");
    *a = (struct answer){.is_stream = stream && *stream == 't', .has_usage = usage && *usage == 't', .chunks = 16};
    uint64_t delay_ns = 0;
    if (model && *model == '"') {
        size_t left = (size_t)(body + size - ++model);
        const char *end = memchr(model, '"', left);
        size_t length = end ? (size_t)(end - model) : 0;
        int pace_ms = 0, paced = model_number(model, length, "paced-", &pace_ms), burst = model_number(model, length, "burst-", NULL);
        a->chunks = paced ? paced : burst ? burst : a->chunks;
        a->pace_ns = (uint64_t)pace_ms * 1000000u;
        delay_ns = (uint64_t)model_number(model, length, "delay-", NULL) * 1000000u;
    }
    stats.requests++, stats.body_bytes += size;
    c->is_answering = 1;
    c->due_ns = now_ns() + delay_ns;
    if (delay_ns) return timer_set(c, c->due_ns), 0;
    return go_on(c);
}

static int answer_get(struct connection *c, const char *head) {
    char body[1024], out[1400];
    const char *type = "application/json";
    int n;
    if (!strncmp(head, "GET /stats", 10))
        n = sprintf(body, "{\"requests\":%llu,\"body_bytes\":%llu,\"chunks\":%llu,\"cut_streams\":%llu}", (unsigned long long)stats.requests,
            (unsigned long long)stats.body_bytes, (unsigned long long)stats.chunks, (unsigned long long)stats.cut_streams);
    else if (!strncmp(head, "GET /metrics", 12))
        type = "text/plain", n = sprintf(body, "vllm:num_requests_running{model_name=\"bench\"} 0\nvllm:num_requests_waiting{model_name=\"bench\"} 0\n"
            "vllm:kv_cache_usage_perc{model_name=\"bench\"} 0.0\n");
    else if (!strncmp(head, "GET /health", 11)) type = "text/plain", n = 0;
    else n = sprintf(body, "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1763600000,\"owned_by\":\"mock\"}]}");
    int size = sprintf(out, "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n", type, n);
    memcpy(out + size, body, (size_t)n);
    c->is_answering = 0;
    return send_bytes(c, out, (size_t)(size + n));
}

/* Reads the head at the front of the buffer. 1 = there is one, 0 = not yet, -1 = not HTTP we understand. */
static int take_head(struct connection *c) {
    char *end = memmem(c->in, c->in_size, "\r\n\r\n", 4);
    if (!end) return c->in_size > READ_ROOM ? -1 : 0;
    c->head = (size_t)(end - c->in) + 4;
    const char *length = header_value(c->in, c->head, "\r\ncontent-length:");
    const char *coding = header_value(c->in, c->head, "\r\ntransfer-encoding:");
    const char *expect = header_value(c->in, c->head, "\r\nexpect:");
    c->is_chunked = coding && !strncasecmp(coding, "chunked", 7);
    c->chunked = (struct chunked){0};
    c->body = 0, c->raw = c->head;
    size_t body = length ? strtoul(length, NULL, 10) : 0;
    if (body > MAX_BODY_BYTES) return -1;
    c->need = c->is_chunked ? 0 : c->head + body;
    if (expect && send_bytes(c, "HTTP/1.1 100 Continue\r\n\r\n", 25)) return -1;
    return 1;
}

/* 1 = the body is complete and lies decoded behind the head, 0 = not yet, -1 = bad. */
static int take_body(struct connection *c) {
    if (!c->is_chunked) {
        c->body = c->need - c->head;
        return c->in_size >= c->need;
    }
    size_t got, fresh = c->in_size - c->raw;
    size_t used = chunked_feed(&c->chunked, c->in + c->raw, fresh, &got);
    char *target = c->in + c->head + c->body;
    memmove(target, c->in + c->raw, got);
    c->body += got;
    memmove(target + got, c->in + c->raw + used, fresh - used);
    c->raw = c->head + c->body, c->in_size = c->raw + fresh - used;
    if (c->chunked.state == CHUNK_BAD) return -1;
    c->need = c->raw;
    return c->chunked.state == CHUNK_DONE;
}

/* Answers the complete requests in the buffer, one at a time. -1 = close. */
static int take_requests(struct connection *c) {
    while (!c->is_answering && c->in_size) {
        if (!c->head) {
            int state = take_head(c);
            if (state <= 0) return state;
        }
        int state = take_body(c);
        if (state <= 0) return state;
        size_t head = c->head, used = c->need;
        int is_post = !strncmp(c->in, "POST", 4), result;
        char *request = c->in, *rest = NULL;
        size_t left = c->in_size - used;
        if (left) { /* the next request came along: keep it beside, answering may re-enter */
            rest = grow(NULL, READ_ROOM > left ? READ_ROOM : left);
            memcpy(rest, c->in + used, left);
        }
        c->in_size = 0, c->head = 0;
        if (rest) c->in = rest, c->in_size = left, c->in_room = READ_ROOM > left ? READ_ROOM : left;
        result = is_post ? answer_post(c, request + head, used - head) : answer_get(c, request);
        if (rest) free(request);
        if (result) return -1;
    }
    return 0;
}

static int on_readable(struct connection *c) {
    for (;;) {
        size_t want = c->in_size + READ_ROOM;
        if (c->head && c->need > want) want = c->need + 1;
        if (c->in_room < want) c->in = grow(c->in, c->in_room = want);
        ssize_t n = recv(c->fd, c->in + c->in_size, c->in_room - c->in_size, 0);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        if (!n) return -1;
        c->in_size += (size_t)n;
        int is_partial = (size_t)n < c->in_room - (c->in_size - (size_t)n);
        if (take_requests(c)) return -1;
        if (is_partial) return 0;
    }
}

static int on_writable(struct connection *c) {
    ssize_t sent = send(c->fd, c->out + c->out_sent, c->out_size - c->out_sent, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN ? 0 : -1;
    c->out_sent += (size_t)sent;
    if (c->out_sent < c->out_size) return 0;
    c->out_size = c->out_sent = 0;
    watch(c, 0);
    return 0;
}

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        no_delay(fd);
        struct connection *c = calloc(1, sizeof *c);
        if (!c) die("out of memory");
        c->fd = fd, c->slot = -1;
        struct epoll_event event = {EPOLLIN, {.ptr = c}};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, 4096)) die("mock_upstream: port %d: %s", port, strerror(errno));
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("ready %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int count, char **words) {
    int port = 0;
    if (count == 3 && !strcmp(words[1], "--port")) port = atoi(words[2]);
    else if (count != 1) die("usage: mock_upstream [--port N]");
    signal(SIGPIPE, SIG_IGN);
    sharpen_timers();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(port);
    struct epoll_event events[EVENTS], event = {EPOLLIN, {.ptr = NULL}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        uint64_t timeout_ns = UINT64_MAX;
        if (heap_size) {
            uint64_t now = now_ns();
            timeout_ns = heap[0]->due_ns > now ? heap[0]->due_ns - now : 0;
        }
        int n = wait_events(epoll_fd, events, EVENTS, timeout_ns);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) accept_all(listener);
            else if ((events[i].events & EPOLLOUT) && on_writable(c)) drop(c);
            else if ((events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && on_readable(c)) drop(c);
        }
        for (uint64_t now = heap_size ? now_ns() : 0; heap_size && heap[0]->due_ns <= now;) {
            struct connection *c = heap[0];
            timer_clear(c);
            if (go_on(c)) drop(c);
        }
    }
}
