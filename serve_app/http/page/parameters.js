// Parameters of a picture: out of its file, and from and to JSON. Knows nothing of the page.
// Seeds go up to 2^63 - 1, which no JavaScript number holds: here they are strings of digits.

const PNG_SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const PNG_KEY = "sdxl-serve";
const EXIF_START = "ASCII\0\0\0{"; // of EXIF's UserComment, in JPEG and WebP

/** Plain data of JSON, its `seed`s as strings. In a JSON text a quoted "seed" of a prompt is escaped, so it stays. */
export function parseJson(text) {
  return JSON.parse(text.replace(/"seed"\s*:\s*(\d+)/g, '"seed":"$1"'));
}

/** JSON of plain data whose `seed`, if it has one, is a string of digits. */
export function toJson(fields) {
  const { seed, ...others } = fields;
  const text = JSON.stringify(others);
  return seed === undefined ? text : `${text.slice(0, -1)}${text === "{}" ? "" : ","}"seed":${seed}}`;
}

/** The parameters inside a picture file of this service; null where there are none. */
export function readParameters(bytes) {
  const text = PNG_SIGNATURE.every((byte, index) => bytes[index] === byte) ? pngText(bytes) : exifText(bytes);
  if (text === null) return null;
  try {
    const parameters = parseJson(text);
    return typeof parameters === "object" && typeof parameters.prompt === "string" ? parameters : null;
  } catch {
    return null;
  }
}

function pngText(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = PNG_SIGNATURE.length; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (ascii(bytes.subarray(at + 4, at + 8)) === "tEXt") {
      const end = data.indexOf(0);
      if (end >= 0 && ascii(data.subarray(0, end)) === PNG_KEY) return ascii(data.subarray(end + 1));
    }
    at += 12 + length;
  }
  return null;
}

function exifText(bytes) {
  const file = ascii(bytes);
  const start = file.indexOf(EXIF_START);
  if (start < 0) return null;
  const from = start + EXIF_START.length - 1;
  let depth = 0;
  let quoted = false;
  for (let at = from; at < file.length; at += 1) {
    const letter = file[at];
    if (quoted) {
      if (letter === "\\") at += 1;
      else if (letter === '"') quoted = false;
    } else if (letter === '"') quoted = true;
    else if (letter === "{") depth += 1;
    else if (letter === "}" && --depth === 0) return file.slice(from, at + 1);
  }
  return null;
}

function ascii(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}
