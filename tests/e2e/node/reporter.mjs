// One JSON line for each test, for tests/e2e/test_node.py.
export default async function* reporter(events) {
  for await (const { type, data } of events) {
    if (type !== "test:pass" && type !== "test:fail") continue;
    const cause = data.details.error?.cause ?? data.details.error;
    const error = type === "test:fail" ? String(cause?.stack ?? cause) : null;
    yield JSON.stringify({ name: data.name, error }) + "\n";
  }
}
