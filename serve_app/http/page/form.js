// The form: what is asked for, to and from the fields of a request. What it can't show stands in "Other fields".

import { parseJson, toJson } from "./parameters.js";
import { Fault } from "./service.js";

const at = (id) => document.getElementById(id);

// SDXL's own sizes, on the scale of a native 1024.
const SHAPES = [
  [1024, 1024, "Square"],
  [1152, 896, "Landscape 9:7"],
  [1216, 832, "Landscape 3:2"],
  [1344, 768, "Landscape 7:4"],
  [1536, 640, "Panorama"],
  [896, 1152, "Portrait 7:9"],
  [832, 1216, "Portrait 2:3"],
  [768, 1344, "Portrait 4:7"],
  [640, 1536, "Banner"],
];
let samplerNames = {}; // by name, as the service labels them
const NUMBERS = ["n", "num_inference_steps", "guidance_scale", "high_noise_frac"];
const OWN = ["prompt", "negative_prompt", "width", "height", "seed", "scheduler", "output_format", ...NUMBERS];
const SENT_ANYHOW = ["stream", "progress", "partial_images"];
const MAX_PREVIEWS_SHOWN = 3;

let info = null;

export const samplerName = (name) => samplerNames[name] ?? name;
export const sizeText = (width, height) => `${width} × ${height}`;

/** Makes the form of what the service says of itself. */
export function setUp(facts) {
  info = facts;
  const scale = info.native_size_px / 1024;
  const fits = (side) => side >= info.min_side_px && side <= info.max_side_px;
  const sizes = SHAPES.map(([width, height, name]) => [toEight(width * scale), toEight(height * scale), name]);
  const choices = sizes
    .filter(([width, height]) => fits(width) && fits(height) && width * height <= info.max_pixels)
    .map(([width, height, name]) => [`${width}x${height}`, `${name}, ${sizeText(width, height)}`]);
  fillSelect(at("size"), [...choices, ["custom", "Custom …"]]);
  at("size-limits").textContent = `${info.min_side_px} to ${info.max_side_px} px a side`;
  for (const side of ["width", "height"]) {
    at(side).min = info.min_side_px;
    at(side).max = info.max_side_px;
  }
  samplerNames = info.scheduler_labels;
  const own = info.native_scheduler.replace(/(Discrete|Multistep)?Scheduler$/, "");
  fillSelect(at("scheduler"), [
    ["", `Native (${own})`],
    ...info.schedulers.map((name) => [name, samplerName(name)]),
  ]);
  at("n").max = info.max_images;
  at("num_inference_steps").max = info.max_steps;
  slider("num_inference_steps").max = Math.min(info.max_steps, 100);
  const previews = Array.from({ length: Math.min(info.max_partial_images, MAX_PREVIEWS_SHOWN) + 1 }, (_, i) => [i, i || "none"]);
  fillSelect(at("partial_images"), previews);
  at("partial_images").value = previews.length - 1;
  field("partial_images").hidden = info.max_partial_images === 0;
  field("high_noise_frac").hidden = !info.refined;
  fill(info.defaults);
}

const toEight = (side) => Math.round(side / 8) * 8;
const field = (name) => document.querySelector(`[data-field="${name}"]`);
const slider = (name) => document.querySelector(`[data-slides="${name}"]`);

