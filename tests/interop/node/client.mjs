// OpenAI's client for Node against a server: node client.mjs NODE_MODULES URL KEY WHAT [ARGUMENT]; prints one JSON document.
import fs from "node:fs";
import { createRequire } from "node:module";

const [modules, url, key, what, argument] = process.argv.slice(2);
const OpenAI = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const given = { model: "tts-1", voice: "alloy", input: "Hello there, nice to hear you.", seed: 7, max_seconds: 0.8 };

const base64 = (parts) => Buffer.concat(parts.map((part) => Buffer.from(part))).toString("base64");

const actions = {
  async bytes() {
    const answer = await client.audio.speech.create({ ...given, response_format: argument });
    return { type: answer.headers.get("content-type"), audio: base64([await answer.arrayBuffer()]) };
  },

  async stream() {
    const answer = await client.audio.speech.create({ ...given, response_format: "pcm" });
    const parts = [];
    for await (const part of answer.body) parts.push(part);
    return { parts: parts.length, audio: base64(parts) };
  },

  async events() {
    const answer = await client.audio.speech.create({ ...given, response_format: argument, stream_format: "sse" });
    const events = (await answer.text()).split("\n\n").filter(Boolean).map((block) => JSON.parse(block.slice("data: ".length)));
    const audio = events.filter((event) => event.type === "speech.audio.delta").map((event) => Buffer.from(event.audio, "base64"));
    return { audio: base64(audio), last: events.at(-1) };
  },

  async voice() {
    const sample = fs.createReadStream(argument);
    const made = await client.audio.voices.create({ name: "noded", consent: "I agree.", audio_sample: sample });
    const answer = await client.audio.speech.create({ ...given, voice: { id: made.id }, response_format: "pcm" });
    const audio = base64([await answer.arrayBuffer()]);
    return { made, audio, deleted: await client.audio.voices.delete(made.id) };
  },

  async errors() {
    const told = [];
    for (const wrong of [{ speed: 2 }, { voice: "nobody" }]) {
      const error = await client.audio.speech.create({ ...given, ...wrong }).catch((error) => error);
      told.push({ kind: error.constructor.name, status: error.status, code: error.code, param: error.param, request: error.requestID });
    }
    return told;
  },

  async models() {
    return (await client.models.list()).data.map((model) => model.id);
  },

  async leave() {
    const answer = await client.audio.speech.create({ ...given, input: argument, max_seconds: 20, response_format: "pcm" });
    const reader = answer.body.getReader();
    await reader.read();
    await reader.cancel();
    // Until the server says so, while this process lives: its end would close the connection anyway.
    for (let running = true; running; ) {
      const answer = await fetch(`${url}/metrics`, { headers: { authorization: `Bearer ${key}` } });
      running = !(await answer.text()).includes("aloud_streams_running 0.0");
    }
    return {};
  },
};

console.log(JSON.stringify(await actions[what]()));
process.exit(0);
