// The service over HTTP: its facts, and a drawing as a stream of events. Addresses are relative: the service may
// stand under any prefix.

import { parseJson, toJson } from "./parameters.js";

/**
 * A fault as one line. `param`: the field at fault. `retryAfterS`: when trying again may help, null where it can't.
 */
export class Fault extends Error {
  constructor(message, { param = null, retryAfterS = null } = {}) {
    super(message);
    this.param = param;
    this.retryAfterS = retryAfterS;
  }
}

const UNSAID_WAIT_S = 1;

export async function fetchInfo() {
  const response = await reach("v1/sdxl/info");
  if (!response.ok) throw await faultOf(response);
  return response.json();
}

/**
 * Draws `fields`, and yields `{type: "accepted", warnings}`, then the events of the stream as they come.
 * Throws a `Fault`, or an `AbortError` when `signal` cancels it: the service then frees the slots.
 */
export async function* draw(fields, signal) {
  const response = await reach("v1/images/generations", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: toJson({ ...fields, stream: true, progress: true }),
    signal,
  });
  if (!response.ok || !response.headers.get("content-type")?.startsWith("text/event-stream")) {
    throw await faultOf(response);
  }
  yield { type: "accepted", warnings: JSON.parse(response.headers.get("x-sdxl-warnings") ?? "[]") };
  let finished = false;
  for await (const line of lines(response.body, signal)) {
    if (!line.startsWith("data:")) continue; // a comment, a blank line, or a name that stands in the data too
    const event = parseJson(line.slice("data:".length));
    if (event.error) throw envelopeFault(event.error, event.error.type === "invalid_request_error" ? null : UNSAID_WAIT_S);
    finished ||= "timings" in event;
    yield event;
  }
  if (!finished) throw new Fault("The connection ended before the drawing was finished.", { retryAfterS: 0 });
}

async function reach(address, options) {
  try {
    return await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("The service can't be reached.", { retryAfterS: 0 });
  }
}

async function* lines(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) return;
      let from = 0;
      for (let end; (end = value.indexOf("\n", from)) >= 0; from = end + 1) {
        parts.push(value.slice(from, end));
        yield parts.join("").trimEnd();
        parts = [];
      }
      parts.push(value.slice(from));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw new DOMException("cancelled", "AbortError");
    throw new Fault("The connection broke before the drawing was finished.", { retryAfterS: 0 });
  }
}

async function faultOf(response) {
  const said = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  const inVain = response.headers.get("x-should-retry") === "false";
  const wait = response.status === 503 && !inVain ? (Number.isNaN(said) ? UNSAID_WAIT_S : said) : null;
  try {
    return envelopeFault((await response.json()).error, wait);
  } catch {
    return new Fault(`HTTP ${response.status} ${response.statusText}`.trim(), { retryAfterS: wait });
  }
}

function envelopeFault({ message, param }, retryAfterS) {
  return new Fault(message, { param, retryAfterS });
}
