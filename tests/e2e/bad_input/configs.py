"""Configuration files that cannot be meant, and the words that must be in what is said of them."""

SECRET = "sk-a1B2c3D4e5F6g7H8i9J0"  # in the environment as SECRET; must never be repeated
GOOD = """\
server: {port: 0}
management: {port: 0}
pools:
  gpu: {type: vllm, endpoints: ["http://10.0.0.5:8000/v1"]}
models:
  m: {targets: [{pool: gpu}]}
"""


def also(text: str) -> str:
    """A good file, and one thing more."""
    return GOOD + text


def pool(fields: str) -> str:
    return also("  x: {targets: [{pool: bad}]}\n").replace("pools:\n", f"pools:\n  bad: {{{fields}}}\n")


def model(fields: str) -> str:
    return also(f"  x: {{{fields}}}\n")


def server(fields: str) -> str:
    return GOOD.replace("server: {port: 0}", f"server: {{{fields}}}")


# file -> what is said, all of it
VECTORS = {
    "nothing": ("", ["is empty"]),
    "a list": ("- 1\n- 2\n", ["must be a mapping"]),
    "a word": ("serve\n", ["must be a mapping"]),
    "no YAML": ("server: {port: 1\n", ["not valid YAML"]),
    "a tab": ("server:\n\tport: 1\n", [":2:", "indented with a tab"]),
    "no UTF-8": (b"server: {host: \xff\xfe}\n", ["is not UTF-8 text"]),
    "zero bytes": (bytes(100), ["not valid YAML"]),
    "two documents": (GOOD + "---\n" + GOOD, ["not valid YAML"]),
    "a key twice": (also("server: {port: 1}\n"), ["server", "is there twice"]),
    "a Python object": (also("x: !!python/object/apply:os.system [id]\n"), ["tag"]),
    "an alias of itself": ("server: &a {x: *a}\n", ["server"]),
    "aliases that multiply": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
        ["aliases"],
    ),
    "a thousand levels": ("a: " + "[" * 1000 + "]" * 1000, ["nested more than"]),
    "five megabytes": ("# " + "x" * (5 << 20), ["larger than"]),
    "an unknown section": (also("sever: {}\n"), ["sever", "unknown key", 'did you mean "server"']),
    "an unknown setting": (server("prot: 1"), ["server.prot", 'did you mean "port"']),
    "a port that is a word": (server("port: http"), ["server.port"]),
    "a port beyond all ports": (server("port: 70000"), ["server.port"]),
    "a negative port": (server("port: -1"), ["server.port"]),
    "one port for both planes": (
        GOOD.replace("port: 0", "port: 9000"),
        ["management.port", "the two planes are apart"],
    ),
    "no workers": (server("workers: 0"), ["server.workers"]),
    "half a worker": (server("workers: 1.5"), ["server.workers"]),
    "a timeout that is a list": (server("drain_timeout_s: [1]"), ["server.drain_timeout_s"]),
    "a negative timeout": (server("drain_timeout_s: -1"), ["server.drain_timeout_s"]),
    "a timeout that is not a number": (server("drain_timeout_s: .nan"), ["server.drain_timeout_s"]),
    "a limit of nothing": (server("limits: {body_bytes: 0}"), ["server.limits.body_bytes"]),
    "a host with a space": (server('host: "a b"'), ["server.host"]),
    "a section that is a word": (also("ledger: on\n"), ["ledger"]),
    "a level nobody knows": (also("logging: {level: loud}\n"), ["logging.level"]),
    "a short pepper": (also("storage: {pepper: short}\n"), ["storage.pepper", "32"]),
    "no such variable": (also("storage: {pepper: '${NO_SUCH_VARIABLE}'}\n"), ["NO_SUCH_VARIABLE is not set"]),
    "half a variable": (also("storage: {pepper: '${SECRET'}\n"), ["${VAR}"]),
    "a variable in a variable": (also("storage: {pepper: '${A:-${B}}'}\n"), ["without another"]),
    "a secret for a port": (server("port: '${SECRET}'"), ["server.port"]),
    "a secret for a URL": (pool("type: vllm, endpoints: ['${SECRET}']"), ["pools.bad"]),
    "a weak key": (also("keys: [{name: a, key: '123'}]\n"), ["keys[0].key"]),
    "a key with a line break": (also('keys: [{name: a, key: "sk-abcdef0123456789\\nx"}]\n'), ["keys[0].key"]),
    "two keys of one name": (
        also("keys: [{name: a, key: sk-aaaaaaaaaaaaaaaaaaaa1}, {name: a, key: sk-aaaaaaaaaaaaaaaaaaaa2}]\n"),
        ["another key has this name"],
    ),
    "one key under two names": (
        also("keys: [{name: a, key: '${SECRET}'}, {name: b, key: '${SECRET}'}]\n"),
        ["another entry has the same key"],
    ),
    "a key without a name": (also("keys: [{key: '${SECRET}'}]\n"), ["keys[0].name", "is needed"]),
    "an expiry that is no day": (
        also("keys: [{name: a, key: '${SECRET}', expires: tomorrow}]\n"),
        ["keys[0].expires"],
    ),
    "a star in the middle": (
        also("keys: [{name: a, key: '${SECRET}', models: ['a*b']}]\n"),
        ["a * may stand only at the end"],
    ),
    "no such pool": (model("targets: [{pool: gpus}]"), ["there is no pool", 'did you mean "gpu"']),
    "no such provider": (model("targets: [{provider: opena1}]"), ["there is no provider", "openai"]),
    "a pool and a provider": (model("targets: [{pool: gpu, provider: openai}]"), ["models.x.targets[0]"]),
    "no target": (model("targets: []"), ["models.x.targets", "must not be empty"]),
    "no targets": (model("aliases: [a]"), ["models.x.targets", "is needed"]),
    "an alias of another model": (model("targets: [{pool: gpu}], aliases: [m]"), ['"m" is already']),
    "a negative price": (
        model("targets: [{pool: gpu}], price: {input: -1, output: 1}"),
        ["models.x.price"],
    ),
    "a price in words": (model("targets: [{pool: gpu}], price: cheap"), ["models.x.price"]),
    "an infinite price": (
        model("targets: [{pool: gpu}], price: {input: .inf, output: 1}"),
        ["models.x.price"],
    ),
    "a pool without endpoints": (pool("type: vllm"), ["pools.bad"]),
    "no scheme": (pool('type: vllm, endpoints: ["10.0.0.5:8000"]'), ["pools.bad.endpoints[0]"]),
    "ftp": (pool('type: vllm, endpoints: ["ftp://10.0.0.5/"]'), ["pools.bad.endpoints[0]"]),
    "a password in a URL": (
        pool('type: vllm, endpoints: ["http://user:hunter2secret@10.0.0.5/"]'),
        ["pools.bad.endpoints[0]"],
    ),
    "a port of a URL beyond all ports": (
        pool('type: vllm, endpoints: ["http://10.0.0.5:99999/"]'),
        ["pools.bad.endpoints[0]"],
    ),
    "a type nobody knows": (pool('type: vlm, endpoints: ["http://a/"]'), ['did you mean "vllm"']),
    "a header with a line break": (
        pool('type: vllm, endpoints: ["http://a/"], headers: {x-one: "a\\r\\nx-two: b"}'),
        ["pools.bad.headers", "one line"],
    ),
    "a header of the framing": (
        pool('type: vllm, endpoints: ["http://a/"], headers: {content-length: "5"}'),
        ["belongs to the transport"],
    ),
    "the client's key for the upstream": (
        pool('type: vllm, endpoints: ["http://a/"], forwards: [authorization]'),
        ["never leaves the gateway"],
    ),
    "a deadline of nothing": (
        pool('type: vllm, endpoints: ["http://a/"], deadlines: {connect_s: 0}'),
        ["pools.bad.deadlines.connect_s"],
    ),
    "authorities that are not there": (
        pool('type: vllm, endpoints: ["https://a/"], ca_file: /nonexistent/ca.pem'),
        ["pools.bad.ca_file"],
    ),
    "a proxy that is no URL": (also("outbound: {proxy: 'not a url'}\n"), ["outbound.proxy"]),
    "a price for nobody": (also("prices: {overrides: {'nobody/x': {input: 1, output: 1}}}\n"), ["nobody"]),
    "a price without a model": (
        also("prices: {overrides: {gpu: {input: 1, output: 1}}}\n"),
        ["prices.overrides"],
    ),
    "a pool of a provider's name": (
        also("").replace("  gpu:", "  openai:").replace("pool: gpu", "pool: openai"),
        ["is also the name of a provider"],
    ),
    "a pool of a path's name": (
        also("").replace("  gpu:", "  v1:").replace("pool: gpu", "pool: v1"),
        ["taken by a path"],
    ),
    "a simulator of no blocks": (pool("simulator: {num_blocks: 0}"), ["pools.bad.simulator.num_blocks"]),
}
