// Tests of the controls of scripts/descent.html. They run in the demo model's page: test_descent.py calls each
// function test... there, after a reset with reduced motion, so that the page shows noise that stands still.
"use strict";

function equal(value, expected) {
  const [text, other] = [value, expected].map(one => JSON.stringify(one));
  if (text !== other) throw new Error(`${text}; expected ${other}`);
}

function matches(text, pattern) {
  if (!pattern.test(text)) throw new Error(`"${text}"; expected ${pattern}`);
}

async function until(condition) {
  const end = performance.now() + 40000;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`not ${condition}`);
    await new Promise(done => setTimeout(done, 10));
  }
}

const line = () => $("line").textContent;
const find = selector => document.querySelector(selector);
const scratch = region => find(`[data-region=${region}]`).click();
const atRest = () => until(() => resting && !busy);

function set(id, value) {
  $(id).value = value;
  $(id).dispatchEvent(new Event($(id).tagName === "SELECT" ? "change" : "input"));
}

function press(key, repeat = false) {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, repeat, bubbles: true}));
}

// Mean difference to another clip, in the first frames.
function distance(before, frames = moment().numFrames) {
  const {x, numFrames} = moment();
  const area = size * size;
  let sum = 0;
  for (let i = 0; i < x.length; i++)
    if (Math.floor(i / area) % numFrames < frames) sum += Math.abs(x[i] - before[i]);
  return sum / (channels * frames * area);
}

// The frames of a clip that are the same in another one of as many frames.
function framesKept(x, other) {
  const area = size * size;
  const length = x.length / channels / area;
  const frames = [...Array(length).keys()];
  const isSame = frames.map(() => true);
  for (let i = 0; i < x.length; i++) if (x[i] !== other[i]) isSame[Math.floor(i / area) % length] = false;
  return frames.filter(t => isSame[t]);
}

async function testAClipRollsUntilItRestsAndAScratchWakesIt() {
  matches(line(), /^Noise\. Press Play/);
  set("label", 3);  // of noise, which is no finished clip
  press(" ");
  equal($("play").textContent, "Pause");
  await until(() => moment().evaluations >= 2);
  set("label", 4);  // while it rolls
  await atRest();
  const made = moment();
  equal(made.evaluations >= 10 && made.evaluations <= 25, true);
  equal(Math.max(...made.x.map(Math.abs)) < 1.5, true);
  matches(line(), /^Made from noise in \d+ evaluations\. Now scratch it/);
  equal($("play").textContent, "Play");
  $("loop").click();  // also with reduced motion
  await until(() => shown === 3);
  $("play").click();
  await until(() => /^Nothing moves/.test(line()));
  set("label", 5);
  await atRest();
  matches(line(), /suits every class/);
  equal(distance(made.x) < 0.1, true);
  scratch("later");
  equal(resting, false);
  equal(line(), "Scratched. The same field heals it.");
  await atRest();
  matches(line(), /^At rest: the field is below R = 0\.2/);
  equal(distance(made.x, 8) < 0.1, true);
  equal(moments.every(({rms}) => rms === undefined || Number.isFinite(rms)), true);
}

async function testWithoutRPlayAndSlidersGiveSixtyEvaluationsEachTime() {
  const again = [() => $("play").click(), () => set("guidance", 2), () => {}];
  set("stopBelow", 0);
  $("play").click();
  for (const wakes of again) {
    const {total} = moment();
    await until(() => remaining <= 58);
    equal(moment().total - total, 60 - remaining);
    remaining = 1;  // to save time
    await atRest();
    matches(line(), /^60 evaluations: enough/);
    wakes();
  }
}

async function testPauseStepBackAndThePlotMoveThroughTheDescent() {
  const {x} = moment();
  const texts = [];
  $("play").click();
  await until(() => moment().evaluations >= 3);
  $("play").click();
  equal($("play").textContent, "Play");
  await until(() => !busy);
  const {evaluations} = moment();
  $("back").click();
  $("back").click();
  equal(moment().evaluations, evaluations - 2);
  press("ArrowRight");
  equal(moment().evaluations, evaluations - 1);
  press("ArrowLeft", true);
  moment().rms = 0.003;  // below any of the demo's clips
  $("plot").getContext("2d").fillText = text => texts.push(String(text));
  const {left} = $("plot").getBoundingClientRect();
  $("plot").dispatchEvent(new MouseEvent("click", {clientX: left + MARGIN.left + 4}));
  delete $("plot").getContext("2d").fillText;
  for (const text of ["0.001", "0.1", "10", "0", "5", "20", "evaluations"])
    equal([text, texts.includes(text)], [text, true]);
  equal(moment().x === x, true);
  equal($("back").disabled, true);
  set("stepSize", 0.0131);  // another future
  equal(moments.length, 1);
  set("stopBelow", 2);
  equal($("stopBelow").ariaValueText, "2");
  $("step").click();
  await until(() => moment().evaluations === 1 && !busy);
  matches($("count").textContent, /^1 evaluation, field/);
}

