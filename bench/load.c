/* Load for one target, every answer checked. Prints one JSON object.
 *
 *   load --port N --body FILE [--path P] [--header "name: value"]... [--connections N]
 *        closed loop: [--seconds S | --repeat N]     each connection sends the next request when the answer is complete
 *        open loop:   --rate R --seconds S           Poisson arrivals; latency counts from the due time, so a slow target is not spared
 *        [--stream N]     the answer is SSE with N content chunks, a finish, a usage event and [DONE]; otherwise one JSON body with usage
 *        [--ramp-ms N]    spread the first requests evenly over this time     [--grace S]  wait this long for what is under way at the end
 *        [--seed N]
 *
 * Latency: until the answer is complete. First: until the first content chunk (or the head). Relay: from the mock's send() of a
 * chunk to our recv(). Reads: reads that brought content, so reads < chunks says that chunks came merged, or that this program was late. */
#define _GNU_SOURCE
#include "wire.h"
#include <arpa/inet.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>

enum { IN_ROOM = 262144, EVENTS = 512, MAX_CONNECTIONS = 16384 };

enum phase { CLOSED, CONNECTING, IDLE, SENDING, HEAD, BODY };
enum fault { FAULT_STATUS, FAULT_SHORT, FAULT_USAGE, FAULT_BROKEN, FAULT_CONNECT, FAULT_UNFINISHED, FAULTS };
static const char *const fault_names[FAULTS] = {"wrong_status", "short", "no_usage", "broken", "connect", "unfinished"};

struct connection {
    int fd;
    enum phase phase;
    size_t sent, size; /* request bytes sent; bytes waiting in `in` */
    char *in;
    uint64_t due_ns, first_ns;
    int status, is_chunked, closes, done;
    uint64_t left; /* body bytes to come when the length is known, UINT64_MAX: until close */
    struct chunked chunked;
    char *event; /* the body so far that is not yet a whole event (SSE), or the whole body */
    size_t event_size, event_room;
    int chunks, has_finish, has_usage, has_done, has_error;
    int repeats;
};

struct samples {
    uint32_t *value;
    size_t count, room;
};

static int epoll_fd, port, connections = 32, stream_chunks, repeat;
static double seconds = 0, rate, grace_s = 30;
static uint64_t ramp_ns, start_ns, stop_ns;
static char *request;
static size_t request_size;
static struct connection *all;
static struct samples latency, first, relay, lateness;
static uint64_t completed, chunks, reads, body_bytes, faults[FAULTS];
static int under_way, told;
static uint64_t *waiting; /* due times of arrivals that found no free connection */
static size_t waiting_from, waiting_to, waiting_room;

static void keep(struct samples *s, uint64_t ns) {
    if (s->count == s->room) s->value = grow(s->value, (s->room = s->room ? s->room * 2 : 65536) * sizeof *s->value);
    uint64_t tenths_us = ns / 100;
    s->value[s->count++] = tenths_us > UINT32_MAX ? UINT32_MAX : (uint32_t)tenths_us;
}

