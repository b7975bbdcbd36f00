// openai-node against the gateway.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { BASE_URL, GATEWAY_KEY, USER, collect, goneAfter, journal } from "./gateway.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: GATEWAY_KEY, maxRetries: 0, timeout: 20_000 });
const chat = (model, more = {}) => client.chat.completions.create({ model: `acme/${model}`, messages: USER, ...more });
const weather = { type: "function", function: { name: "get_weather", parameters: { type: "object", properties: {} } } };
const text = (chunks) => chunks.flatMap((c) => c.choices.map((choice) => choice.delta.content ?? "")).join("");

test("a chat is answered and tells its request id", async () => {
  const answer = await chat("plain");
  assert.equal(answer.choices[0].message.content, "Hello from upstream");
  assert.equal(answer.usage.completion_tokens, 8);
  assert.match(answer._request_id, /^req_/);
});

test("a stream has no usage chunk that was not asked for", async () => {
  const chunks = await collect(await chat("plain", { stream: true }));
  assert.equal(text(chunks), "Hello from upstream");
  assert.ok(chunks.every((chunk) => chunk.choices.length === 1));
});

test("a stream has the usage chunk that was asked for", async () => {
  const chunks = await collect(await chat("plain", { stream: true, stream_options: { include_usage: true } }));
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.prompt_tokens, 25);
});

for (const delivery of ["crlf", "comments", "no-space", "split-1", "joined", "close-framed"]) {
  test(`a stream is read in any legal spelling: ${delivery}`, async () => {
    const chunks = await collect(await chat(`unicode+${delivery}`, { stream: true }));
    assert.equal(text(chunks), "Grüße 日本語 🎉 naïve");
  });
}

test("a line of a megabyte passes", async () => {
  const chunks = await collect(await chat("huge-line", { stream: true }));
  assert.equal(text(chunks).length, 1_000_000);
});

test("parallel tool calls streamed in pieces come together", async () => {
  const stream = client.chat.completions.stream({ model: "acme/parallel-tools", messages: USER, tools: [weather] });
  const calls = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  assert.deepEqual(calls.map((call) => call.function.name), ["get_weather", "get_time"]);
  assert.deepEqual(JSON.parse(calls[0].function.arguments), { city: "Paris", days: 2 });
});

test("structured output is parsed", async () => {
  const Person = z.object({ name: z.string(), age: z.number(), tags: z.array(z.string()) });
  const answer = await client.chat.completions.parse({
    model: "acme/structured",
    messages: USER,
    response_format: zodResponseFormat(Person, "person"),
  });
  assert.deepEqual(answer.choices[0].message.parsed, { name: "Ada", age: 36, tags: ["a", "é"] });
});

test("reasoning and unknown fields reach the client", async () => {
  const answer = await chat("reasoning");
  assert.equal(answer.choices[0].message.reasoning_content, "Let me think about it");
});

test("unknown fields reach the upstream", async () => {
  await chat("plain+node-unknown", { chat_template_kwargs: { a: [1, null] }, verbosity: "low" });
  const body = JSON.parse((await journal("plain+node-unknown"))[0].body);
  assert.deepEqual(body.chat_template_kwargs, { a: [1, null] });
  assert.equal(body.verbosity, "low");
});

test("embeddings are asked for in base64 and decoded", async () => {
  const answer = await client.embeddings.create({ model: "acme/node-embed", input: ["a", "b"] });
  assert.deepEqual(answer.data.map((item) => [...item.embedding]), [[0.25, -0.5, 0], [0.25, -0.5, 1]]);
  assert.equal(JSON.parse((await journal("node-embed"))[0].body).encoding_format, "base64");
});

test("embeddings asked for as numbers come as numbers", async () => {
  const answer = await client.embeddings.create({ model: "acme/e", input: "a", encoding_format: "float" });
  assert.deepEqual(answer.data[0].embedding, [0.25, -0.5, 0]);
});

test("a response is answered whole and streamed", async () => {
  const answer = await client.responses.create({ model: "acme/plain", input: "hi" });
  assert.equal(answer.output_text, "Hello from upstream");
  const events = await collect(await client.responses.create({ model: "acme/plain", input: "hi", stream: true }));
  assert.equal(events.at(-1).type, "response.completed");
  assert.equal(events.at(-1).response.usage.total_tokens, 33);
});

