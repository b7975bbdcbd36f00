// openai-node against the gateway's queue: files, batches, background responses.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { toFile } from "openai";
import { BASE_URL, GATEWAY_KEY, collect } from "./gateway.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: GATEWAY_KEY, maxRetries: 0, timeout: 60_000 });
const ENDED = new Set(["completed", "failed", "cancelled", "expired", "incomplete"]);

async function ended(ask) {
  const until = Date.now() + 60_000;
  for (;;) {
    const found = await ask();
    if (ENDED.has(found.status)) return found;
    assert.ok(Date.now() < until, `still ${found.status}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

function line(number) {
  const body = { model: "half", messages: [{ role: "user", content: `hello ${number}` }] };
  return JSON.stringify({ custom_id: `request-${number}`, method: "POST", url: "/v1/chat/completions", body });
}

const upload = (lines) =>
  toFile(Buffer.from(lines.join("\n")), "in.jsonl").then((file) => client.files.create({ file, purpose: "batch" }));

test("a batch is uploaded, run and downloaded", async () => {
  const file = await upload([0, 1, 2].map(line));
  assert.equal(file.purpose, "batch");
  const made = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
    metadata: { night: "7" },
  });
  const batch = await ended(() => client.batches.retrieve(made.id));
  assert.equal(batch.status, "completed");
  assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });
  const text = await (await client.files.content(batch.output_file_id)).text();
  const ids = text.trim().split("\n").map((each) => JSON.parse(each).custom_id);
  assert.deepEqual(ids.sort(), ["request-0", "request-1", "request-2"]);
  assert.ok((await collect(client.batches.list({ limit: 100 }))).some((each) => each.id === made.id));
  assert.ok((await client.files.delete(file.id)).deleted);
  await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
});

test("a batch with a broken line fails and says where", async () => {
  const file = await upload([line(0), "{]"]);
  const asked = { input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" };
  const made = await client.batches.create(asked);
  const batch = await ended(() => client.batches.retrieve(made.id));
  assert.equal(batch.status, "failed");
  assert.deepEqual(batch.errors.data.map((each) => [each.code, each.line]), [["invalid_json_line", 2]]);
});

test("refusals have the SDK's classes", async () => {
  const asked = { input_file_id: "file-none", endpoint: "/v1/chat/completions", completion_window: "24h" };
  await assert.rejects(client.batches.create(asked), OpenAI.NotFoundError);
  await assert.rejects(client.batches.retrieve("batch_none"), OpenAI.NotFoundError);
  await assert.rejects(client.responses.retrieve("resp_none"), OpenAI.NotFoundError);
  const file = await toFile(Buffer.from("x"), "x");
  await assert.rejects(client.files.create({ file, purpose: "vision" }), OpenAI.BadRequestError);
});

test("a response runs in the background and is polled", async () => {
  const made = await client.responses.create({ model: "half", input: "hi", background: true });
  assert.equal(made.status, "queued");
  const response = await ended(() => client.responses.retrieve(made.id));
  assert.equal(response.output_text, "Hello from upstream");
  await client.responses.delete(made.id);
  await assert.rejects(client.responses.retrieve(made.id), OpenAI.NotFoundError);
});

test("a background stream is left and taken up again", async () => {
  const stream = await client.responses.create({ model: "half", input: "hi", background: true, stream: true });
  const seen = [];
  let id;
  for await (const event of stream) {
    id ??= event.response.id;
    seen.push(event.sequence_number);
    if (event.sequence_number === 3) break;
  }
  const rest = await collect(await client.responses.retrieve(id, { stream: true, starting_after: 3 }));
  const numbers = [...seen, ...rest.map((event) => event.sequence_number)];
  const again = await collect(await client.responses.retrieve(id, { stream: true }));
  assert.deepEqual(numbers, again.map((event) => event.sequence_number));
  assert.ok(numbers.every((number, place) => !place || number > numbers[place - 1]));
  assert.equal(rest.at(-1).type, "response.completed");
  assert.equal(rest.at(-1).response.id, id);
});

test("a background response is cancelled", async () => {
  const made = await client.responses.create({ model: "acme/late-20000", input: "hi", background: true });
  assert.equal((await client.responses.cancel(made.id)).status, "cancelled");
});