static double random_unit(void) {
    static uint64_t state;
    if (!state) state = 0x9e3779b97f4a7c15u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

/* -- one exchange -------------------------------------------------------------------------------------------------------------- */

static void fail(struct connection *c, enum fault fault) {
    faults[fault]++;
    if (told++ < 5)
        fprintf(stderr, "load: %s: status %d, %d chunks, body so far: %.*s\n", fault_names[fault], c->status, c->chunks,
            (int)(c->event_size < 300 ? c->event_size : 300), c->event ? c->event : "");
}

static void open_connection(struct connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("load: socket: %s", strerror(errno));
    no_delay(c->fd);
    c->phase = CONNECTING;
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("load: connect: %s", strerror(errno));
    struct epoll_event event = {EPOLLIN | EPOLLOUT, {.ptr = c}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
}

static void close_connection(struct connection *c) {
    if (c->phase != CLOSED) close(c->fd);
    c->phase = CLOSED;
}

static void want_write(struct connection *c, int is_wanted) {
    struct epoll_event event = {EPOLLIN | (is_wanted ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

/* Sends (the rest of) the request. */
static void send_more(struct connection *c) {
    ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return; /* the answer or the end of the connection says why */
    if (n > 0) c->sent += (size_t)n;
    if (c->sent < request_size) {
        if (c->phase != SENDING) want_write(c, 1);
        c->phase = SENDING;
    } else {
        if (c->phase == SENDING) want_write(c, 0);
        c->phase = HEAD;
    }
}

/* Starts an exchange on an idle or closed connection; its time counts from due_ns. */
static void begin(struct connection *c, uint64_t due_ns) {
    c->sent = c->size = c->event_size = 0;
    c->first_ns = 0;
    c->status = c->chunks = c->has_finish = c->has_usage = c->has_done = c->has_error = 0;
    c->due_ns = due_ns;
    under_way++;
    if (c->phase == CLOSED) open_connection(c);
    else c->phase = HEAD, send_more(c);
}

static void next(struct connection *c);

static void end(struct connection *c, int is_whole) {
    uint64_t now = now_ns();
    under_way--;
    if (!is_whole) fail(c, c->status && c->status != 200 ? FAULT_STATUS : FAULT_BROKEN);
    else if (c->status != 200) fail(c, FAULT_STATUS);
    else if (stream_chunks && (c->chunks != stream_chunks || !c->has_finish || !c->has_done || c->has_error)) fail(c, FAULT_SHORT);
    else if (!stream_chunks && (c->event_size < 400 || c->event[c->event_size - 1] != '}')) fail(c, FAULT_SHORT);
    else {
        const char usage[] = "\"cached_tokens\":";
        if (!stream_chunks) c->has_usage = memmem(c->event, c->event_size, usage, sizeof usage - 1) != NULL;
        if (!c->has_usage) fail(c, FAULT_USAGE);
        else completed++;
    }
    keep(&latency, now - c->due_ns);
    if (c->first_ns) keep(&first, c->first_ns - c->due_ns);
    if (!is_whole || c->closes) close_connection(c);
    else c->phase = IDLE;
    next(c);
}

/* The closed loop's next request, or the open loop's oldest waiting arrival. */
static void next(struct connection *c) {
    if (rate > 0) {
        if (waiting_from < waiting_to) begin(c, waiting[waiting_from++]);
        return;
    }
    c->repeats++;
    uint64_t now = now_ns();
    if (repeat ? c->repeats < repeat : now < stop_ns) begin(c, now);
}

/* -- answers ------------------------------------------------------------------------------------------------------------------- */

static void on_event(struct connection *c, const char *event, size_t size, uint64_t read_ns) {
    while (size && (*event == '\n' || *event == '\r')) event++, size--;
    if (size < 6 || memcmp(event, "data:", 5)) return; /* a comment or an event name */
    if (memmem(event, size, "[DONE]", 6)) { c->has_done = 1; return; }
    const char *mark = memmem(event, size, "\"~T", 3);
    if (mark) {
        uint64_t sent_ns = strtoull(mark + 3, NULL, 10);
        if (atoi(mark + 23) != c->chunks) c->has_error = 1; /* "~T" 19 digits "#" index */
        if (!c->chunks) c->first_ns = read_ns;
        c->chunks++, chunks++;
        keep(&relay, read_ns - sent_ns);
        return;
    }
    if (memmem(event, size, "\"finish_reason\":\"stop\"", 22) || memmem(event, size, "\"finish_reason\": \"stop\"", 23)) c->has_finish = 1;
    if (memmem(event, size, "\"cached_tokens\":", 16)) c->has_usage = 1;
    if (memmem(event, size, "\"error\":", 8)) c->has_error = 1;
}

static void on_body(struct connection *c, const char *data, size_t size, uint64_t read_ns) {
    body_bytes += size;
    if (c->event_size + size > c->event_room) c->event = grow(c->event, c->event_room = 2 * (c->event_size + size));
    memcpy(c->event + c->event_size, data, size);
    c->event_size += size;
    if (!stream_chunks || c->status != 200) return;
    char *from = c->event, *stop = c->event + c->event_size, *at;
    int before = c->chunks;
    while ((at = memmem(from, (size_t)(stop - from), "\n\n", 2))) {
        on_event(c, from, (size_t)(at - from), read_ns);
        from = at + 2;
    }
    if (c->chunks > before) reads++;
    c->event_size = (size_t)(stop - from);
    if (c->event_size && from != c->event) memmove(c->event, from, c->event_size);
}

/* 1 = the head is complete, and taken off the front of the buffer. */
static int take_head(struct connection *c) {
    char *stop = memmem(c->in, c->size, "\r\n\r\n", 4);
    if (!stop) return 0;
    size_t head = (size_t)(stop - c->in) + 4;
    c->status = c->size > 12 ? atoi(c->in + 9) : 0;
    const char *length = header_value(c->in, head, "\r\ncontent-length:"), *coding = header_value(c->in, head, "\r\ntransfer-encoding:");
    const char *connection = header_value(c->in, head, "\r\nconnection:");
    c->is_chunked = coding && !strncasecmp(coding, "chunked", 7);
    c->chunked = (struct chunked){0};
    c->left = length ? strtoull(length, NULL, 10) : UINT64_MAX;
    c->closes = (connection && !strncasecmp(connection, "close", 5)) || (!length && !c->is_chunked);
    memmove(c->in, c->in + head, c->size - head);
    c->size -= head;
    if (c->status == 100) return take_head(c);
    c->phase = BODY;
    return 1;
}

/* 1 = the answer is complete, -1 = broken framing. */
static int take_body(struct connection *c, uint64_t read_ns) {
    size_t size = c->size;
    c->size = 0;
    if (c->is_chunked) {
        size_t body;
        chunked_feed(&c->chunked, c->in, size, &body);
        on_body(c, c->in, body, read_ns);
        return c->chunked.state == CHUNK_BAD ? -1 : c->chunked.state == CHUNK_DONE;
    }
    if (size > c->left) return -1;
    if (c->left != UINT64_MAX) c->left -= size;
    on_body(c, c->in, size, read_ns);
    return !c->left;
}

static void on_readable(struct connection *c) {
    ssize_t n = recv(c->fd, c->in + c->size, IN_ROOM - c->size, 0);
    uint64_t read_ns = now_ns();
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (c->phase == IDLE) close_connection(c); /* an idle connection may be closed at any time */
        else if (n == 0 && c->phase == BODY && !c->is_chunked && c->left == UINT64_MAX) end(c, 1);
        else end(c, 0);
        return;
    }
    c->size += (size_t)n;
    if (c->phase == IDLE) { fail(c, FAULT_BROKEN); close_connection(c); return; }
    if (c->phase != BODY && !take_head(c)) {
        if (c->size == IN_ROOM) end(c, 0);
        return;
    }
    if (!c->first_ns && !stream_chunks) c->first_ns = read_ns;
    int state = take_body(c, read_ns);
    if (state) end(c, state > 0);
}

static void on_connected(struct connection *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        under_way--;
        fail(c, FAULT_CONNECT);
        close_connection(c);
        return;
    }
    want_write(c, 0);
    c->phase = HEAD;
    send_more(c);
}

/* -- the run ------------------------------------------------------------------------------------------------------------------- */

static void arrive(uint64_t due_ns) {
    uint64_t now = now_ns();
    keep(&lateness, now > due_ns ? now - due_ns : 0);
    for (int state = IDLE; state >= CLOSED; state -= IDLE) /* an open connection first */
        for (int i = 0; i < connections; i++)
            if ((int)all[i].phase == state) { begin(&all[i], due_ns); return; }
    if (waiting_to == waiting_room) waiting = grow(waiting, (waiting_room = waiting_room ? waiting_room * 2 : 1024) * sizeof *waiting);
    waiting[waiting_to++] = due_ns;
}

static void run(void) {
    struct epoll_event events[EVENTS];
    uint64_t next_due = start_ns, give_up_ns = UINT64_MAX;
    int started = 0;
    for (;;) {
        uint64_t now = now_ns();
        while (rate > 0 && next_due <= now && next_due < stop_ns) {
            arrive(next_due);
            next_due += (uint64_t)(-log(1.0 - random_unit()) / rate * 1e9);
        }
        while (rate <= 0 && started < connections && start_ns + ramp_ns * (uint64_t)started / (uint64_t)connections <= now) {
            begin(&all[started], now);
            started++;
        }
        int is_over = rate > 0 ? next_due >= stop_ns : started == connections && (repeat || now >= stop_ns);
        if (is_over && !under_way && waiting_from == waiting_to) return;
        if (is_over && give_up_ns == UINT64_MAX && !repeat) give_up_ns = now + (uint64_t)(grace_s * 1e9);
        if (repeat && give_up_ns == UINT64_MAX) give_up_ns = start_ns + (uint64_t)((seconds + grace_s) * 1e9);
        if (now >= give_up_ns) return;
        uint64_t wake_ns = give_up_ns;
        if (rate > 0 && !is_over) wake_ns = next_due;
        else if (rate <= 0 && started < connections) wake_ns = start_ns + ramp_ns * (uint64_t)started / (uint64_t)connections;
        else if (!is_over) wake_ns = stop_ns;
        now = now_ns();
        int n = wait_events(epoll_fd, events, EVENTS, wake_ns > now ? wake_ns - now : 0);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->phase == CLOSED) continue;
            if (c->phase == CONNECTING) on_connected(c);
            else if (c->phase == SENDING && (events[i].events & EPOLLOUT)) send_more(c);
            if (c->phase >= IDLE && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) on_readable(c);
        }
    }
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report_samples(const char *name, struct samples *s) {
    qsort(s->value, s->count, sizeof *s->value, ascending);
    printf(",\"%s_us\":", name);
    if (!s->count) { printf("null"); return; }
    const double shares[] = {0.5, 0.9, 0.99, 1.0};
    const char *const names[] = {"p50", "p90", "p99", "max"};
    for (int i = 0; i < 4; i++) {
        size_t rank = (size_t)ceil(shares[i] * (double)s->count);
        printf("%s\"%s\":%.1f", i ? "," : "{", names[i], s->value[rank ? rank - 1 : 0] / 10.0);
    }
    printf(",\"count\":%zu}", s->count);
}

static void report(void) {
    double elapsed = (double)(now_ns() - start_ns) / 1e9;
    for (int i = 0; i < connections; i++)
        if (all[i].phase != CLOSED && all[i].phase != IDLE) fail(&all[i], FAULT_UNFINISHED);
    faults[FAULT_UNFINISHED] += waiting_to - waiting_from;
    printf("{\"completed\":%llu,\"seconds\":%.3f,\"chunks\":%llu,\"reads\":%llu,\"body_bytes\":%llu", (unsigned long long)completed, elapsed,
        (unsigned long long)chunks, (unsigned long long)reads, (unsigned long long)body_bytes);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf(",\"cpu_s\":%.3f", (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
        (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
    printf(",\"faults\":{");
    for (int i = 0; i < FAULTS; i++) printf("%s\"%s\":%llu", i ? "," : "", fault_names[i], (unsigned long long)faults[i]);
    printf("}");
    report_samples("latency", &latency);
    report_samples("first", &first);
    report_samples("relay", &relay);
    report_samples("lateness", &lateness);
    printf("}\n");
}

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) die("load: %s: %s", path, strerror(errno));
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *data = grow(NULL, *size + 1);
    if (fread(data, 1, *size, file) != *size) die("load: %s: cannot read it", path);
    fclose(file);
    return data;
}

static void build_request(const char *path, const char *headers, const char *body_file) {
    size_t size = 0;
    char *body = read_file(body_file, &size);
    request = grow(NULL, strlen(path) + strlen(headers) + size + 512);
    request_size = (size_t)sprintf(request,
        "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept: application/json\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n"
        "user-agent: headgate-bench\r\n%scontent-length: %zu\r\n\r\n", path, port, headers, size);
    memcpy(request + request_size, body, size);
    request_size += size;
    free(body);
}

int main(int count, char **words) {
    const char *path = "/v1/chat/completions", *body_file = NULL;
    char headers[4096] = "";
    long seed = 1;
    for (int i = 1; i < count; i += 2) {
        const char *name = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
        if (!value) die("load: %s needs a value", name);
        if (!strcmp(name, "--port")) port = atoi(value);
        else if (!strcmp(name, "--path")) path = value;
        else if (!strcmp(name, "--body")) body_file = value;
        else if (!strcmp(name, "--header")) {
            size_t used = strlen(headers);
            snprintf(headers + used, sizeof headers - used, "%s\r\n", value);
        } else if (!strcmp(name, "--connections")) connections = atoi(value);
        else if (!strcmp(name, "--seconds")) seconds = atof(value);
        else if (!strcmp(name, "--repeat")) repeat = atoi(value);
        else if (!strcmp(name, "--rate")) rate = atof(value);
        else if (!strcmp(name, "--stream")) stream_chunks = atoi(value);
        else if (!strcmp(name, "--ramp-ms")) ramp_ns = (uint64_t)(atof(value) * 1e6);
        else if (!strcmp(name, "--grace")) grace_s = atof(value);
        else if (!strcmp(name, "--seed")) seed = atol(value);
        else die("load: unknown option %s", name);
    }
    if (!port || !body_file || (seconds <= 0 && !repeat)) die("load: --port, --body and one of --seconds, --repeat are needed");
    if (connections < 1 || connections > MAX_CONNECTIONS) die("load: --connections must be 1..%d", MAX_CONNECTIONS);
    signal(SIGPIPE, SIG_IGN);
    sharpen_timers();
    build_request(path, headers, body_file);
    for (long i = 0; i < seed * 16; i++) random_unit();
    all = calloc((size_t)connections, sizeof *all);
    for (int i = 0; i < connections; i++) all[i].in = grow(NULL, IN_ROOM);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    start_ns = now_ns();
    stop_ns = start_ns + (uint64_t)(seconds * 1e9);
    run();
    report();
    return 0;
}