test("legacy completions are answered whole and streamed", async () => {
  const answer = await client.completions.create({ model: "acme/plain", prompt: "hi" });
  assert.equal(answer.choices[0].text, "Hello from upstream");
  const chunks = await collect(await client.completions.create({ model: "acme/plain", prompt: "hi", stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), "Hello from upstream");
});

test("models are listed and retrieved by ids with slashes", async () => {
  const ids = (await collect(client.models.list())).map((model) => model.id);
  assert.ok(ids.includes("org/llama-3"));
  assert.equal((await client.models.retrieve("org/llama-3")).id, "org/llama-3");
});

const classes = {
  400: OpenAI.BadRequestError,
  401: OpenAI.AuthenticationError,
  403: OpenAI.PermissionDeniedError,
  404: OpenAI.NotFoundError,
  409: OpenAI.ConflictError,
  413: OpenAI.APIError,
  422: OpenAI.UnprocessableEntityError,
  429: OpenAI.RateLimitError,
  500: OpenAI.InternalServerError,
  502: OpenAI.InternalServerError,
  503: OpenAI.InternalServerError,
  504: OpenAI.InternalServerError,
};
test("an upstream's errors keep their class, status and code, and tell the request id", async () => {
  for (const [status, kind] of Object.entries(classes)) {
    for (const stream of [false, true]) {
      const error = await chat(`status-${status}`, { stream }).catch((failure) => failure);
      assert.ok(error instanceof kind, `${status}: ${error}`);
      assert.equal(error.status, Number(status));
      assert.match(error.requestID, /^req_/);
      if (status === "429") {
        assert.equal(error.code, "rate_limit_exceeded");
        assert.equal(error.headers.get("retry-after"), "2");
      }
    }
  }
});

test("the gateway's own refusals are errors of the SDK", async () => {
  await assert.rejects(client.withOptions({ apiKey: "sk-nobody" }).models.list(), OpenAI.AuthenticationError);
  await assert.rejects(
    client.chat.completions.create({ model: "no-such", messages: USER }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found" && error.param === "model",
  );
});

test("a server error is tried again, of an unreachable upstream the SDK is told not to", async () => {
  const patient = client.withOptions({ maxRetries: 1 });
  await assert.rejects(patient.chat.completions.create({ model: "acme/status-500+again", messages: USER }));
  assert.equal((await journal("status-500+again")).length, 2);
  const failure = await patient.chat.completions.create({ model: "down/any", messages: USER }).catch((error) => error);
  assert.equal(failure.status, 502);
  assert.equal(failure.headers.get("x-should-retry"), "false");
});

test("breaking out of a stream stops the upstream", async () => {
  for await (const _ of await chat("hang-after-3+node-break", { stream: true })) break;
  assert.ok((await goneAfter("hang-after-3+node-break")) < 1000);
});

test("an aborted request stops the upstream before its first byte", async () => {
  const abort = new AbortController();
  const call = client.chat.completions.create({ model: "acme/hang+node-abort", messages: USER }, { signal: abort.signal });
  const failure = assert.rejects(call, OpenAI.APIUserAbortError);
  while (!(await journal("hang+node-abort")).length);
  abort.abort();
  await failure;
  assert.ok((await goneAfter("hang+node-abort")) < 1000);
});

test("a timed out request stops the upstream", async () => {
  const impatient = client.withOptions({ timeout: 200 });
  const call = impatient.chat.completions.create({ model: "acme/hang+node-late", messages: USER });
  await assert.rejects(call, OpenAI.APIConnectionTimeoutError);
  assert.ok((await goneAfter("hang+node-late")) < 1000);
});

for (const fault of ["cut-after-3", "ending-after-3", "reset-after-3", "error-after-3", "error-done-after-3"]) {
  test(`a chat stream that broke off raises: ${fault}`, async () => {
    await assert.rejects(async () => collect(await chat(fault, { stream: true })), OpenAI.APIError);
  });
}

test("a stream cut inside an event raises", async () => {
  await assert.rejects(async () => collect(await chat("split-50+cut-after-15", { stream: true })));
});

test("a response that broke off raises", async () => {
  const stream = await client.responses.create({ model: "acme/cut-after-6", input: "hi", stream: true });
  await assert.rejects(collect(stream), OpenAI.APIError);
});