function testNewNoiseFramesPinsAndEveryDisturbance() {
  const pinButton = frame => find(`#frames > :nth-child(${frame + 1}) button`);
  const {x} = moment();
  pinButton(0).click();
  equal(pinButton(0).ariaPressed, "true");
  press("n");
  const noisy = moment();
  equal(framesKept(x, noisy.x), [0]);
  for (const count of [32, 4, 6]) {
    set("frameCount", count);
    for (const [c, t] of [[0, 0], [1, 2], [2, 3]]) {
      const places = [indexOf(c, t, 5, 7, count), indexOf(c, t, 5, 7, 16)];
      equal(moment().x[places[0]], noisy.x[places[1]]);
    }
    equal(document.querySelectorAll("#frames canvas").length, count);
  }
  for (const frame of [1, 2, 3, 4, 5]) pinButton(frame).click();
  equal(moment().pinned, [0, 1, 2, 3, 4]);
  matches(line(), /must be free/);
  pinButton(0).click();
  equal(moment().pinned, [1, 2, 3, 4]);
  set("label", "");
  equal(moment().label, null);
  set("kind", "blur");
  const before = moment();
  scratch("all");
  const weights = [-1, 0, 1].map(y => [-1, 0, 1].map(x => (2 - Math.abs(x)) * (2 - Math.abs(y)) / 16));
  for (const [y, x] of [[0, 0], [3, 15], [9, 8]]) {
    let mean = 0;
    weights.forEach((row, i) => row.forEach((weight, j) => {
      const [near, beside] = [y + i - 1, x + j - 1].map(place => Math.min(15, Math.max(0, place)));
      mean += weight * before.x[indexOf(1, 5, near, beside, 6)];
    }));
    equal(Math.abs(moment().x[indexOf(1, 5, y, x, 6)] - mean) < 1e-6, true);
  }
  equal(framesKept(before.x, moment().x), [1, 2, 3, 4]);
}

async function testTheMapShowsTheSizeOfTheFieldAtEachPixel() {
  $("step").click();
  await until(() => moment().evaluations === 1 && !busy);
  $("mapped").click();
  const [, map] = document.querySelectorAll("#frames > :nth-child(5) canvas");
  const {data} = map.getContext("2d").getImageData(0, 0, 16, 16);
  for (const [y, x] of [[0, 0], [3, 9], [15, 2]]) {
    const values = [0, 1, 2].map(c => moment().last[indexOf(c, 4, y, x, 16)]);
    const brightness = 3 * Math.sqrt(Math.min(1, Math.hypot(...values) / Math.sqrt(3) / 4));
    for (const c of [0, 1, 2]) {
      const expected = 255 * Math.max(0, Math.min(1, brightness - c));
      equal(Math.abs(data[4 * (y * 16 + x) + c] - expected) <= 0.51, true);
    }
  }
  $("mapped").click();
  equal(document.querySelectorAll("#frames canvas").length, 16);
}

async function testTheAddressNamesTheStartAndResetForgetsIt() {
  const {x} = moment();
  for (const _ of [1, 2, 3]) press("n");
  set("label", 1);
  const third = moment();
  equal(location.hash, "#seed=3&class=CircleLeft&frames=16");
  set("frameCount", 9);
  location.hash = "#seed=3&class=CircleLeft&frames=16";
  await until(() => moments.length === 1);
  equal([framesKept(third.x, moment().x).length, moment().label], [16, 1]);
  press("n");
  location.hash = "#seed=-1&class=Dog&frames=99";
  await until(() => moments.length === 1);
  equal(location.hash, "#seed=0&class=CircleDown&frames=16");
  set("guidance", 3);
  press("n");
  $("reset").click();
  equal(framesKept(x, moment().x).length, 16);
  equal([$("guidance").value, running], ["1.5", false]);
}

function testMomentsTakeAtMost64MB() {
  for (let i = 0; i < 9; i++) push({...moment(), x: new Float32Array(2e6)});  // 16 MB with its field
  equal(moments.length, 4);
}

