// Where the gateway is, and what the scripted upstream behind it has seen.
import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

export const { GATEWAY_URL, GATEWAY_KEY, UPSTREAM_URL } = process.env;
export const BASE_URL = `${GATEWAY_URL}/v1`;
export const USER = [{ role: "user", content: "hi" }];

// The requests for an upstream model, oldest first. Name models so that no other test uses them: unknown words in
// a name change nothing.
export async function journal(model) {
  const records = await (await fetch(`${UPSTREAM_URL}/journal`)).json();
  return records.filter((record) => JSON.parse(record.body || "{}").model === model);
}

// Milliseconds until the upstream has noticed that its client is gone.
export async function goneAfter(model) {
  const start = performance.now();
  while (performance.now() - start < 5000) {
    const records = await journal(model);
    if (records.length && records.every((record) => record.ended === "peer gone")) return performance.now() - start;
    await sleep(5);
  }
  assert.fail(`the upstream still works on ${model}`);
}

export async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}
