// The page: asks, shows what comes, cancels. Every drawing is one streaming request; the service keeps nothing of it.

import { Drawing, blobOf, bytesOf, element } from "./drawing.js";
import * as form from "./form.js";
import { Gallery } from "./gallery.js";
import { readParameters } from "./parameters.js";
import { Fault, draw, fetchInfo } from "./service.js";

const DEMO_EXAMPLES = [
  "a red circle above a blue square on a white background",
  "a large striped orange star on a navy background",
  "a small green cross left of a purple triangle on a cream background",
];
const EXAMPLES = [
  "a lighthouse on a cliff at dusk, oil painting",
  "a fox asleep in autumn leaves, soft light, photograph",
  "a quiet harbour in the morning mist, woodblock print",
];
const MAX_FILE_BYTES = 64 * 2 ** 20;

const at = (id) => document.getElementById(id);
const gallery = new Gallery();
let info = null;
let running = null; // the AbortController of the drawing under way
let countdown = null;

/** Tells a screen reader. */
function say(text) {
  at("said").textContent = text;
}

/** A line that stays to be read. */
function note(text) {
  at("note").textContent = text;
  say(text);
}

async function start() {
  if (running) return;
  clearFaults();
  const abort = new AbortController();
  running = abort;
  at("draw").setAttribute("aria-disabled", "true");
  let drawing = null;
  const pictures = [];
  try {
    if (info === null && !(await load())) return;
    const fields = form.read();
    drawing = new Drawing({
      n: clamp(fields.n ?? info.defaults.n, 1, info.max_images),
      width: fields.width ?? info.native_size_px,
      height: fields.height ?? info.native_size_px,
      refined: info.refined && (fields.high_noise_frac ?? info.defaults.high_noise_frac) < 1,
      say,
    });
    gallery.hide();
    at("empty").hidden = true;
    for await (const event of draw(fields, abort.signal)) {
      drawing.take(event);
      if (event.type === "accepted") bringIntoView(at("drawing"));
      if (event.type === "image_generation.completed") keep(event, fields, pictures);
    }
    const what = pictures.length === 1 ? "Finished" : `${pictures.length} pictures finished`;
    note(`${what} in ${drawing.seconds.toFixed(1)} s.`);
  } catch (error) {
    if (error.name === "AbortError") note("Cancelled.");
    else showFault(error instanceof Fault ? error : new Fault(`The page failed: ${error.message}`));
  } finally {
    drawing?.end();
    running = null;
    at("draw").removeAttribute("aria-disabled");
    const first = pictures.find(Boolean) ?? gallery.shown;
    if (first) gallery.show(first);
    else at("empty").hidden = false;
  }
}

/** Keeps a finished picture. The event of the one that is finished last tells what holds for all of them. */
function keep(event, fields, pictures) {
  const bytes = bytesOf(event);
  const picture = {
    blob: blobOf(bytes, event.output_format),
    format: event.output_format,
    parameters: readParameters(bytes) ?? { ...fields, seed: event.seed },
    warnings: [],
    timings: [],
  };
  pictures[event.image_index] = picture;
  gallery.add(picture, pictures.slice(0, event.image_index).findLast(Boolean));
  if ("timings" in event) pictures.forEach((each) => Object.assign(each, { warnings: event.warnings, timings: event.timings }));
}

/** On a phone what is drawn stands below the form. */
function bringIntoView(section) {
  if (section.getBoundingClientRect().top > window.innerHeight * 0.6) section.scrollIntoView();
}

function cancel() {
  running?.abort();
}

function clearFaults() {
  form.clearFaults();
  clearInterval(countdown);
  at("fault").hidden = true;
  at("alarm").textContent = "";
  at("note").textContent = "";
}

/** Shows a fault at its field, or above the buttons, with another try where that may help. */
function showFault(fault) {
  at("alarm").textContent = fault.message;
  if (form.showFault(fault)) return;
  at("fault-message").textContent = fault.message;
  at("fault").hidden = false;
  at("retry").hidden = fault.retryAfterS === null;
  if (fault.retryAfterS !== null) countDown(fault.retryAfterS);
}

function countDown(seconds) {
  const button = at("retry");
  const end = performance.now() + seconds * 1000;
  const show = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) return button.setAttribute("aria-disabled", "true");
    clearInterval(countdown);
    button.removeAttribute("aria-disabled");
    if (seconds > 0) say("You can try again now.");
  };
  clearInterval(countdown);
  countdown = setInterval(show, 250);
  show();
}

/** Uses a picture's parameters again; without its seed each drawing has a new one. */
function use(parameters, seed = parameters.seed) {
  clearFaults();
  form.fill({ ...parameters, n: 1, seed });
}

async function readFile(file) {
  clearFaults();
  try {
    const bytes = file.size > MAX_FILE_BYTES ? null : new Uint8Array(await file.arrayBuffer());
    const parameters = bytes && readParameters(bytes);
    if (!parameters) return showFault(new Fault(`${file.name} holds no parameters of this service.`));
    if (info === null && !(await load())) return;
    use(parameters);
    note(`The parameters of ${file.name} are in the form.`);
  } catch (error) {
    showFault(new Fault(`${file.name} can't be read: ${error.message}`));
  }
}

/** Asks the service what it is. False, with the fault shown, where it doesn't answer. */
async function load() {
  const asked = at("prompt").value; // typed before the answer came
  try {
    info = await fetchInfo();
  } catch (error) {
    showFault(error);
    return false;
  }
  form.setUp(info);
  if (asked) at("prompt").value = asked;
  at("model").textContent = `${info.model}, native ${form.sizeText(info.native_size_px, info.native_size_px)}`;
  at("examples").replaceChildren(
    ...(info.embedded_demo ? DEMO_EXAMPLES : EXAMPLES).map((prompt) => {
      const button = element("button", { type: "button" }, prompt);
      button.addEventListener("click", () => form.setPrompt(prompt));
      return element("li", {}, button);
    }),
  );
  return true;
}

const clamp = (value, low, high) => Math.min(Math.max(Math.trunc(value) || low, low), high);
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");

form.listen();
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
at("cancel").addEventListener("click", cancel);
at("retry").addEventListener("click", () => {
  if (at("retry").hasAttribute("aria-disabled")) return;
  if (info !== null) start();
  else {
    clearFaults();
    load();
  }
});
at("again").addEventListener("click", () => {
  use(gallery.shown.parameters);
  note("The parameters of this picture are in the form.");
  at("draw").focus();
});
at("vary").addEventListener("click", () => {
  if (running) return;
  use(gallery.shown.parameters, "");
  start();
});
at("file").addEventListener("change", async () => {
  const [file] = at("file").files;
  if (file) await readFile(file);
  at("file").value = ""; // so that the same file can be read again
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  } else if (event.key === "Escape" && running) {
    event.preventDefault();
    cancel();
  }
});
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  at("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) at("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  at("drop").hidden = true;
  if (!holdsFiles(event)) return;
  event.preventDefault();
  readFile(event.dataTransfer.files[0]);
});
if (/Mac|iPhone|iPad/.test(navigator.platform)) at("draw").querySelector("kbd").textContent = "⌘ ↵";
load();
