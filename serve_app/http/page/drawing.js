// A drawing on its way: one bar of the four stages, and a tile for each picture with its previews.

const STAGES = ["encode", "denoise", "refine", "decode"];
const WEIGHTS = { encode: 1, denoise: 8, refine: 3, decode: 1 }; // of the bar's length, until the times are known

const at = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Picture bytes of an event. */
export function bytesOf(event) {
  return Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
}

export function blobOf(bytes, format) {
  return new Blob([bytes], { type: `image/${format}` });
}

export class Drawing {
  #began = performance.now();
  #clock = setInterval(() => this.#tick(), 100);
  #images;
  #stages;
  #segments = new Map();
  #say;

  /** `say(text)` tells a screen reader; only what changes seldom is told. */
  constructor({ n, width, height, refined, say }) {
    this.#say = say;
    this.#stages = STAGES.filter((stage) => stage !== "refine" || refined);
    at("bar").replaceChildren(...this.#stages.map((stage) => this.#segment(stage)));
    at("stages").replaceChildren(...this.#stages.map((stage) => element("li", { className: stage }, stage)));
    this.#images = Array.from({ length: n }, (_, index) => new Tile(index, n, width, height));
    at("tiles").replaceChildren(...this.#images.map((image) => image.root));
    at("tiles").className = n > 1 ? "many" : "";
    showWarnings(at("early-warnings"), []);
    at("drawing").hidden = false;
    this.#tick();
    this.#update();
  }

  #segment(stage) {
    const fill = element("span", { className: stage });
    const segment = element("span", { className: "segment" }, fill);
    segment.style.flexGrow = WEIGHTS[stage];
    this.#segments.set(stage, fill);
    return segment;
  }

  /** Takes an event of the stream in. */
  take(event) {
    const image = this.#images[event.image_index];
    switch (event.type) {
      case "accepted":
        showWarnings(at("early-warnings"), event.warnings);
        break;
      case "image_generation.progress":
        // The encode stage is every picture's.
        for (const each of event.stage === "encode" ? this.#images : [image]) each.progress(event);
        break;
      case "image_generation.partial_image":
        image.preview(blobOf(bytesOf(event), event.output_format));
        break;
      case "image_generation.completed":
        image.finish(blobOf(bytesOf(event), event.output_format));
        break;
    }
    this.#update();
  }

  #update() {
    let sum = 0;
    let whole = 0;
    for (const stage of this.#stages) {
      const share = this.#images.reduce((total, image) => total + image.share(stage), 0) / this.#images.length;
      this.#segments.get(stage).style.width = `${share * 100}%`;
      sum += share * WEIGHTS[stage];
      whole += WEIGHTS[stage];
    }
    const percent = Math.floor((sum / whole) * 100);
    const slowest = this.#images.reduce((a, b) => (STAGES.indexOf(b.stage) < STAGES.indexOf(a.stage) ? b : a));
    const bar = at("bar");
    bar.setAttribute("aria-valuenow", percent);
    bar.setAttribute("aria-valuetext", `${percent}%, ${slowest.words}`);
    for (const item of at("stages").children) {
      if (item.className !== slowest.stage) item.removeAttribute("aria-current");
      else if (!item.hasAttribute("aria-current")) {
        item.setAttribute("aria-current", "step");
        this.#say(`Stage: ${slowest.stage}`);
      }
    }
    document.title = `${percent}% · sdxl-serve`;
  }

  #tick() {
    at("elapsed").textContent = `${this.seconds.toFixed(1)} s`;
  }

  get seconds() {
    return (performance.now() - this.#began) / 1000;
  }

  end() {
    clearInterval(this.#clock);
    for (const image of this.#images) image.end();
    at("drawing").hidden = true;
    document.title = "sdxl-serve";
  }
}

class Tile {
  stage = "encode";
  #step = 0;
  #steps = 0;
  #finished = false;
  #position = null;
  #address = null;
  #number;
  #image = element("img", { alt: "", hidden: true });
  #words = element("span");

  constructor(index, n, width, height) {
    this.#number = n > 1 ? `Picture ${index + 1}` : "";
    const words = element("p", { className: "words" }, element("b", {}, this.#number), " ", this.#words);
    const frame = element("div", { className: "frame" }, this.#image);
    frame.style.aspectRatio = `${width} / ${height}`;
    frame.style.maxWidth = `min(100%, ${shownWidth(width)}px, ${Math.round((width / height) * 60)}vh)`;
    this.root = element("li", {}, frame, words);
    this.#show();
  }

  progress({ stage, step, steps, queue_position }) {
    if (STAGES.indexOf(stage) < STAGES.indexOf(this.stage)) return;
    [this.stage, this.#step, this.#steps, this.#position] = [stage, step, steps, queue_position];
    this.#show();
  }

  preview(blob) {
    this.#put(blob, `Preview${this.#number ? ` of ${this.#number.toLowerCase()}` : ""}`);
  }

  finish(blob) {
    this.#finished = true;
    this.stage = "decode";
    this.#put(blob, this.#number || "Picture");
    this.#show();
  }

  #put(blob, alt) {
    this.end();
    this.#address = URL.createObjectURL(blob);
    Object.assign(this.#image, { src: this.#address, alt, hidden: false });
  }

  #show() {
    this.#words.textContent = this.words;
  }

  get words() {
    if (this.#finished) return "finished";
    if (this.#position !== null) {
      return this.#position === 0 ? `${this.stage}, next in line` : `${this.stage}, ${this.#position} before it`;
    }
    return this.#steps ? `${this.stage}, step ${this.#step} of ${this.#steps}` : this.stage;
  }

  /** How much of a stage is behind this picture, 0 to 1. */
  share(stage) {
    if (this.#finished) return 1;
    const [own, here] = [STAGES.indexOf(this.stage), STAGES.indexOf(stage)];
    if (own !== here) return own > here ? 1 : 0;
    return this.#steps ? this.#step / this.#steps : 0;
  }

  end() {
    if (this.#address) URL.revokeObjectURL(this.#address);
    this.#address = null;
  }
}

/** CSS pixels that a picture is shown in: small ones are enlarged, none beyond what fits the page. */
export function shownWidth(width) {
  return width < 256 ? width * 3 : Math.max(width, 512);
}

export function showWarnings(list, warnings) {
  list.replaceChildren(...warnings.map((line) => element("li", {}, line)));
  list.hidden = warnings.length === 0;
}
