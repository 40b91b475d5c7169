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
  matches(line(), /^Noise\. Press Descend/);
  set("label", 3);  // of noise, which is no finished clip
  press(" ");
  equal($("descend").textContent, "Pause");
  await until(() => moment().evaluations >= 2);
  set("label", 4);  // while it rolls
  await atRest();
  const made = moment();
  equal(made.evaluations >= 10 && made.evaluations <= 25, true);
  equal(Math.max(...made.x.map(Math.abs)) < 1.5, true);
  matches(line(), /^Made from noise in \d+ evaluations\. Now scratch it/);
  equal($("descend").textContent, "Descend");
  $("loop").click();  // also with reduced motion
  await until(() => shown === 3);
  $("descend").click();
  await until(() => /^The descent has ended: its frames stay/.test(line()));
  equal([isLooping(), moment().x === made.x], [true, true]);
  scratch("later");
  equal(resting, false);
  equal(line(), "Scratched. The same field heals it.");
  await atRest();
  matches(line(), /^At rest: the field is below R = 0\.2/);
  equal(distance(made.x, 8) < 0.1, true);
  equal(moments.every(({rms}) => rms === undefined || Number.isFinite(rms)), true);
}

async function testAtRestAClassBeginsFromNoiseAndTheAddressReproducesIt() {
  set("frameCount", 4);  // to save time
  $("descend").click();
  await atRest();
  const before = moment();
  scratch("left");
  await atRest();
  set("label", 5);
  equal([moment().evaluations, isRolling(), line()], [0, true, "The new class descends from noise."]);
  await atRest();
  const {x, evaluations} = moment();
  equal(distance(before.x) > 0.1, true);
  matches(line(), new RegExp(`^Made from noise in ${evaluations} evaluations`));
  const address = location.hash;
  matches(address, /^#seed=0&class=[A-Za-z]+&frames=4$/);
  $("reset").click();
  location.hash = address;
  await until(() => moment().label === 5);
  $("descend").click();
  await atRest();
  equal([framesKept(x, moment().x).length, moment().evaluations], [4, evaluations]);
}

// The texts that the plot draws.
function plotTexts() {
  const texts = [];
  $("plot").getContext("2d").fillText = text => texts.push(String(text));
  drawPlot();
  delete $("plot").getContext("2d").fillText;
  return texts;
}

async function testNewNoiseStartsTheCountTheChartAndTheSliderAnew() {
  set("frameCount", 4);  // to save time
  $("descend").click();
  await atRest();
  const first = moment().evaluations;
  scratch("all");
  await atRest();
  equal(moment().evaluations > first, true);
  $("reseed").click();
  matches($("count").textContent, /^0 evaluations/);
  equal([$("place").value, $("place").max], ["0", "0"]);
  await atRest();
  const {evaluations} = moment();
  equal(evaluations <= 24, true);
  matches($("count").textContent, new RegExp(`^${evaluations} evaluations`));
  equal([$("place").value, $("place").max], [`${evaluations}`, `${evaluations}`]);
  equal([shownRun()[0].evaluations, shownRun().at(-1).evaluations], [0, evaluations]);
  equal(plotTexts().includes("25"), false);  // of the evaluations before
  set("place", 3);
  equal([moment().evaluations, $("place").ariaValueText], [3, "3 evaluations"]);
  $("plot").click();
  equal(moment().evaluations, 3);  // nobody goes back by accident
}

async function testWithoutRDescendAndSlidersGiveSixtyEvaluationsEachTime() {
  const again = [() => $("descend").click(), () => set("guidance", 2), () => {}];
  set("stopBelow", 0);
  $("descend").click();
  for (const wakes of again) {
    const {evaluations} = moment();
    await until(() => remaining <= 58);
    equal(moment().evaluations - evaluations, 60 - remaining);
    remaining = 1;  // to save time
    await atRest();
    matches(line(), /^60 evaluations: enough/);
    wakes();
  }
}

async function testPauseStepBackAndTheSliderMoveThroughTheDescent() {
  const {x} = moment();
  $("descend").click();
  await until(() => moment().evaluations >= 3);
  $("descend").click();
  equal($("descend").textContent, "Descend");
  await until(() => !busy);
  const {evaluations} = moment();
  $("back").click();
  $("back").click();
  equal(moment().evaluations, evaluations - 2);
  press("ArrowRight");
  equal(moment().evaluations, evaluations - 1);
  press("ArrowLeft", true);
  moment().rms = 0.003;  // below any of the demo's clips
  const texts = plotTexts();
  set("place", 0);
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

async function testTheMapShowsTheSizeOfTheFieldAndMovesNothing() {
  const colorsOf = canvas => {
    const copy = new OffscreenCanvas(16, 16).getContext("2d");
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, 16, 16).data;
  };
  const places = () => ["buttons", "scratch", "frames", "plot"].map(id => $(id).getBoundingClientRect().top);
  const [zero, half, most] = getComputedStyle($("scale").firstElementChild).backgroundImage.match(/rgb[^)]*/g);
  equal([...$("scale").children].map(part => part.textContent), ["", "0", "4", "8 and more"]);
  const between = (low, high, share) => {
    const [first, second] = [low, high].map(color => color.match(/[0-9]+/g).map(Number));
    return first.map((value, c) => value + share * (second[c] - value));
  };
  const colorOf = field => field < 4 ? between(zero, half, field / 4) : between(half, most, Math.min(1, field / 4 - 1));
  $("step").click();
  await until(() => moment().evaluations === 1 && !busy);
  const before = places();
  $("mapped").click();
  equal(places(), before);
  showFrame(4);
  for (const f of [moment().last, moment().last.map(value => value / 30)]) {
    moment().field = f;
    draw();
    for (const canvas of [$("map"), find("#frames > :nth-child(5) canvas")]) {
      const data = colorsOf(canvas);
      equal(canvas.clientWidth > 40, true);
      for (const [y, x] of [[0, 0], [3, 9], [15, 2]]) {
        const values = [0, 1, 2].map(c => f[indexOf(c, 4, y, x, 16)]);
        const expected = colorOf(Math.hypot(...values) / Math.sqrt(3));
        const color = [...data.slice(4 * (y * 16 + x), 4 * (y * 16 + x) + 3)];
        equal([color, color.every((value, c) => Math.abs(value - expected[c]) <= 0.51)], [color, true]);
      }
    }
  }
  scratch("all");
  equal(colorsOf($("map"))[3], 0);  // not computed
  $("mapped").click();
  equal($("map").clientWidth, 0);
  equal(places(), before);
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

async function testTheTourIsTrueWaitsForNextAndRestoresEverything() {
  const text = () => $("guide").firstElementChild.textContent;
  const next = () => $("next").click();
  set("level", 0.5);
  set("guidance", 2);
  set("frameCount", 9);
  pin(0);
  $("step").click();
  await until(() => moment().evaluations === 1 && !busy);
  const before = moment();
  const known = [...moments];
  const {scrollWidth} = document.documentElement;
  $("tour").click();
  equal([moment().numFrames, $("guidance").value, running], [16, "1.5", false]);
  matches(text(), /^1\/6 At the end of the tour, you get your clip back\. This is noise/);
  next();
  await atRest();
  matches(text(), /^2\/6/);
  scratch("left");
  next();
  equal(text(), "3/6 The clip still descends.");
  await atRest();
  matches(text(), /almost zero here \(0\.1/);
  next();
  equal([$("level").value, running], ["0", true]);
  matches(text(), /^4\/6 Any state is a legal start.*heals it\.$/);
  await atRest();
  matches(text(), /^4/);
  next();
  matches(text(), /^5\/6 The first frame is pinned\. The other 15 turn to noise/);
  equal(moment().pinned, [0]);
  await atRest();
  next();
  equal([$("next").hidden, document.documentElement.scrollWidth], [true, scrollWidth]);
  equal(getComputedStyle($("left")).overflowY, "visible");
  $("leave").click();
  equal([$("guide").hidden, guide], [true, null]);
  equal([moment() === before, moments.every((one, i) => one === known[i])], [true, true]);
  equal([moment().evaluations, moment().pinned, running], [1, [0], false]);
  equal([$("level").value, $("guidance").value], ["0.5", "2"]);
}

function testEveryWordOfTheFieldIsExplainedAndPlayIsNoName() {
  for (const id of ["stepSize", "momentum", "guidance", "stopBelow"])
    matches(find(`[for=${id}]`).textContent, /^[Ra-z ]+(:| \().{20}/);
  matches(find("#left .small").textContent, /^Field: .*root mean square, a typical\s+size\. Evaluation: /);
  equal([...document.querySelectorAll("button")].filter(part => part.textContent === "Play"), []);
  matches($("descend").title, /steps along the field/);
  matches($("loop").title, /frames in turn/);
  matches(find("details p").textContent, /^demo: EqM-.*, step [0-9]+, 16 px\.$/);
  equal([find("h1").textContent, document.title], Array(2).fill("Break this video. It heals."));
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
  equal($("top").offsetHeight <= 0.4 * innerHeight, true);
  equal($("keys").offsetParent, null);  // there is no keyboard
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

// Rows of 16 frames are full, and all beside the clip fits on the screen without a scrollbar of its own.
function theRowsAreEvenAndTheLeftSideFits() {
  const counts = {};
  for (const {offsetTop} of $("frames").children) counts[offsetTop] = (counts[offsetTop] ?? 0) + 1;
  equal(new Set(Object.values(counts)).size, 1);
  equal(innerWidth < 800 || $("left").offsetHeight <= 800, true);
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

  const isCovered = () => {
    const {x, y, width, height} = $("player").getBoundingClientRect();
    return $("cover").contains(document.elementFromPoint(x + width / 2, y + height / 2));
  };
  equal([isLooping(), isCovered()], [true, false]);
  rounds = 1;  // the loop ends by itself, says so, and starts again
  await until(() => $("loop").ariaPressed === "false");
  equal([isCovered(), $("cover").innerText], [true, "\u25b6 Press to play"]);
  const frame = shown;
  await new Promise(done => setTimeout(done, 300));
  equal(shown, frame);
  $("cover").click();
  equal([isLooping(), isCovered(), rounds], [true, false, ROUNDS]);
  await until(() => shown === 3);
  $("loop").click();
  equal([isLooping(), $("loop").ariaPressed, isCovered()], [false, "false", false]);
}
