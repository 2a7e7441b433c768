// The pictures of this visit: one is shown large, with its parameters, its times and what can be done with it.

import { element, showWarnings, shownWidth } from "./drawing.js";
import { samplerName, sizeText } from "./form.js";

const at = (id) => document.getElementById(id);
const SUFFIX = { png: "png", jpeg: "jpg", webp: "webp" };

/**
 * @typedef {{blob: Blob, parameters: object, format: string, warnings: string[], timings: object[]}} Picture
 * `parameters` are those inside the file: they draw it again.
 */
export class Gallery {
  #shown = null;

  /** @type {Picture | null} */
  get shown() {
    return this.#shown;
  }

  /** Puts a picture first, or after another of its drawing. */
  add(picture, previous) {
    picture.address = URL.createObjectURL(picture.blob);
    const { parameters } = picture;
    const image = element("img", { src: picture.address, alt: shortened(parameters.prompt) });
    const button = element("button", { type: "button" }, image, element("span", {}, `seed ${parameters.seed}`));
    button.addEventListener("click", () => {
      this.show(picture);
      at("picture").scrollIntoView({ block: "nearest" });
    });
    picture.thumb = button;
    const item = element("li", {}, button);
    if (previous) previous.thumb.parentElement.after(item);
    else at("thumbs").prepend(item);
    at("gallery").hidden = false;
    at("empty").hidden = true;
  }

  /** @param {Picture} picture */
  show(picture) {
    this.#shown = picture;
    const { parameters } = picture;
    for (const button of at("thumbs").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", button === picture.thumb);
    }
    const image = at("picture-image");
    Object.assign(image, { src: picture.address, alt: shortened(parameters.prompt) });
    image.style.aspectRatio = `${parameters.width} / ${parameters.height}`;
    image.style.width = `${shownWidth(parameters.width)}px`;
    at("picture-title").textContent = parameters.prompt;
    at("picture-title").title = parameters.prompt;
    Object.assign(at("download"), { href: picture.address, download: fileName(picture) });
    at("parameters").replaceChildren(
      ...described(parameters).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    );
    showWarnings(at("warnings"), picture.warnings);
    showTimes(picture.timings);
    at("picture").hidden = false;
  }

  hide() {
    at("picture").hidden = true;
  }
}

function described(parameters) {
  const { width, height, seed, num_inference_steps, guidance_scale, high_noise_frac, scheduler, negative_prompt } = parameters;
  const lines = [
    ["Seed", seed],
    ["Size", sizeText(width, height)],
    ["Steps", num_inference_steps],
    ["Guidance", guidance_scale],
    ["Sampler", scheduler ? samplerName(scheduler) : "native"],
    ["Base's share", high_noise_frac < 1 ? `${Math.round(high_noise_frac * 100)}%` : "all"],
  ];
  if (negative_prompt !== undefined) lines.push(["Not to draw", negative_prompt === "" ? "(empty)" : negative_prompt]);
  return lines;
}

function showTimes(timings) {
  at("times").hidden = timings.length === 0;
  const taken = timings.filter(({ seconds }) => seconds > 0);
  const total = taken.reduce((sum, { seconds }) => sum + seconds, 0);
  at("total-time").textContent = secondsText(total);
  at("time-bar").replaceChildren(
    ...taken.map(({ stage, seconds }) => {
      const segment = element("span", { className: "segment" }, element("span", { className: stage }));
      segment.style.flexGrow = (seconds / total) * 100;
      return segment;
    }),
  );
  at("time-legend").replaceChildren(
    ...taken.map(({ stage, seconds, steps, queue_seconds }) => {
      const more = [];
      if (steps) more.push(`${steps} ${steps === 1 ? "step" : "steps"}`);
      if (queue_seconds >= 0.05) more.push(`${secondsText(queue_seconds)} of it waiting`);
      const small = element("small", {}, more.join(", "));
      return element("li", { className: stage }, `${stage} `, element("b", {}, secondsText(seconds)), " ", small);
    }),
  );
}

function secondsText(seconds) {
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

function shortened(prompt) {
  return prompt.length > 100 ? `${prompt.slice(0, 100)}…` : prompt;
}

function fileName({ parameters, format }) {
  const words = parameters.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return `${words.slice(0, 8).join("-").slice(0, 60)}-${parameters.seed}.${SUFFIX[format]}`;
}