function fillSelect(select, choices) {
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

/** Wires what moves within the form. */
export function listen() {
  at("size").addEventListener("change", () => {
    showCustomSize();
    if (at("size").value === "custom") at("width").focus();
  });
  at("random-seed").addEventListener("click", () => {
    at("seed").value = "";
    at("seed").focus();
  });
  for (const range of document.querySelectorAll("[data-slides]")) {
    const number = at(range.dataset.slides);
    range.addEventListener("input", () => {
      number.value = range.value;
      showSplit();
    });
    number.addEventListener("input", () => {
      range.value = number.value;
      showSplit();
    });
  }
  for (const text of document.querySelectorAll("textarea")) text.addEventListener("input", () => grow(text));
}

function showCustomSize() {
  const choice = at("size").value;
  at("custom-size").hidden = choice !== "custom";
  if (choice !== "custom") [at("width").value, at("height").value] = choice.split("x");
}

function showSplit() {
  const share = Number(at("high_noise_frac").value);
  const base = Math.round(share * 100);
  at("split-words").textContent = share >= 1 ? "the refiner draws nothing" : `base ${base}%, refiner ${100 - base}%`;
}

function grow(text) {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

export function setPrompt(prompt) {
  at("prompt").value = prompt;
  grow(at("prompt"));
  at("prompt").focus();
}

/** The request's fields and the number of previews. Throws a `Fault` about what can't be sent at all. */
export function read() {
  const fields = readOther();
  const set = (name, value) => {
    if (name in fields) throw new Fault(`${name} has a field of its own above.`, { param: "other" });
    fields[name] = value;
  };
  set("prompt", at("prompt").value);
  if (at("negative_prompt").value !== "") set("negative_prompt", at("negative_prompt").value);
  const seed = at("seed").value.trim();
  if (seed !== "") {
    if (!/^\d+$/.test(seed)) throw new Fault("A seed is a whole number of 0 or more.", { param: "seed" });
    set("seed", BigInt(seed).toString());
  }
  for (const name of ["width", "height", ...NUMBERS]) {
    if (name === "high_noise_frac" && !info.refined) continue;
    const value = number(name);
    if (value !== null) set(name, value);
  }
  if (at("scheduler").value) set("scheduler", at("scheduler").value);
  set("output_format", at("output_format").value);
  return { ...fields, partial_images: Number(at("partial_images").value) };
}

function readOther() {
  const text = at("other").value.trim();
  if (text === "") return {};
  let fields;
  try {
    fields = parseJson(text);
  } catch (error) {
    throw new Fault(`This is not JSON: ${error.message}`, { param: "other" });
  }
  if (fields === null || typeof fields !== "object" || Array.isArray(fields)) {
    throw new Fault('This is no JSON object, such as {"clip_skip": 1}.', { param: "other" });
  }
  const ours = SENT_ANYHOW.find((name) => name in fields);
  if (ours) throw new Fault(`The page sends ${ours} itself.`, { param: "other" });
  return fields;
}

function number(name) {
  const input = at(name);
  if (input.validity.badInput) throw new Fault("This is no number.", { param: name });
  return input.value === "" ? null : input.valueAsNumber;
}

/** Puts parameters, of a picture or the service's defaults, into the form; what they leave open is the default. */
export function fill(parameters) {
  const all = { ...info.defaults, ...parameters };
  for (const name of NUMBERS) {
    at(name).value = all[name] ?? "";
    if (slider(name)) slider(name).value = all[name];
  }
  at("prompt").value = all.prompt ?? "";
  at("negative_prompt").value = all.negative_prompt ?? "";
  at("seed").value = all.seed ?? "";
  at("scheduler").value = all.scheduler ?? "";
  at("output_format").value = all.output_format;
  const size = `${all.width}x${all.height}`;
  const isListed = [...at("size").options].some((option) => option.value === size);
  at("size").value = isListed ? size : "custom";
  [at("width").value, at("height").value] = [all.width, all.height];
  showCustomSize();
  showSplit();
  const usual = { ...info.defaults, refiner_guidance_scale: all.guidance_scale };
  const other = Object.entries(parameters).filter(
    ([name, value]) => !OWN.includes(name) && JSON.stringify(value) !== JSON.stringify(usual[name]),
  );
  if (all.negative_prompt === "") other.push(["negative_prompt", ""]); // an empty one is not an absent one
  if (all.high_noise_frac !== undefined && !info.refined && all.high_noise_frac !== 1) {
    other.push(["high_noise_frac", all.high_noise_frac]); // for the service to refuse
  }
  at("other").value = other.length ? toJson(Object.fromEntries(other)) : "";
  if (other.length) at("more").open = true;
  for (const text of document.querySelectorAll("textarea")) grow(text);
}

/** Shows a fault at its field and goes there. False where the form has no such field. */
export function showFault({ param, message }) {
  if (param === null) return false;
  const name = { width: "size", height: "size" }[param] ?? param;
  const place = field(name) ?? field("other");
  const control = at({ width: "width", height: "height" }[param] ?? place.dataset.field) ?? at("other");
  at(`${place.dataset.field}-fault`).textContent = message;
  if (name === "size") {
    at("size").value = "custom";
    at("custom-size").hidden = false;
  }
  control.setAttribute("aria-invalid", "true");
  if (place.closest("details")) at("more").open = true;
  control.focus();
  return true;
}

export function clearFaults() {
  for (const line of document.querySelectorAll(".field-fault")) line.textContent = "";
  for (const control of document.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
}
