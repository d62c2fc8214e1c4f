// The official Node client, unmodified: node conversation.js URL KEY

import assert from "node:assert/strict";
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError } from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const request = { model: "demo", messages: [{ role: "user", content: "def read(path):" }], max_tokens: 40 };
const schema = { type: "object", properties: { kind: { type: "boolean" } }, required: ["kind"], additionalProperties: false };

// So small a model goes on with spaces now and then, which JSON allows, until it is cut.
async function untilComplete(fields) {
  for (let seed = 0; seed < 8; seed++) {
    const { choices } = await client.chat.completions.create({ ...request, ...fields, seed });
    if (choices[0].finish_reason !== "length") return choices[0];
  }
  throw new Error("none of eight answers was complete");
}

const conversation = {
  async models() {
    assert.equal((await client.models.list()).data[0].id, "demo");
  },
  async chat() {
    const answer = await client.chat.completions.create({ ...request, n: 2, seed: 1, logprobs: true, top_logprobs: 3 });
    assert.equal(answer.choices.length, 2);
    assert.equal(answer.choices[0].logprobs.content[0].top_logprobs.length, 3);
  },
  async stream() {
    const stream = await client.chat.completions.create({ ...request, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.ok(text);
    assert.ok(usage.completion_tokens <= 40);
  },
  async leaving() {
    const stream = await client.chat.completions.create({ ...request, max_tokens: 500, stream: true });
    for await (const chunk of stream) {
      if (chunk) break;
    }
  },
  async tools() {
    const tools = [{ type: "function", function: { name: "look_up", parameters: schema, strict: true } }];
    const tool_choice = { type: "function", function: { name: "look_up" } };
    const choice = await untilComplete({ max_tokens: 100, tools, tool_choice });
    assert.equal(choice.message.tool_calls[0].function.name, "look_up");
  },
  async jsonSchema() {
    const response_format = { type: "json_schema", json_schema: { name: "found", schema, strict: true } };
    const choice = await untilComplete({ response_format });
    assert.deepEqual(Object.keys(JSON.parse(choice.message.content)), ["kind"]);
  },
  async completions() {
    const answer = await client.completions.create({ model: "demo", prompt: "import ", max_tokens: 4 });
    assert.ok(answer.choices[0].text);
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ ...request, n: 9 }), BadRequestError);
    await assert.rejects(client.chat.completions.create({ ...request, model: "another" }), NotFoundError);
    await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list(), AuthenticationError);
  },
};

for (const [name, step] of Object.entries(conversation)) {
  await step();
  console.log(name);
}
