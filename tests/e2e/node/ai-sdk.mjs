// The AI SDK against the gateway: chat by openai-compatible, responses by openai, messages by anthropic.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embed, embedMany, generateText, jsonSchema, streamText, tool } from "ai";
import { z } from "zod";
import { BASE_URL, GATEWAY_KEY, collect, goneAfter, journal } from "./gateway.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const settings = { baseURL: BASE_URL, apiKey: GATEWAY_KEY };
const compatible = createOpenAICompatible({ name: "headgate", ...settings });
const counting = createOpenAICompatible({ name: "headgate", includeUsage: true, ...settings });
const openai = createOpenAI(settings);
const anthropic = createAnthropic(settings);
const every = {
  chat: (model) => compatible(`acme/${model}`),
  "openai chat": (model) => openai.chat(`acme/${model}`),
  responses: (model) => openai(`acme/${model}`),
  messages: (model) => anthropic(`claude/${model}`),
};
const ask = (model, more = {}) => ({ model, prompt: "hi", maxRetries: 0, ...more });
const quiet = { onError() {} };
const tools = {
  get_weather: tool({ inputSchema: jsonSchema({ type: "object", properties: {} }) }),
  get_time: tool({ inputSchema: jsonSchema({ type: "object", properties: {} }) }),
};

for (const [dialect, model] of Object.entries(every)) {
  test(`text is generated and paid for: ${dialect}`, async () => {
    const { text, usage, response } = await generateText(ask(model("plain")));
    assert.equal(text, "Hello from upstream");
    assert.equal(usage.inputTokens, 25);
    assert.equal(usage.outputTokens, 8);
    assert.match(response.headers["x-request-id"], /^req_/);
  });

  test(`text is streamed: ${dialect}`, async () => {
    const result = streamText(ask(model("plain")));
    assert.equal((await collect(result.textStream)).join(""), "Hello from upstream");
    assert.equal(await result.finishReason, "stop");
  });

  test(`parallel tool calls come whole and streamed: ${dialect}`, async () => {
    const whole = await generateText(ask(model("parallel-tools"), { tools }));
    const streamed = streamText(ask(model("parallel-tools"), { tools }));
    for (const calls of [whole.toolCalls, await streamed.toolCalls]) {
      assert.deepEqual(calls.map((call) => call.toolName), ["get_weather", "get_time"]);
      assert.deepEqual(calls[0].input, { city: "Paris", days: 2 });
    }
  });

  test(`an error has its status and says whether to come back: ${dialect}`, async () => {
    for (const [status, isRetryable] of [[400, false], [401, false], [404, false], [429, true], [500, true], [503, true]]) {
      const error = await generateText(ask(model(`status-${status}`))).catch((failure) => failure);
      assert.ok(APICallError.isInstance(error), String(error));
      assert.equal(error.statusCode, status);
      assert.equal(error.isRetryable, isRetryable);
      if (status === 429) assert.equal(error.responseHeaders["retry-after"], "2");
    }
  });

  test(`an abort stops the upstream: ${dialect}`, async () => {
    const name = `hang+ai-${dialect.replace(" ", "-")}`;
    const abort = new AbortController();
    const call = generateText(ask(model(name), { abortSignal: abort.signal }));
    const failure = assert.rejects(call);
    while (!(await journal(name)).length);
    abort.abort();
    await failure;
    assert.ok((await goneAfter(name)) < 1000);
  });

  for (const fault of ["cut-after-6", "ending-after-6", "split-50+cut-after-25", "error-after-6"]) {
    test(`a stream that broke off has an error and no good end: ${dialect}, ${fault}`, async () => {
      const parts = [];
      let isBroken = false; // the SDK reads ahead: a broken body may come before the error in band, and then it throws
      try {
        for await (const part of streamText(ask(model(fault), quiet)).fullStream) parts.push(part);
      } catch (failure) {
        isBroken = APICallError.isInstance(failure);
      }
      const seen = parts.map((part) => part.type);
      assert.ok(isBroken || seen.includes("error"), seen.join());
      const finish = parts.find((part) => part.type === "finish");
      assert.ok(!finish || finish.finishReason === "error" || finish.finishReason === "other", finish?.finishReason);
    });
  }
}

test("usage is streamed to a client that asks for it", async () => {
  assert.equal((await streamText(ask(counting("acme/plain"))).usage).outputTokens, 8);
  assert.equal((await streamText(ask(compatible("acme/plain"))).usage).outputTokens, undefined);
});

test("reasoning is told apart from the answer", async () => {
  const { reasoningText, text } = await generateText(ask(every.chat("reasoning")));
  assert.equal(reasoningText, "Let me think about it");
  assert.equal(text, "Hello from upstream");
  assert.equal(await streamText(ask(every.chat("reasoning"))).reasoningText, "Let me think about it");
});

test("structured output is parsed", async () => {
  const schema = z.object({ name: z.string(), age: z.number(), tags: z.array(z.string()) });
  const { output } = await generateText(ask(every["openai chat"]("structured"), { output: Output.object({ schema }) }));
  assert.deepEqual(output, { name: "Ada", age: 36, tags: ["a", "é"] });
});

test("provider options become fields that reach the upstream", async () => {
  const providerOptions = { headgate: { chat_template_kwargs: { thinking: false }, user: "u1" } };
  await generateText(ask(every.chat("plain+ai-options"), { providerOptions }));
  const body = JSON.parse((await journal("plain+ai-options"))[0].body);
  assert.deepEqual(body.chat_template_kwargs, { thinking: false });
  assert.equal(body.user, "u1");
});

test("embeddings come as numbers", async () => {
  const model = compatible.embeddingModel("acme/ai-embed");
  assert.deepEqual((await embed({ model, value: "a" })).embedding, [0.25, -0.5, 0]);
  const { embeddings, usage } = await embedMany({ model, values: ["a", "b"] });
  assert.equal(embeddings.length, 2);
  assert.equal(usage.tokens, 5);
  assert.equal(JSON.parse((await journal("ai-embed"))[0].body).encoding_format, "float");
});

test("a cached prompt is told", async () => {
  const { usage } = await generateText(ask(every.messages("cached")));
  assert.equal(usage.inputTokens, 1200);
  assert.equal(usage.inputTokenDetails.cacheReadTokens, 1024);
});

test("a bad key is refused in either header", async () => {
  const strangers = [
    createOpenAICompatible({ name: "x", baseURL: BASE_URL, apiKey: "sk-nobody" })("acme/plain"),
    createAnthropic({ baseURL: BASE_URL, apiKey: "sk-nobody" })("claude/plain"),
  ];
  for (const model of strangers) {
    await assert.rejects(generateText(ask(model)), { statusCode: 401 });
  }
});
