// What the pages of a model share: its worker, noise, pictures and GIFs. Their scripts follow, and have `start`.
"use strict";

const $ = id => document.getElementById(id);
let facts;
let size;
let channels;
let worker;
let kernel;

const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

function say(text) {
  if ($("line").textContent !== text) $("line").textContent = text;
}

// The worker ---------------------------------------------------------------------------------------

const waiting = new Map();
let asked = 0;

function ask(task, input) {
  asked += 1;
  const id = asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, {resolve, reject});
    worker.postMessage({id, task, ...input});
  });
}

function onAnswer({data: {id, result, error}}) {
  const {resolve, reject} = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
}

function startWorker() {
  const code = new Blob([$("engine").textContent], {type: "text/javascript"});
  worker = new Worker(URL.createObjectURL(code));
  worker.onmessage = onAnswer;
  worker.onerror = event => say(`The worker has failed: ${event.message}.`);
  return ask("load", {
    model: facts.model,
    shapes: facts.shapes,
    weights: $("weights").textContent,
    kernel: facts.kernel,
    plain: location.search === "?plain",  // to try the fallback
  });
}

// Noise and pictures -------------------------------------------------------------------------------

// Seeded standard normal numbers: a stream for each seed and draw (mulberry32 and Box-Muller).
function gaussian(...key) {
  let state = 0x2545F491;
  for (const word of key) state = Math.imul(state ^ word, 0x9E3779B1) ^ state >>> 15;
  const uniform = () => {
    state = state + 0x6D2B79F5 | 0;
    let z = Math.imul(state ^ state >>> 15, 1 | state);
    z = z + Math.imul(z ^ z >>> 7, 61 | z) ^ z;
    return ((z ^ z >>> 14) >>> 0) / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

const indexOf = (c, t, y, x, T) => ((c * T + t) * size + y) * size + x;

// The picture of a frame of a clip x
function imageOf(x, frame, numFrames) {
  const image = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) {
      const value = x[indexOf(Math.min(c, channels - 1), frame, 0, i, numFrames)];
      image.data[4 * i + c] = Math.round((value + 1) * 127.5);
    }
    image.data[4 * i + 3] = 255;
  }
  return image;
}

// GIF ----------------------------------------------------------------------------------------------

const lettersOf = text => [...text].map(letter => letter.charCodeAt(0));
const word = value => [value & 255, value >> 8];  // 2 bytes

// Bytes of an animated GIF of these images, which loops. Each has its own palette, exact up to 256 colors.
function makeGif(images) {
  const factor = Math.max(1, Math.round(256 / size));
  const side = size * factor;
  const delay = Math.max(2, Math.round(100 * facts.timeScale));
  const bytes = [...lettersOf("GIF89a"), ...word(side), ...word(side), 0, 0, 0];
  bytes.push(0x21, 0xFF, 11, ...lettersOf("NETSCAPE2.0"), 3, 1, 0, 0, 0);
  for (const image of images) {
    const {palette, indices} = paletteOf(image.data);
    const large = new Uint8Array(side * side);
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++)
        large[y * side + x] = indices[Math.floor(y / factor) * size + Math.floor(x / factor)];
    bytes.push(0x21, 0xF9, 4, 4, ...word(delay), 0, 0);
    bytes.push(0x2C, 0, 0, 0, 0, ...word(side), ...word(side), 0x87, ...palette, 8);
    const codes = compress(large);
    for (let at = 0; at < codes.length; at += 255) {
      const block = codes.slice(at, at + 255);
      bytes.push(block.length, ...block);
    }
    bytes.push(0);
  }
  return Uint8Array.from([...bytes, 0x3B]);
}

// The colors of an image, with as many of their leading bits as make at most 256 colors.
function paletteOf(data) {
  for (let drop = 0; ; drop++) {
    const known = new Map();
    const indices = [];
    const palette = new Array(768).fill(0);
    for (let i = 0; i < data.length; i += 4) {
      const color = [0, 1, 2].map(c => data[i + c] >> drop << drop);
      const key = color.join();
      if (!known.has(key)) {
        palette.splice(3 * known.size, 3, ...color);
        known.set(key, known.size);
      }
      indices.push(known.get(key));
    }
    if (known.size <= 256) return {palette: palette.slice(0, 768), indices};
  }
}

// LZW with codes of 9 to 12 bits; 256 clears the table, 257 ends.
function compress(values) {
  const out = [];
  let bits = 0;
  let waitingBits = 0;
  let width = 9;
  let table = new Map();
  let prefix = values[0];
  const emit = code => {
    bits |= code << waitingBits;
    waitingBits += width;
    while (waitingBits >= 8) {
      out.push(bits & 255);
      bits >>>= 8;
      waitingBits -= 8;
    }
  };
  emit(256);
  for (const value of values.subarray(1)) {
    const key = prefix << 8 | value;
    const longer = table.get(key);
    if (longer !== undefined) {
      prefix = longer;
      continue;
    }
    emit(prefix);
    const code = 258 + table.size;
    if (code === 4096) {
      emit(256);
      width = 9;
      table = new Map();
    } else {
      if (code === 1 << width) width += 1;
      table.set(key, code);
    }
    prefix = value;
  }
  emit(prefix);
  emit(257);
  if (waitingBits) out.push(bits & 255);
  return out;
}

function saveGif(images, name) {
  const bytes = makeGif(images);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], {type: "image/gif"}));
  link.download = name;
  link.click();
  say(`Saved ${name}, ${(bytes.length / 1000).toFixed(0)} kB.`);
}

// Start --------------------------------------------------------------------------------------------

const TAKEN = {SELECT: /./, INPUT: /^( |arrow.*)$/, BUTTON: /^ $/, SUMMARY: /^ $/};  // by a control

// The key that is pressed, or null if the browser, a control or the visitor wants no action of the page.
function keyOf(event) {
  const key = event.key.toLowerCase();
  const isTaken = TAKEN[event.target.tagName]?.test(key);
  const isOff = /^[a-z0-9]$/.test(key) && !$("letters").checked;
  return event.ctrlKey || event.metaKey || event.altKey || isTaken || isOff ? null : key;
}

// After a click with the mouse, space belongs to the page again.
function releaseFocus(event) {
  if (event.detail) event.target.closest("button")?.blur();
}

async function openPage() {
  const letters = $("weights")?.textContent.length;
  facts = letters ? JSON.parse($("facts").textContent) : {};
  if (!letters || letters !== facts.letters) {
    say("This file is incomplete, its end is missing. Copy or export it again.");
    return;
  }
  size = facts.model.input_size;
  channels = facts.model.in_channels;
  kernel = await startWorker();
  $("weights").remove();
  await start();
  document.onkeydown = onKey;
  document.onclick = releaseFocus;
  $("app").classList.remove("loading");
}

document.addEventListener("DOMContentLoaded", () => {
  openPage().catch(error => say(`This file can't be used here: ${error.message}. Copy or export it again.`));
});