function testKeysRepeatOnlyWhereItHelpsAndLettersCanBeTurnedOff() {
  press("N");  // caps lock
  press("n", true);
  press("t");
  equal([moment().seed, guide], [1, null]);
  $("letters").click();
  press("n");
  equal(moment().seed, 1);
  $("reseed").focus();
  $("reseed").dispatchEvent(new MouseEvent("click", {detail: 1, bubbles: true}));
  press(" ");
  equal([moment().seed, running], [2, true]);
  press(" ", true);
  equal(running, true);
}

async function testTheTourIsTrueWaitsWhilePausedAndRestoresEverything() {
  const text = () => $("guide").firstElementChild.textContent;
  for (const part of TOUR) part.seconds = part.isStill ? 0 : Infinity;
  set("level", 0.5);
  set("guidance", 2);
  set("frameCount", 9);
  pin(0);
  $("step").click();
  await until(() => moment().evaluations === 1 && !busy);
  const before = moment();
  const known = moments.length;
  $("tour").click();
  equal([moment().numFrames, $("guidance").value], [16, "1.5"]);
  await until(() => guide.at === 1);  // the first part ends by itself
  $("next").click();
  equal(text(), "3/6 The clip still rolls.");
  await atRest();
  matches(text(), /almost zero here \(0\.1/);
  TOUR[3].seconds = 0;
  $("next").click();
  $("play").click();
  equal([$("level").value, running], ["0", false]);
  await new Promise(done => setTimeout(done, 400));
  matches(text(), /^4\/6 Any state is a legal start.*heals it\.$/);
  $("play").click();
  await until(() => guide.at === 4);
  matches(text(), /^5\/6 The first frame is pinned\. The other 15 turn to noise/);
  equal(moment().pinned, [0]);
  await atRest();
  $("next").click();
  $("next").click();
  equal([$("guide").hidden, guide], [true, null]);
  equal(framesKept(before.x, moment().x).length, 9);
  equal([moment().evaluations, moment().pinned], [1, [0]]);
  equal([$("level").value, $("guidance").value], ["0.5", "2"]);
  equal(moments.length > known + 30, true);
}

// Of the page on a phone.
function everyControlIsLargeAndNearTheClip() {
  for (const part of document.querySelectorAll("button, select, input, summary")) {
    if (!part.offsetParent || part.disabled) continue;
    part.scrollIntoView({block: "center"});
    const target = part.type === "checkbox" ? part.parentElement : part;
    const {x, y, width, height} = target.getBoundingClientRect();
    const clip = $("player").getBoundingClientRect();
    const top = document.elementFromPoint(x + width / 2, y + height / 2);
    const isLarge = width >= 44 && height >= 44;
    const isNear = clip.top >= 0 && clip.bottom <= innerHeight && part.parentElement.contains(top);
    equal([part.outerHTML, isLarge, isNear], [part.outerHTML, true, true]);
  }
  equal(document.documentElement.scrollWidth <= 400, true);
  const speaking = [...document.querySelectorAll("output, [role=status], [aria-live]")];
  equal(speaking.map(part => part.id || part.parentElement.id), ["line", "guide"]);
}

// No rule of axe-core is violated, and the colors of lines have a contrast of at least 3.
async function theLooksPass() {
  const {violations} = await axe.run();
  equal(violations.map(({nodes}) => nodes), []);
  const luminance = name => {
    $("count").style.color = `var(--${name})`;
    const parts = getComputedStyle($("count")).color.match(/[0-9]+/g);
    const [red, green, blue] = parts.map(part => (part / 255) ** 2.2);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };
  for (const name of ["line", "mark", "curve"]) {
    const ratio = luminance(name) / luminance("card");
    equal([name, Math.max(ratio, 1 / ratio) >= 3], [name, true]);
  }
  $("count").style.color = "";
}

// On a page that has just been opened, on a phone, without reduced motion.
async function aClipIsMadeAndHeals() {
  const tops = new Set();
  const overflows = new Set();
  new MutationObserver(() => {
    tops.add($("player").getBoundingClientRect().top);
    overflows.add($("line").scrollHeight > $("line").clientHeight);
  }).observe($("line"), {childList: true});
  await atRest();
  matches(find("header").textContent, /contains a video generator with 1\.3 million parameters\. It runs in/);
  matches(line(), /^Made from noise in \d+ evaluations\. Now scratch it/);
  const {x} = moment();
  scratch("left");
  equal(distance(x) > 0.2, true);
  await atRest();
  equal(distance(x) < 0.1, true);
  equal([tops.size, [...overflows]], [1, [false]]);

  rounds = 1;  // the loop ends by itself, and starts again
  await until(() => $("loop").ariaPressed === "false");
  $("loop").click();
  await until(() => shown === 3);
  $("loop").click();
  equal([isLooping(), $("loop").ariaPressed], [false, "false"]);
}
